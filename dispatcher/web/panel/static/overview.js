// The operator's figures, live. Without it they are as old as the page.
"use strict";

const BARS = 60;
const live = document.getElementById("live");
const spark = document.getElementById("spark");
const rates = [];
const source = new EventSource(live.dataset.stream);

source.addEventListener("open", () => { live.textContent = "Live"; });
source.addEventListener("error", () => { live.textContent = "Not live at the moment; trying again."; });
source.addEventListener("look", (event) => {
  const told = JSON.parse(event.data);
  for (const element of document.querySelectorAll("[data-figure]")) {
    element.textContent = told.figures[element.dataset.figure];
  }
  fill("accounts", told.accounts, (row, base) => [
    link(row.account_id, `${base}?account_id=${encodeURIComponent(row.account_id)}`),
    ["Waiting", row.backlog.toLocaleString()], ["Endpoints behind", row.endpoints.toLocaleString()],
  ]);
  fill("failing", told.failing, (row, base) => [
    link(row.name || row.url, `${base}/${row.id}`),
    ["Account", row.account_id], ["No success since", format.format(new Date(row.failing_since))],
  ]);
  if (told.rate !== null) draw(told.rate);
});

function link(text, address) {
  const made = document.createElement("a");
  made.href = address;
  made.textContent = text;
  return made;
}

function fill(name, rows, cells) {
  const body = document.getElementById(`${name}-rows`);
  body.replaceChildren(...rows.map((one) => {
    const row = document.createElement("tr");
    for (const cell of cells(one, body.dataset.base)) {
      const made = document.createElement(Array.isArray(cell) ? "td" : "th");
      if (Array.isArray(cell)) [made.dataset.label, made.textContent] = cell;
      else { made.scope = "row"; made.append(cell); }
      row.append(made);
    }
    return row;
  }));
  document.getElementById(`${name}-table`).hidden = rows.length === 0;
  document.getElementById(`${name}-none`).hidden = rows.length !== 0;
}

function draw(rate) {
  rates.push(rate);
  while (rates.length > BARS) rates.shift();
  const most = Math.max(...rates, 1);
  spark.replaceChildren(...rates.map((one, n) => {
    const bar = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    const height = one === 0 ? 0 : Math.max(0.5, (one / most) * 32);
    for (const [name, value] of Object.entries({ class: "bar-good", x: (BARS - rates.length + n) * 2, y: 32 - height, width: 1.6, height })) bar.setAttribute(name, value);
    return bar;
  }));
  spark.setAttribute("aria-label", `Deliveries a second, live: ${rate.toFixed(1)} now, ${most.toFixed(1)} at most since this page is open`);
  spark.removeAttribute("hidden");
}
