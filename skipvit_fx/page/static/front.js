// Shows the plan that was chosen, in the plot or in the table.
"use strict";

const { map, plans, first } = JSON.parse(document.getElementById("data").textContent);
const choices = [...document.querySelectorAll("[data-choose]")];
const parts = [...document.querySelectorAll("[data-plan]")];
const slider = document.getElementById("layer");
let drawn = new AbortController();
let placed = slider.value; // where the page itself put the slider

function choose(plan) {
  for (const part of parts) part.hidden = Number(part.dataset.plan) !== plan;
  for (const choice of choices) {
    const chosen = Number(choice.dataset.choose) === plan;
    choice.setAttribute("aria-pressed", String(chosen));
    if (choice.closest(".points")) choice.tabIndex = chosen ? 0 : -1;
  }
  const { stages } = plans[plan];
  document.querySelector(".controls").hidden = !stages.length;
  if (slider.value === placed || !stages.some(isAway)) slider.value = placed = String(strongest(stages));
  drawn.abort();
  drawn = new AbortController();
  drawPatches({ ...map, ...plans[plan] }, drawn.signal);
}

// The layer after which most of the first span's tokens are away.
function strongest(stages) {
  const span = stages.filter((stage) => stage.span === stages[0].span);
  return span.length ? span[span.length - 1].layer : 0;
}

// Whether tokens of a stage are away where the slider is: where it was moved to, it then stays, to compare plans there.
function isAway(stage) {
  const layer = Number(slider.value);
  return stage.layer <= layer && (stage.returns === null || stage.returns > layer);
}

function step(event) {
  const moves = { ArrowLeft: -1, ArrowUp: 1, ArrowRight: 1, ArrowDown: -1 };
  const from = Number(event.target.dataset.choose);
  let to = from + (moves[event.key] || 0);
  if (event.key === "Home") to = 0;
  else if (event.key === "End") to = plans.length - 1;
  else if (!(event.key in moves)) return;
  event.preventDefault();
  if (to < 0 || to >= plans.length) return;
  choose(to);
  event.currentTarget.querySelector(`[data-choose="${to}"]`).focus();
}

for (const choice of choices) {
  choice.addEventListener("click", () => {
    const plan = Number(choice.dataset.choose);
    choose(plan);
    if (choice.closest("table")) document.getElementById("front").scrollIntoView();
    document.getElementById("said").textContent = `${choice.dataset.label || choice.textContent} is shown.`;
  });
}
for (const points of document.querySelectorAll(".points")) points.addEventListener("keydown", step);

for (const axis of document.getElementsByName("axis")) {
  axis.addEventListener("change", () => {
    for (const plot of document.querySelectorAll(".plot")) plot.hidden = plot.dataset.axis !== axis.value;
  });
}

for (const button of document.querySelectorAll(".copy-plan")) copying(button, button.parentElement.querySelector(".text"));
choose(first);
