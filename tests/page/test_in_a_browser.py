"""The report in Chromium: what it draws, says, asks for and complains of."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from torch import Tensor

import skipvit_fx
from support.browser import Page
from support.models import BY_NAME
from support.report_models import Shuffled, hostile

PATCHES, COLUMNS = 24, 6


class Made(NamedTuple):
    """A report in a file, and what the model chose on the same images."""

    file: Path
    traces: list[skipvit_fx.TokenTrace]


def _made(folder: Path, fast: Any, x: Tensor, **options: Any) -> Made:
    file = folder / "report.html"
    skipvit_fx.report(fast, x, file, rounds=0, **options)
    return Made(file, skipvit_fx.trace_tokens(fast, x))


def _bright() -> Tensor:
    """Light images with a little structure, so that a dark patch is seen."""
    return BY_NAME["vit"].input(2).clamp(-1, 1) * 0.2 + 0.7


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Two stages that return, one that merges until the next layer, and one that drops for good."""
    model, x = BY_NAME["vit"].build(), _bright()
    plan = "1,2(50%,25%)+3;3(10)+4+merged;4(25%)"
    fast = skipvit_fx.rewrite(model, plan, example_inputs=x, validate=False)
    return _made(tmp_path_factory.mktemp("made"), fast, x)


def slide(page: Any, layer: int) -> None:
    page.locator("#layer").fill(str(layer))


