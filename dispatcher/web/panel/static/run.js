// How far a run is, live. Without it the figures are as old as the page.
"use strict";

const state = document.getElementById("state");
const source = new EventSource(state.dataset.stream);

source.addEventListener("run", (event) => {
  const run = JSON.parse(event.data);
  if (state.textContent.trim() !== run.state) {
    state.textContent = run.state;
    if (!run.is_open) document.getElementById("verbs")?.remove();
  }
  const bar = document.getElementById("bar");
  bar.max = run.total;
  bar.value = run.done;
  for (const name of ["done", "total", "delivered", "retrying", "dead"]) document.getElementById(name).textContent = run[name].toLocaleString();
  if (!run.is_open) source.close();
});
