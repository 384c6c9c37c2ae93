// What a receiver gets, live. Without it the list is as old as the page. What came from elsewhere is only ever text.
"use strict";

const ROWS_MAX = 100;
const live = document.getElementById("live");
const list = document.getElementById("list");
const words = JSON.parse(live.dataset.words);
const source = new EventSource(live.dataset.stream);

source.addEventListener("open", () => { live.textContent = "Live: requests show up here as they arrive."; });
source.addEventListener("error", () => { live.textContent = "Not live at the moment; trying again."; });
source.addEventListener("missed", () => { live.textContent = "Live, but too many to show them all: load the page again."; });
source.addEventListener("request", (event) => {
  const one = JSON.parse(event.data);
  const details = document.createElement("details");
  const summary = document.createElement("summary");
  const verdict = document.createElement("span");
  const text = document.createElement("pre");
  verdict.className = one.signature === "valid" ? "good" : one.signature === "unknown" ? "muted" : "bad";
  verdict.textContent = words[one.signature];
  summary.append(`${format.format(new Date(one.at))}, ${one.body_bytes.toLocaleString()} B, answered ${one.status}: `, verdict);
  text.tabIndex = 0;
  text.textContent = `${one.headers.map((header) => `${header.name}: ${header.value}`).join("\n")}\n\n${one.body}`;
  details.open = true;
  details.append(summary, text);
  list.prepend(details);
  while (list.children.length > ROWS_MAX) list.lastElementChild.remove();
  document.getElementById("none-yet")?.remove();
});