def pixels(page: Any, image: int = 0) -> list[tuple[int, ...]]:
    """The colour of every patch near its middle, off lines and cursors, as a person sees it."""
    shot = Image.open(io.BytesIO(page.locator(".frame").nth(image).screenshot())).convert("RGB")
    wide, high = shot.width / COLUMNS, shot.height / (PATCHES // COLUMNS)
    places = (divmod(patch, COLUMNS) for patch in range(PATCHES))
    colours = [shot.getpixel((int((x + 0.3) * wide), int((y + 0.3) * high))) for y, x in places]
    return [colour for colour in colours if isinstance(colour, tuple)]


def state(page: Any, image: int = 0) -> str:
    return str(page.locator(".state").nth(image).inner_text())


def test_it_asks_for_nothing_and_complains_of_nothing(
    made: Made, open_page: Callable[..., Page]
) -> None:
    opened = open_page()
    page = opened.open(made.file)
    page.wait_for_selector("html[data-drawn=patches]")
    for layer in range(6):
        slide(page, layer)
    page.get_by_label("scores").check()
    assert opened.complaints == []
    assert opened.requests == []


@pytest.mark.parametrize("image", [0, 1])
def test_the_slider_shows_which_patches_are_there(
    made: Made, open_page: Callable[..., Page], image: int
) -> None:
    page = open_page().open(made.file)
    first, second, joined, last = (set(trace.dropped[image].tolist()) for trace in made.traces)
    slide(page, 0)
    light = pixels(page, image)
    assert state(page, image) == "24 of 24 patches are present."
    for layer, gone in {1: first, 2: first | second, 4: last, 5: last}.items():
        slide(page, layer)
        assert state(page, image).startswith(f"{PATCHES - len(gone)} of 24 patches are present")
        for patch, (seen, before) in enumerate(zip(pixels(page, image), light, strict=True)):
            if patch in gone:
                assert sum(seen) < 0.6 * sum(before), (layer, patch)
            else:
                assert max(abs(a - b) for a, b in zip(seen, before, strict=True)) < 12
    back = (first | second | joined) - last
    assert state(page, image).endswith(f"; {len(back)} have come back.")
    assert page.locator(".back").nth(image).get_attribute("d")


@pytest.mark.slow
def test_the_slider_is_moved_by_the_keyboard_and_says_where_it_is(
    made: Made, open_page: Callable[..., Page]
) -> None:
    page = open_page().open(made.file)
    slider = page.get_by_label("Tokens that are present")
    slider.focus()
    assert page.locator("#layer-now").inner_text() == "after layer 1"
    slider.press("ArrowRight")
    assert page.locator("#layer-now").inner_text() == "after layer 2"
    assert slider.get_attribute("aria-valuetext") == "after layer 2"
    slider.press("End")
    assert page.locator("#layer-now").inner_text() == "before the head"
    slider.press("Home")
    assert page.locator("#layer-now").inner_text() == "before layer 1"
    page.get_by_role("button", name="Show layer 4").first.click()
    assert page.locator("#layer-now").inner_text() == "after layer 4"


def test_a_patch_tells_its_story_to_mouse_and_keyboard(
    made: Made, open_page: Callable[..., Page]
) -> None:
    page = open_page().open(made.file)
    trace = made.traces[0]
    patch = int(trace.dropped[0, 0])
    row, column = divmod(patch, COLUMNS)
    score = float(trace.scores[0, patch])
    rank = int((trace.scores[0] > score).sum()) + 1
    frame, said = page.locator(".frame").first, page.locator(".patch").first
    box = frame.bounding_box()
    frame.hover(
        position={
            "x": (column + 0.5) * box["width"] / COLUMNS,
            "y": (row + 0.5) * box["height"] / 4,
        }
    )
    heard = said.inner_text()
    assert heard.startswith(f"Patch {patch} (row {row + 1}, column {column + 1}): score ")
    assert float(re.findall(r"score (\S+) in layer 1", heard)[0]) == pytest.approx(score, rel=1e-3)
    assert f"rank {rank} of 24" in heard
    assert "Left in layer 1, back at layer 3" in heard
    page.mouse.move(0, 0)
    assert said.inner_text().startswith("Point at a patch")
    frame.focus()
    for key in ["Home", *["ArrowDown"] * row, *["ArrowRight"] * column]:
        frame.press(key)
    assert said.inner_text() == heard
    frame.press("Escape")
    assert said.inner_text().startswith("Point at a patch")


@pytest.mark.slow
def test_scores_are_drawn_by_rank(made: Made, open_page: Callable[..., Page]) -> None:
    page = open_page().open(made.file)
    page.get_by_label("scores").check()
    order = made.traces[0].scores[0].argsort().tolist()

    blue = [b - r for r, _, b in pixels(page)]
    low, high = ([blue[patch] for patch in part] for part in (order[:6], order[-6:]))
    assert max(low) < min(high)
    slide(page, 2)
    absent = set(range(PATCHES)) - {int(i) for i in made.traces[0].kept[0]}
    assert max(sum(pixels(page)[patch]) for patch in absent) < 3 * 110


@pytest.mark.slow
def test_merged_patches_are_regions(made: Made, open_page: Callable[..., Page]) -> None:
    page = open_page().open(made.file)
    slide(page, 3)
    owner = made.traces[2].owner
    assert owner is not None
    regions: dict[int, list[int]] = {}
    for patch, token in enumerate(owner[0].tolist()):
        regions.setdefault(token, []).append(patch)
    joined = next(patches for patches in regions.values() if len(patches) > 1)
    seen = pixels(page)
    assert len({seen[patch] for patch in joined}) == 1
    assert state(page).startswith(f"{len(regions)} of 24 tokens are present")
    assert page.locator(".outline").first.get_attribute("d")
    frame = page.locator(".frame").first
    frame.focus()
    frame.press("Home")
    for key in ["ArrowDown"] * (joined[-1] // COLUMNS) + ["ArrowRight"] * (joined[-1] % COLUMNS):
        frame.press(key)
    group = page.locator(".group").first.get_attribute("d")
    assert len(group.split("z")) - 1 == len(joined)
    assert f"its token is {len(joined)} patches" in page.locator(".patch").first.inner_text()
    slide(page, 4)
    assert "24 of 24" not in state(page)
    assert page.locator(".outline").first.get_attribute("d") == ""
    assert page.locator(".group").first.get_attribute("d") == ""


@pytest.mark.parametrize(("width", "dark"), [(390, True), (1280, False)])
@pytest.mark.slow
def test_everyone_can_use_it(
    made: Made, open_page: Callable[..., Page], width: int, dark: bool
) -> None:
    opened = open_page(width, 844, dark=dark)
    page = opened.open(made.file)
    slide(page, 3)
    assert opened.serious() == []
    assert opened.sideways() == 0
    paper = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", paper))) < 200) == dark


@pytest.mark.slow
def test_on_paper_nothing_asks_to_be_clicked(made: Made, open_page: Callable[..., Page]) -> None:
    page = open_page().open(made.file)
    away = (
        "nav",
        "#layer",
        ".controls fieldset",
        ".patch",
        ".copying",
        ".gv-controls",
        ".gv-lanes",
    )
    assert all(page.locator(what).first.is_visible() for what in away)
    page.emulate_media(media="print")
    assert not [what for what in away if page.locator(what).first.is_visible()]
    assert page.locator("#layer-now").inner_text().startswith("after layer")
    assert page.locator(".frame").first.is_visible()


@pytest.mark.slow
def test_axe_sees_a_violation(made: Made, open_page: Callable[..., Page]) -> None:
    opened = open_page()
    opened.open(made.file).evaluate("document.querySelector('label[for=layer]').remove()")
    assert any("label" in found for found in opened.serious())


@pytest.mark.slow
def test_the_diff_is_copied_or_selected(made: Made, open_page: Callable[..., Page]) -> None:
    page = open_page().open(made.file)
    page.get_by_role("button", name="Copy the diff").click()
    page.locator("#copied:not(:empty)").wait_for()
    if page.locator("#copied").inner_text().startswith("Selected"):
        assert page.evaluate("String(getSelection())").startswith("--- VisionTransformer\n+++ ")
    else:
        assert page.locator("#copied").inner_text() == "Copied."


def test_markup_in_names_is_text(tmp_path: Path, open_page: Callable[..., Page]) -> None:
    fast, x = hostile()
    made = _made(
        tmp_path, fast, x, title="</title><script>alert(1)</script>", note="<!-- <b>note</b>"
    )
    opened = open_page()
    dialogs: list[str] = []
    opened.page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    page = opened.open(made.file)
    page.wait_for_selector("html[data-drawn=patches]")
    assert dialogs == []
    assert opened.complaints == []
    assert "</title><script>alert(1)</script>" in page.locator("h1").inner_text()
    assert page.locator("header .note").inner_text() == "<!-- <b>note</b>"
    assert "<script>alert(1)</script>" in page.locator(".answers").first.inner_text()
    assert "<script>alert(1)</script>" in page.locator("#diff").inner_text()
    assert page.locator('[title*="<script>alert(1)</script>"]').count() == 1


@pytest.mark.slow
def test_without_a_grid_there_is_a_strip_that_says_so(
    tmp_path: Path, open_page: Callable[..., Page]
) -> None:
    x = torch.rand(2, 3, 16, 16)
    fast = skipvit_fx.rewrite(Shuffled().eval(), "1(50%)+3", example_inputs=x, validate=False)
    page = open_page().open(_made(tmp_path, fast, x).file)
    assert (
        "It is not known where in the image each patch is" in page.locator("#images").inner_text()
    )
    assert page.locator(".alone").count() == 2
    assert page.locator(".frame img").count() == 0
    frame = page.locator(".frame").first
    frame.focus()
    frame.press("Home")
    assert page.locator(".patch").first.inner_text().startswith("Patch 0 (place not known)")
