"use strict";
// Shows completions of one kind; without this script all of them are shown.
for (const box of document.querySelectorAll(".filters")) {
  box.hidden = false;
  const section = box.parentElement;
  box.addEventListener("click", (event) => {
    const chosen = event.target.closest("button");
    if (!chosen) return;
    for (const button of box.querySelectorAll("button")) {
      button.setAttribute("aria-pressed", String(button === chosen));
    }
    const kind = chosen.dataset.kind;
    let count = 0;
    for (const problem of section.querySelectorAll(".problem")) {
      let shown = 0;
      for (const item of problem.querySelectorAll(".completion")) {
        const fits = kind === "all" || item.dataset.kinds.split(" ").includes(kind);
        item.hidden = !fits;
        shown += fits ? 1 : 0;
      }
      problem.hidden = shown === 0;
      count += shown;
    }
    box.querySelector("output").textContent = count === 1 ? "1 completion" : count + " completions";
  });
}
