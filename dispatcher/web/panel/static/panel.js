// Everywhere: times in the reader's own zone, and buttons that copy. Without it the pages say UTC and have no such buttons.
"use strict";

const format = new Intl.DateTimeFormat(undefined, { dateStyle: "short", timeStyle: "medium" });

function milliseconds(us) {
  return `${(us / 1000).toLocaleString(undefined, { maximumFractionDigits: 1 })} ms`;
}

function amount(number, one, several = `${one}s`) {
  return `${number.toLocaleString()} ${number === 1 ? one : several}`;
}

function localize(root) {
  for (const element of root.querySelectorAll("time[datetime]")) {
    const at = new Date(element.dateTime);
    if (!Number.isNaN(at.getTime())) {
      element.title = element.textContent;
      element.textContent = format.format(at);
    }
  }
}

function addCopyButtons(root) {
  if (!navigator.clipboard) return;  // a page that came over plain http has none
  for (const block of root.querySelectorAll("pre[data-copy]")) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "plain copy";
    button.textContent = "Copy";
    button.setAttribute("aria-label", `Copy ${block.dataset.copy}`);
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(block.textContent);
      button.textContent = "Copied";
    });
    const holder = document.createElement("div");
    holder.className = "copyable";
    block.replaceWith(holder);
    holder.append(button, block);
  }
}

localize(document);
addCopyButtons(document);
