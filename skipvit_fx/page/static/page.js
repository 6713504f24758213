// Starts what the page draws, and copies the diff.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
if (data.stages.length) drawPatches(data);

const graph = JSON.parse(document.getElementById("graph-data").textContent);
drawGraph(document.getElementById("graph-view"), graph);

copying(document.getElementById("copy"), document.getElementById("diff"));
