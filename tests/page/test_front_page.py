"""The report of a search: its file, and how it behaves in Chromium."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import skipvit_fx as sv
from skipvit_fx.page import front as front_module
from skipvit_fx.planner.profile import Profile, Sensitivity
from support.browser import Page
from support.report_models import SCRIPT
from support.tiny import Tiny

PLANS = {"1(50%)+3": 0.93, "": 1.0}
"""A front, with the qualities that a search might have found."""

GRID = 4


def images() -> Tensor:
    """Light, so that a dark patch is seen."""
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.3 + 0.6


def rewritten(model: nn.Module, *plans: str) -> dict[str, Any]:
    """The rewrite for each of these plans."""
    return {
        plan: sv.rewrite(model, plan, example_inputs=images(), validate=False) for plan in plans
    }


def found(fasts: dict[str, Any]) -> sv.SearchResult:
    """What a search might have returned: multiply-adds are true, qualities are not."""
    front = []
    for plan, fast in fasts.items():
        quality = PLANS[plan]
        front.append(
            sv.Candidate(
                sv.Plan.parse(plan),
                sv.inspect(fast).macs,
                quality,
                0.01,
                held_out=quality - 0.02,
                held_out_spread=0.02,
                milliseconds=2 + 3 * quality,
                method="SkipViT" if plan else "",
            )
        )
    other = replace(front[0], plan=sv.Plan.parse("3(25%)"), quality=0.95, method="EViT")
    stage = Sensitivity(2, 50, sv.Plan.parse("2(50%)+4"), front[0].macs, 0.9, 0.01)
    baseline = sv.inspect(fast).baseline_macs
    profile = Profile((stage, replace(stage, layer=1, quality=0.8)), baseline, "agreement")
    return sv.SearchResult(
        front=tuple(front),
        candidates=(*front, other),
        profile=profile,
        baseline_macs=baseline,
        baseline_milliseconds=6.0,
        model="Tiny",
        fingerprint="0123456789abcdef",
        metric="agreement",
        images=30,
        held_out_images=10,
        batch=8,
        device="cpu",
        budget=0.9,
        options={},
        seed=7,
        study="skipvit-Tiny-1",
        doubts="the model's class scores are nearly uniform",
        refused={3: "it is the last"},
    )


class Made(NamedTuple):
    """A page, and what it was made from."""

    file: Path
    model: nn.Module
    fasts: dict[str, Any]
    result: sv.SearchResult

    def data(self) -> Any:
        text = self.file.read_text(encoding="utf-8")
        return json.loads(re.findall(r'id="data">(.*?)</script>', text)[0])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    model = Tiny().eval()
    fasts, file = rewritten(model, *PLANS), tmp_path_factory.mktemp("made") / "front.html"
    result = found(fasts)
    done: list[tuple[int, int]] = []
    sv.report_search(result, model, images(), file, progress=lambda *now: done.append(now))
    assert done == [(1, 2), (2, 2)]
    return Made(file, model, fasts, result)


def test_what_is_drawn_is_the_trace_of_each_plan(made: Made) -> None:
    data = made.data()
    assert (data["map"]["rows"], data["map"]["columns"], data["map"]["known"]) == (4, 4, True)
    assert data["first"] == 1
    assert len(data["plans"]) == 2
    for fast, shown in zip(made.fasts.values(), data["plans"], strict=True):
        traces = sv.trace_tokens(fast, images())
        assert [stage["layer"] for stage in shown["stages"]] == [trace.layer for trace in traces]
        for sample, stages in enumerate(shown["images"]):
            for stage, trace in zip(stages, traces, strict=True):
                assert stage["dropped"] == trace.dropped[sample].tolist()
                wanted = trace.scores[sample].tolist()
                seen = [score for score in stage["scores"] if score is not None]
                assert seen == pytest.approx([s for s in wanted if s > -torch.inf], rel=1e-3)


def test_the_page_says_what_was_found(made: Made, open_page: Callable[..., Page]) -> None:
    text = " ".join(open_page().open(made.file).locator("body").inner_text().split())
    for said in (
        "Here the model's class scores are nearly uniform.",
        "30 + 10",
        "0.9 of the model's multiply-adds",
        "seed 7",
        "No stage at layer 3: it is the last.",
        "published: E EViT, S SkipViT",
        "validated each of them to time it",
        "0.9300 ± 0.0100 0.9100 ± 0.0200 4.79 1.25",
        "0.8000",
    ):
        assert said in text, said


def pixels(page: Any) -> list[int]:
    """How light each patch of the first image is near its middle."""
    shot = Image.open(io.BytesIO(page.locator(".frame").first.screenshot())).convert("L")
    wide, high = shot.width / GRID, shot.height / GRID
    places = (divmod(patch, GRID) for patch in range(GRID * GRID))
    return [int(shot.getpixel((int((x + 0.3) * wide), int((y + 0.3) * high)))) for y, x in places]


def test_a_plan_is_chosen_by_mouse_and_keyboard(made: Made, open_page: Callable[..., Page]) -> None:
    opened = open_page()
    page = opened.open(made.file)
    page.wait_for_selector("html[data-drawn=patches]")
    shown = page.locator("#chosen > div:visible")
    points = page.locator(".plot:visible .points button")
    assert points.count() == 2
    assert "(every token)" in shown.inner_text()
    assert not page.locator(".controls").is_visible()
    light = pixels(page)

    points.nth(0).click()
    page.wait_for_selector(".frame[data-away='8']")
    assert "1(50%)+3" in shown.inner_text()
    assert "In layer 1, 8 of 16 patches leave" in shown.inner_text()
    assert points.nth(0).get_attribute("aria-pressed") == "true"
    heard = points.nth(0).get_attribute("aria-label")
    assert heard.startswith("Plan 1(50%)+3, SkipViT, ")
    assert "quality 0.9300 ± 0.0100, held out 0.9100 ± 0.0200, 4.79 milliseconds" in heard
    gone = made.data()["plans"][0]["images"][0][0]["dropped"]
    page.mouse.move(0, 0)
    for patch, (now, before) in enumerate(zip(pixels(page), light, strict=True)):
        assert now < 0.6 * before if patch in gone else abs(now - before) < 12

    points.nth(0).press("ArrowRight")
    page.wait_for_selector(".frame[data-away='0']")
    assert "(every token)" in shown.inner_text()
    assert page.evaluate("document.activeElement.dataset.choose") == "1"
    assert page.locator(".thumb").count() == 0  # those of the plan before are gone
    assert not page.locator(".controls").is_visible()
    points.nth(1).press("Home")
    page.wait_for_selector(".frame[data-away='8']")
    assert page.locator(".frame canvas").count() == page.locator(".thumb").count() == 2
    slide = page.get_by_label("Tokens that are present")
    slide.press("End")
    assert page.locator(".state").first.inner_text().startswith("16 of 16 patches are present")
    points.nth(0).press("End")

    page.get_by_label("measured time").check()
    assert points.count() == 2
    page.locator("table.plans button").nth(0).click()
    assert "1(50%)+3" in shown.inner_text()
    assert points.nth(0).get_attribute("aria-pressed") == "true"
    page.get_by_role("button", name="Copy the plan").click()
    page.locator("#chosen .copying [role=status]:not(:empty)").wait_for()
    assert opened.complaints == []
    assert opened.requests == []


@pytest.mark.parametrize(("width", "dark"), [(390, True), (1280, False)])
@pytest.mark.slow
def test_everyone_can_use_it(
    made: Made, open_page: Callable[..., Page], width: int, dark: bool
) -> None:
    opened = open_page(width, 844, dark=dark)
    page = opened.open(made.file)
    page.locator("table.plans button").nth(0).click()
    page.wait_for_selector(".frame[data-away='8']")
    assert opened.serious() == []
    assert opened.sideways() == 0


def test_markup_in_names_is_text(
    made: Made, tmp_path: Path, open_page: Callable[..., Page], monkeypatch: pytest.MonkeyPatch
) -> None:
    fast, result = made.fasts["1(50%)+3"], replace(made.result, front=made.result.front[:1])
    labels = SimpleNamespace(num_labels=5, id2label=dict.fromkeys(range(5), SCRIPT))
    monkeypatch.setattr(fast, "config", labels, raising=False)
    monkeypatch.setattr(front_module, "rewrite", lambda *_, **__: fast)
    names = dict.fromkeys(("model", "metric", "study", "doubts", "device"), SCRIPT)
    result = replace(result, **names)  # type: ignore[arg-type]
    file = tmp_path / "front.html"
    sv.report_search(
        result, made.model, images(), file, title=f"</title>{SCRIPT}", note=f"<!--{SCRIPT}"
    )
    assert SCRIPT not in file.read_text(encoding="utf-8")
    opened = open_page()
    dialogs: list[str] = []
    opened.page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    page = opened.open(file)
    page.wait_for_selector("html[data-drawn=patches]")
    assert dialogs == []
    assert opened.complaints == []
    assert f"</title>{SCRIPT}" in page.locator("h1").inner_text()
    assert SCRIPT in page.locator(".answers").first.inner_text()


@pytest.mark.slow
def test_what_the_search_did_not_validate_is_validated(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def rewrite(*args: Any, **options: Any) -> Any:
        asked.append(options.get("validate", True))
        return made.fasts[""]

    monkeypatch.setattr(front_module, "rewrite", rewrite)
    one = replace(made.result.front[1], milliseconds=None)
    untimed = replace(made.result, front=(one,), baseline_milliseconds=None)
    sv.report_search(untimed, made.model, images(), tmp_path / "front.html")
    text = (tmp_path / "front.html").read_text(encoding="utf-8")
    assert "not validated again" not in text
    assert "measured time" not in text
    timed = replace(made.result, front=(made.result.front[1],))
    sv.report_search(timed, made.model, images(), tmp_path / "front.html")
    assert asked == [True, False]


def test_what_is_refused(made: Made, tmp_path: Path) -> None:
    result, model, out = made.result, made.model, tmp_path / "front.html"
    other = replace(result, front=(replace(result.front[1], macs=5),))
    for refused, images_, path, error, words in (
        (other, images(), out, sv.ReportError, "and had 5 in the search on a Tiny"),
        (replace(result, front=()), images(), out, sv.ReportError, "front of the search is empty"),
        (result, "cat.png", out, sv.ReportError, "names no image size"),
        (result, images(), tmp_path, sv.ReportError, "is a folder"),
        (model, images(), out, TypeError, "what search() returned, got Tiny"),
    ):
        with pytest.raises(error, match=re.escape(words)):
            sv.report_search(refused, model, images_, path)  # type: ignore[arg-type]
    with pytest.raises(sv.ReportError, match="no weights"):
        sv.report_search(result, Tiny().to("meta"), images(), out)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_twelve_plans_on_four_noisy_images_fit_into_five_megabytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise is the worst that a picture can hold, and 1024 patches are many."""
    large, file = Tiny(), tmp_path / "front.html"
    large.embed = nn.Conv2d(3, 8, 16, 16)
    x = torch.rand(4, 3, 512, 512)
    fast = sv.rewrite(large.eval(), "1,2(30%)+4", example_inputs=x, validate=False)
    monkeypatch.setattr(front_module, "rewrite", lambda *_, **__: fast)
    one = found({"1(50%)+3": fast}).front[0]
    result = replace(found({"1(50%)+3": fast}), front=(one,) * 12)
    sv.report_search(result, large, x, file)
    assert file.stat().st_size < 5e6
