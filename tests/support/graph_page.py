"""The drawn graph in a page of its own."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

STATIC = files("skipvit_fx.page") / "static"


def write_page(data: dict[str, Any], path: Path) -> Path:
    """A page with nothing but the graph; ``took`` is how long it took to draw, in milliseconds."""
    style, dagre, script = (
        (STATIC / name).read_text(encoding="utf-8")
        for name in ("graph.css", "vendor/dagre.min.js", "graph.js")
    )
    plain = json.dumps(data).replace("<", "\\u003c")
    dark = "@media (prefers-color-scheme: dark) { body { background: #14181d; color: #e6eaef } }"
    path.write_text(
        f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>graph</title>
<style>body {{ margin: 1rem; font-family: sans-serif }} {dark} {style}</style>
</head>
<body>
<main><h1>graph</h1><h2>layers</h2><div id="graph"></div></main>
<script>{dagre}</script>
<script>{script}</script>
<script>
const began = performance.now();
drawGraph(document.getElementById("graph"), {plain});
document.body.offsetHeight;
window.took = performance.now() - began;
</script>
</body>
</html>
""",
        encoding="utf-8",
    )
    return path
