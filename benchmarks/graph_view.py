"""How long the graph of a 24-layer ViT takes to draw in Chromium, and a layer of it to open.

What is measured is what a person waits for: until the page has been laid out again, and its next picture is due. Every
layer is opened once, in a page at desktop width with the graph before and after side by side.

Run it with `python benchmarks/graph_view.py --out docs/results/graph-view.md`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import timm
from playwright.sync_api import sync_playwright

import skipvit_fx
from skipvit_fx.page.graph import graph_data
from skipvit_fx.reports.environment import hardware, versions

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from support.graph_page import write_page

MODELS = {
    "ViT, 24 layers": ("vit_small_patch16_224", "8(55%)+22"),
    "ViT, 24 layers, merging": ("vit_small_patch16_224", "1-23(4)+merged"),
    "DINOv3 (rotary), 24 layers": ("vit_small_patch16_dinov3", "8(55%)+22"),
}
DRAWN, OPENED = 2000.0, 200.0
"""The limits, in milliseconds."""

OPEN = """async (i) => {
    const head = document.querySelectorAll(".gv-after .gv-head")[i];
    const painted = () => new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
    await painted();
    const began = performance.now();
    head.click();
    document.body.offsetHeight;
    await painted();
    return performance.now() - began;
}"""


class Times(NamedTuple):
    """Milliseconds to draw, and to open each layer; and the size of the data in bytes."""

    drawn: float
    opened: list[float]
    size: int


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print or write, and return 1 if a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, help="write the table to this file")
    args = parser.parse_args(argv)

    with sync_playwright() as driver:
        chromium = driver.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        found = {name: measure(chromium, *what) for name, what in MODELS.items()}
        browser = f"Chromium {chromium.version}"
        chromium.close()
    text = table(found, browser)
    print(text)
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    missed = any(t.drawn > DRAWN or max(t.opened) > OPENED for t in found.values())
    return 1 if missed else 0


def measure(chromium: Any, name: str, plan: str) -> Times:
    """Draw the graph of a model at small width, and open its layers one after the other."""
    model = timm.create_model(name, depth=24, embed_dim=64, num_heads=4).eval()
    data = graph_data(skipvit_fx.rewrite(model, plan, validate=False))
    with tempfile.TemporaryDirectory() as folder:
        file = write_page(data, Path(folder) / "graph.html")
        page = chromium.new_page(viewport={"width": 1280, "height": 900})
        page.goto(file.as_uri())
        page.wait_for_timeout(2000)
        drawn = page.evaluate("window.took")
        opened = [page.evaluate(OPEN, i) for i in range(1, 25)]
        size = file.stat().st_size
        page.close()
    return Times(drawn, opened, size)


def table(found: dict[str, Times], browser: str) -> str:
    """A page of the documentation."""
    lines = [
        "# Drawing a graph of 24 layers",
        "",
        f"Written by `benchmarks/graph_view.py` on {hardware()}; {browser}, headless; {versions('timm')}; random "
        "weights.",
        "",
        f"Milliseconds until the page was laid out; while a layer opens, those before it stay open. The limits are "
        f"{DRAWN:g} to draw and {OPENED:g} to open a layer. Other work ran on the machine: its load average was "
        f"{os.getloadavg()[0]:.1f}. The file holds the graph, the script, and the layout library.",
        "",
        "| model | plan | drawn | a layer opened, median | slowest | file, kB |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for name, times in found.items():
        plan = MODELS[name][1]
        lines.append(
            f"| {name} | `{plan}` | {times.drawn:.0f} | {median(times.opened):.0f} | {max(times.opened):.0f} "
            f"| {times.size / 1000:.0f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
