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

function eventCell(one) {
  const made = cell("Event", "");
  const link = document.createElement("a");
  const type = document.createElement("code");
  type.textContent = one.type;
  link.href = `${live.dataset.deliveries}/${one.event_id}/${one.endpoint_id}`;
  link.append(type);
  made.append(link);
  return made;
}

source.addEventListener("open", () => { live.textContent = "Live: attempts show up here as they are made."; });
source.addEventListener("error", () => { live.textContent = "Not live at the moment; trying again."; });
source.addEventListener("missed", () => { live.textContent = "Live, but too many to show them all: load the page again."; });
// Of each event, when its last attempt that is shown began: the stream begins with what happened while the page was on its way.
const shown = new Map([...attempts.rows].map((row) => [row.dataset.event, Date.parse(row.querySelector("time")?.dateTime)]));
source.addEventListener("attempt", (event) => {
  const one = JSON.parse(event.data);
  const began = Date.parse(one.started_at);
  if (shown.get(String(one.event_id)) >= began) return;
  shown.set(String(one.event_id), began);
  const row = document.createElement("tr");
  row.append(
    cell("Last attempt", format.format(new Date(one.started_at))),
    eventCell(one),
    cell("Outcome", one.fault === null ? "delivered" : `failed ${one.fault === "status" ? one.status : one.fault}`, one.fault === null ? "good" : "bad"),
    cell("Attempt", String(one.number)),
    cell("Took", milliseconds(one.duration_us)),
  );
  attempts.prepend(row);
  while (attempts.rows.length > ROWS_MAX) attempts.lastElementChild.remove();
  document.getElementById("recent-table").hidden = false;
  document.getElementById("none-yet")?.remove();
});

// How it stands. The sentence is announced, so it is set only when it is another one; the figures beside it are not.
const words = document.getElementById("lane-words");
const figures = document.getElementById("lane-figures");
source.addEventListener("standing", (event) => {
  const now = JSON.parse(event.data);
  if (words === null) return;
  if (now.state !== words.dataset.state || String(now.failing) !== words.dataset.failing) {
    document.getElementById("changed").hidden = false;
  }
  if (words.textContent !== now.words) words.textContent = now.words;
  const said = [amount(now.backlog, "event waits", "events wait"), `${now.more_retries ? "over " : ""}${amount(now.retries, "delivery waits", "deliveries wait")} for a retry`];
  if (now.next_retry_at !== null) {
    const due = new Date(now.next_retry_at);
    said[1] += `, the first ${due <= new Date() ? "since" : "at"} ${format.format(due)}`;
  }
  if (now.lane !== null) said.push(`${now.lane.in_flight.toLocaleString()} of at most ${amount(now.lane.in_flight_limit, "POST")} in flight`);
  if (now.lane !== null && now.lane.connecting > 0) said.push(`${amount(now.lane.connecting, "waits", "wait")} for a connection`);
  if (now.lane !== null && now.lane.pace_per_s !== null && now.lane.breaker === "closed") said.push(`${amount(now.lane.pace_per_s, "POST")} a second at the moment`);
  if (now.expired_24h > 0) said.push(`${now.expired_24h.toLocaleString()} expired unsent in 24 h`);
  if (now.wait_s !== null) said.push(`tried again in ${now.wait_s.toLocaleString()} s`);
  figures.textContent = said.join("; ") + ".";
});
