// Starts what the page draws, and copies the diff.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
if (data.stages.length) drawPatches(data);

const graph = JSON.parse(document.getElementById("graph-data").textContent);
drawGraph(document.getElementById("graph-view"), graph);

const copy = document.getElementById("copy");
if (copy) copy.addEventListener("click", copyDiff);

async function copyDiff() {
  const diff = document.getElementById("diff");
  const said = document.getElementById("copied");
  try {
    await navigator.clipboard.writeText(diff.textContent);
    said.textContent = "Copied.";
  } catch {
    getSelection().selectAllChildren(diff); // where a page from disk may not write to the clipboard
    said.textContent = "Selected: copy it with the keyboard.";
  }
}
