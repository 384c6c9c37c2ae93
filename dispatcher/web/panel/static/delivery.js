// One delivery, live: its fate and its attempts. Without it the page is as old as it is.
"use strict";

const fate = document.getElementById("fate");
const rows = document.getElementById("rows");
const source = new EventSource(fate.dataset.stream);

function cell(label, text, className) {
  const made = document.createElement("td");
  const inner = document.createElement("span");
  made.dataset.label = label;
  inner.textContent = text;
  if (className) inner.className = className;
  made.append(inner);
  return made;
}

source.addEventListener("fate", (event) => { fate.textContent = JSON.parse(event.data); });
source.addEventListener("attempt", (event) => {
  const one = JSON.parse(event.data);
  const row = document.createElement("tr");
  const head = document.createElement("th");
  head.scope = "row";
  head.textContent = `${one.number || "unsent"}${one.run ? ` of the ${one.kind}` : ""}`;
  const answer = one.fault === null || one.fault === "status" ? String(one.status) : one.fault;
  row.append(
    head,
    cell("Started", format.format(new Date(one.started_at))),
    cell("Took", one.number ? milliseconds(one.duration_us) : "–"),
    cell("Answer", answer, one.fault === null ? "good" : "bad"),
    cell("What it means", one.verdict),
  );
  if (one.response) {
    const details = document.createElement("details");
    const summary = document.createElement("summary");
    const text = document.createElement("pre");
    summary.textContent = "Beginning of the answer";
    text.tabIndex = 0;
    text.textContent = one.response;
    details.append(summary, text);
    row.lastElementChild.append(details);
  }
  rows.prepend(row);
  document.getElementById("attempts-table").hidden = false;
  document.getElementById("none-yet")?.remove();
});
