// Recent deliveries, live. Without it the list is as old as the page.
"use strict";

const ROWS_MAX = 100;
const live = document.getElementById("live");
const attempts = document.getElementById("attempts");
const source = new EventSource(live.dataset.stream);

function cell(label, text, className) {
  const made = document.createElement("td");
  made.dataset.label = label;
  made.textContent = text;
  if (className) made.className = className;
  return made;
}

source.addEventListener("open", () => { live.textContent = "Live: attempts show up here as they are made."; });
source.addEventListener("error", () => { live.textContent = "Not live at the moment; trying again."; });
source.addEventListener("missed", () => { live.textContent = "Live, but too many to show them all: load the page again."; });
source.addEventListener("attempt", (event) => {
  const one = JSON.parse(event.data);
  const row = document.createElement("tr");
  row.append(
    cell("Last attempt", format.format(new Date(one.started_at))),
    cell("Event", one.type),
    cell("Outcome", one.fault === null ? "delivered" : `failed ${one.fault === "status" ? one.status : one.fault}`, one.fault === null ? "good" : "bad"),
    cell("Attempt", String(one.number)),
    cell("Took", `${(one.duration_us / 1000).toLocaleString(undefined, { maximumFractionDigits: 1 })} ms`),
  );
  attempts.prepend(row);
  while (attempts.rows.length > ROWS_MAX) attempts.lastElementChild.remove();
  document.getElementById("recent-table").hidden = false;
  document.getElementById("none-yet")?.remove();
});
