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

function tinted(text, tone) {
  const made = document.createElement("span");
  made.className = tone;
  made.textContent = text;
  return made;
}

// The fate is announced, so it is set only when it is another one.
source.addEventListener("delivery", (event) => {
  const now = JSON.parse(event.data);
  if (fate.textContent !== now.fate) {
    fate.replaceChildren(tinted(now.fate, now.tone));
    document.getElementById("due")?.remove();
  }
  const list = document.getElementById("sent-as");
  list.replaceChildren(...now.runs.map((one) => {
    const item = document.createElement("li");
    const name = document.createElement(one.run ? "a" : "span");
    name.textContent = one.run ? `${one.kind} (run ${one.run})` : "original";
    if (one.run) name.href = `${list.dataset.runs}/${one.run}`;
    item.append(name, ": ", tinted(one.fate, one.tone));
    return item;
  }));
  for (const part of document.querySelectorAll(".sent-as")) part.hidden = now.runs.length < 2;
  for (const one of now.attempts) {
    if (!rows.querySelector(`[data-attempt="${one.run}/${one.number}"]`)) add(one);
  }
});

function add(one) {
  const row = document.createElement("tr");
  row.dataset.attempt = `${one.run}/${one.number}`;
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
}
