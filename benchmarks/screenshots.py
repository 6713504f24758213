"""Pictures of reports for the documentation: ``docs/images/report*.png``.

    python benchmarks/screenshots.py

Needs Chromium. The weights are random, as the reports say.
"""

from __future__ import annotations

import argparse
import io
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from playwright.sync_api import sync_playwright
from torch.nn.functional import interpolate

import skipvit_fx as sv
from gallery import ROOT, pictures

WIDE, HIGH, PHONE = 1180, 900, (390, 800)
NOTE = "The weights are random: counts and times are real, answers and the choice of patches mean nothing."


def main(argv: Sequence[str] | None = None) -> int:
    """Make the reports and their pictures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument(
        "--searched", default="vit_tiny_patch16_224", help="the model of the search"
    )
    parser.add_argument("--plan", default="4,7(40%,40%)+11")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--trials", type=int, default=80, help="plans of the search")
    args = parser.parse_args(argv)
    browser = shutil.which("chromium")
    if browser is None:
        sys.exit("chromium is not installed: apt-get install chromium")
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        front = Path(folder) / "front.html"
        write_report(args.model, args.plan, args.rounds, page)
        write_search(args.searched, args.trials, front)
        with sync_playwright() as driver:
            chromium = driver.chromium.launch(executable_path=browser, args=["--no-sandbox"])
            photograph(chromium, page, args.out)
            photograph_search(chromium, front, args.out)
            chromium.close()
    return 0


def write_report(name: str, plan: str, rounds: int, path: Path) -> None:
    """A report of three pictures."""
    torch.manual_seed(0)
    fast = sv.rewrite(timm.create_model(name).eval(), plan)
    sv.report(fast, pictures(), path, title=name, note=NOTE, rounds=rounds)


def write_search(name: str, trials: int, path: Path) -> None:
    """A report of a search on coarse noise, shown on the same pictures."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    batches = [interpolate(torch.randn(8, 3, 7, 7), size=224, mode="bicubic") for _ in range(2)]
    result = sv.search(model, batches, metric="cosine", trials=trials, measure=False)
    sv.report_search(result, model, pictures(), path, title=name, note=NOTE)


def photograph(chromium: Any, page: Path, out: Path) -> None:
    """The top and the graph in a wide window, and three parts on a dark phone."""
    wide = opened(chromium, page, WIDE, HIGH, "light")
    wide.locator("#layer").fill("7")
    wide.locator("#layer").blur()
    save([wide.screenshot(full_page=True, clip=box(wide, "body", "#images"))], out / "report.png")
    wide.evaluate("window.scrollTo(0, 0)")
    save([wide.locator("#graph").screenshot()], out / "report-graph.png")
    shots = []
    phone = opened(chromium, page, *PHONE, "dark")
    for place in ("header", "#images", "#layers"):
        phone.locator(place).first.evaluate("place => place.scrollIntoView()")
        shots.append(phone.screenshot())
    save(shots, out / "report-phone.png")


def photograph_search(chromium: Any, page: Path, out: Path) -> None:
    """The front and the images, for a plan in its middle."""
    wide = opened(chromium, page, WIDE, HIGH, "light")
    points = wide.locator(".points button")
    points.nth(points.count() // 2).click()
    wide.mouse.move(0, 0)
    clip = box(wide, "#front", ".picture .state")
    save([wide.screenshot(full_page=True, clip=clip)], out / "report-search.png")


def opened(chromium: Any, page: Path, width: int, height: int, scheme: str) -> Any:
    """The page, drawn."""
    viewport = {"width": width, "height": height}
    tab = chromium.new_context(viewport=viewport, color_scheme=scheme).new_page()
    tab.goto(page.as_uri())
    tab.wait_for_selector("html[data-drawn=patches]")
    return tab


def box(tab: Any, first: str, last: str) -> dict[str, float]:
    """The part of a page from the top of one element to the end of another."""
    top, bottom = (tab.locator(place).first.bounding_box() for place in (first, last))
    height = bottom["y"] + bottom["height"] - top["y"] + 24
    return {"x": 0, "y": top["y"] + tab.evaluate("scrollY"), "width": WIDE, "height": height}


def save(shots: Sequence[bytes], path: Path) -> None:
    """Side by side, in 200 colours."""
    images = [Image.open(io.BytesIO(shot)).convert("RGB") for shot in shots]
    gap = 16
    width = sum(image.width for image in images) + gap * (len(images) - 1)
    whole = Image.new("RGB", (width, max(image.height for image in images)), "white")
    left = 0
    for image in images:
        whole.paste(image, (left, 0))
        left += image.width + gap
    whole.quantize(200, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size // 1000} kB")


if __name__ == "__main__":
    raise SystemExit(main())
