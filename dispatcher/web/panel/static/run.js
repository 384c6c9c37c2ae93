// How far a run is, live. Without it the figures are as old as the page.
"use strict";

const state = document.getElementById("state");
const source = new EventSource(state.dataset.stream);

source.addEventListener("run", (event) => {
  const run = JSON.parse(event.data);
  if (state.textContent.trim() !== run.state) {
    const said = document.createElement("span");
    said.textContent = run.state;
    said.className = { running: "good", paused: "warn" }[run.state] ?? "muted";
    state.replaceChildren(said);
    if (!run.is_open) document.getElementById("verbs")?.remove();
  }
  const bar = document.getElementById("bar");
  bar.max = run.total;
  bar.value = run.done;
  for (const name of ["done", "total", "delivered", "retrying", "dead"]) document.getElementById(name).textContent = run[name].toLocaleString();
  if (!run.retrying) document.getElementById("next-retry")?.remove();
  if (!run.is_open) source.close();
});
