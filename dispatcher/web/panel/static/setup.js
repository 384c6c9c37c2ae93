// Step 1 has been changed and not saved: what steps 2 and 3 would do is about something else, so they wait.
"use strict";

const config = document.getElementById("config");
const allTypes = document.getElementById("all_types");
const types = document.getElementById("types");

config.addEventListener("input", () => {
  for (const button of document.querySelectorAll(".needs-saved")) button.disabled = true;
  const gate = document.getElementById("gate");
  if (gate) gate.textContent = "Step 1 has changes that are not saved: save them, then test.";
});

function showTypes() {
  types.hidden = allTypes.checked;
}

allTypes.addEventListener("change", showTypes);
showTypes();
document.getElementById("problem")?.focus();
