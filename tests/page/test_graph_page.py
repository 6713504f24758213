"""The graph as a browser draws it: asserted on what is in the page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import skipvit_fx as sv
from skipvit_fx.page.graph import graph_data
from support.browser import Page
from support.graph_page import write_page
from support.tiny import DIM, Tiny

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>"
X = torch.zeros(2, 3, 16, 16)
LAYER_1, LAYER_3 = 1, 3


class Hostile(Tiny):
    """A module of it has a name that would be markup."""

    def __init__(self) -> None:
        super().__init__(positions=True, sizes="read")
        self.add_module(EVIL, nn.Linear(DIM, DIM))

    def forward(self, x: Tensor) -> Any:
        return self.head(self.norm(self.get_submodule(EVIL)(self.tokens(x)))[:, 0])


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    return graph_data(sv.rewrite(Hostile().eval(), "1(50%)+3", example_inputs=(X,), validate=False))


@pytest.fixture(scope="module")
def file(data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(data, tmp_path_factory.mktemp("graph") / "graph.html")


@pytest.fixture
def opened(file: Path, open_page: Callable[..., Page]) -> Any:
    """The page at desktop width; afterwards, it has neither complained nor asked for anything."""
    page = open_page()
    yield page.open(file)
    assert page.complaints == []
    assert page.requests == []


def head(page: Any, layer: int, side: str = "after") -> Any:
    return page.locator(f".gv-{side}[data-group='{layer}'] .gv-head")


def nodes(page: Any, layer: int, side: str = "after", kind: str = "") -> set[str]:
    """Names of the nodes that are drawn."""
    found = page.locator(f".gv-{side}[data-group='{layer}'] .gv-node{kind}")
    return {box.get_attribute("data-name") for box in found.all()}


def step(page: Any, name: str) -> None:
    page.locator(".gv-step", has_text=name).click()


def test_layers_are_boxes_before_and_after(opened: Any, data: dict[str, Any]) -> None:
    for side in ("before", "after"):
        names = opened.locator(f".gv-{side} .gv-name").all_inner_texts()
        assert names == [group["name"] for group in data["groups"]]
    assert opened.locator(".gv-node").count() == 0
    said = head(opened, LAYER_1).inner_text()
    assert "17 → 9 tokens" in said
    assert "8 leave" in said
    assert "17 tokens" in head(opened, LAYER_1, "before").inner_text()
    assert "8 return" in head(opened, LAYER_3).inner_text()
    passing = opened.locator(".gv-lanes-after .gv-edge-inserted").count()
    assert passing > 0
    assert opened.locator(".gv-lanes-before .gv-edge-inserted").count() == 0


@pytest.mark.slow
def test_a_layer_opens_and_closes(opened: Any, data: dict[str, Any]) -> None:
    button = head(opened, LAYER_1)
    assert button.get_attribute("aria-expanded") == "false"
    button.click()
    assert button.get_attribute("aria-expanded") == "true"
    there = {n: d for n, d in data["nodes"].items() if d["group"] == LAYER_1}
    erased = {name for s in data["steps"] for name in s["erased"]}
    wanted = {n for n, d in there.items() if d["tensor"] or d["kind"] != "author"} - erased
    assert nodes(opened, LAYER_1) == wanted
    written = {node["name"] for node in data["before"]}
    authors = nodes(opened, LAYER_1, "before")
    assert authors == {n for n in there if n in written and (n in wanted or there[n]["tensor"])}
    assert nodes(opened, LAYER_1, kind=".gv-is-inserted") == wanted - written
    opened.locator(".gv-sizes").check()
    assert nodes(opened, LAYER_1, "before") == there.keys() & written
    button.click()
    assert nodes(opened, LAYER_1) == set()


def test_steps_change_what_is_drawn(opened: Any, data: dict[str, Any]) -> None:
    head(opened, LAYER_1).click()
    step(opened, "as written")
    before = nodes(opened, LAYER_1)
    assert before == nodes(opened, LAYER_1, "before")
    assert opened.locator(".gv-is-inserted.gv-node").count() == 0
    step(opened, "insert-score")
    assert nodes(opened, LAYER_1) - before == {"stage_1_scores"}
    opened.locator("button", has_text="next pass").click()
    assert opened.locator(".gv-step[aria-current]").inner_text() == "insert-skip"
    (done,) = (s for s in data["steps"] if s["name"] == "insert-skip")
    inserted = {node["name"] for node in done["inserted"]}
    assert nodes(opened, LAYER_1) - before == inserted | {"stage_1_scores"}
    assert nodes(opened, LAYER_1, kind=".gv-now.gv-is-inserted") == inserted
    rewired = {node["name"] for node in done["rewired"]}
    assert nodes(opened, LAYER_1, kind=".gv-now.gv-is-rewired") == rewired
    assert nodes(opened, LAYER_1, "before", ".gv-now.gv-is-rewired") == rewired
    said = opened.locator(".gv-said").inner_text()
    assert said.startswith("insert-skip: Choose the patches that stay")
    assert f"{len(inserted)} inserted, {len(rewired)} rewired, 0 erased" in said
    listed = opened.locator(".gv-change.gv-is-rewired").inner_text()
    assert "blocks_0_norm2 reads stage_1_kept_tokens instead of add" in listed


@pytest.mark.slow
def test_what_a_pass_erases_is_shown_once_more(opened: Any, data: dict[str, Any]) -> None:
    opened.locator(".gv-sizes").check()
    step(opened, "erase-dead")
    (last,) = (s for s in data["steps"] if s["name"] == "erase-dead")
    layers = {data["nodes"][name]["group"] for name in last["erased"]}
    for layer in layers:
        if head(opened, layer).get_attribute("aria-expanded") == "false":
            head(opened, layer).click()
    shown = set().union(*(nodes(opened, layer, kind=".gv-is-erased") for layer in layers))
    assert shown == set(last["erased"]) != set()
    step(opened, "result")
    assert not any(nodes(opened, layer) & shown for layer in layers)


@pytest.mark.slow
def test_a_step_opens_what_it_changed(opened: Any) -> None:
    step(opened, "insert-return")
    assert "stage_1_returned" in nodes(opened, LAYER_3)


def test_steps_by_keyboard(opened: Any) -> None:
    current = opened.locator(".gv-step[aria-current]")
    opened.locator(".gv-step").last.focus()
    opened.keyboard.press("Home")
    assert current.inner_text() == "as written"
    assert opened.locator("button", has_text="previous pass").is_disabled()
    opened.keyboard.press("ArrowRight")
    assert current.inner_text() == opened.locator(".gv-step").nth(1).inner_text()
    opened.keyboard.press("End")
    assert current.inner_text() == "result"
    opened.keyboard.press("ArrowLeft")
    assert current.inner_text() == "erase-dead"


@pytest.mark.slow
def test_search_finds(opened: Any, data: dict[str, Any]) -> None:
    search = opened.get_by_label("search")
    search.fill("KEPT")
    found = opened.locator(".gv-found button").all_inner_texts()
    assert found == [name for name in data["nodes"] if "kept" in name]
    assert opened.locator(".gv-search .gv-count").inner_text() == f"{len(found)} found"
    assert f"{len(found)} found" in head(opened, LAYER_1).inner_text()
    search.press("Enter")
    assert opened.locator(".gv-panel h3").inner_text() == found[0]
    assert nodes(opened, LAYER_1, kind="[aria-pressed=true]") == {found[0]}
    search.fill("blocks.2.mlp")
    assert opened.locator(".gv-found button").all_inner_texts() == ["blocks_2_mlp"]
    search.fill("no such node")
    assert opened.locator(".gv-search .gv-count").inner_text() == "0 found"
    search.press("Escape")
    assert opened.locator(".gv-found").is_hidden()


def test_a_node_says_what_it_is(opened: Any, data: dict[str, Any]) -> None:
    head(opened, LAYER_1).click()
    box = opened.locator(".gv-after .gv-node[data-name=blocks_0_norm2]")
    box.click()
    panel = opened.locator(".gv-panel")
    said = dict(
        zip(
            panel.locator("dt").all_inner_texts(),
            panel.locator("dd").all_inner_texts(),
            strict=True,
        )
    )
    node = data["nodes"]["blocks_0_norm2"]
    assert said["shape"].replace("\u00d7", "x").startswith("1x9x8\nwith skipping off 1x17x8")
    assert "tokens along axis 1: 9" in said["shape"]
    assert said["source line"] == f"{node['source']['place']}\nreturn x + self.mlp(self.norm2(x))"
    assert said["module"] == "blocks.0.norm2"
    assert said["passes"] == "rewired by insert-skip"
    assert said["reads now"] == "stage_1_kept_tokens"
    assert said["read before"] == "add"
    assert said["read by"] == "blocks_0_mlp"
    assert box.locator("b").inner_text() == "9"
    panel.get_by_role("button", name="stage_1_kept_tokens").click()
    assert panel.locator("h3").inner_text() == "stage_1_kept_tokens"
    assert "insert-skip" in panel.inner_text()
    panel.get_by_role("button", name="close").click()
    assert panel.locator("h3").inner_text() == "No node is chosen"


@pytest.mark.slow
def test_nodes_by_keyboard(opened: Any) -> None:
    head(opened, LAYER_1).focus()
    opened.keyboard.press("Enter")
    opened.keyboard.press("Tab")
    first = opened.evaluate("document.activeElement.dataset.name")
    opened.keyboard.press("ArrowDown")
    second = opened.evaluate("document.activeElement.dataset.name")
    assert first != second
    opened.keyboard.press("Enter")
    assert opened.locator(".gv-panel h3").inner_text() == second
    assert opened.evaluate("document.activeElement.className").startswith("gv-panel")
    opened.keyboard.press("Escape")
    assert opened.evaluate("document.activeElement.dataset.name") == second


@pytest.mark.slow
def test_one_side_alone(opened: Any) -> None:
    opened.get_by_label("as written", exact=True).check()
    assert head(opened, LAYER_1).is_hidden()
    assert head(opened, LAYER_1, "before").is_visible()
    opened.get_by_label("search").fill("stage_1_scores")
    opened.get_by_label("search").press("Enter")
    assert opened.locator(".gv-node[data-name=stage_1_scores]").is_visible()


def test_data_is_text(opened: Any, data: dict[str, Any]) -> None:
    """A module path that is markup is shown as it is."""
    opened.evaluate("(() => { window.alert = () => { window.alerted = true } })()")
    (name,) = (n for n, d in data["nodes"].items() if d["target"] == EVIL)
    opened.get_by_label("search").fill(EVIL)
    assert EVIL in opened.locator(".gv-found").inner_text()
    opened.get_by_label("search").press("Enter")
    assert opened.locator(".gv-panel h3").inner_text() == name
    assert EVIL in opened.locator(".gv-panel").inner_text()
    assert opened.locator(f".gv-after .gv-node[data-name={name}]").is_visible()
    assert opened.locator("#graph script, #graph img").count() == 0
    assert opened.evaluate("window.alerted") is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "dark"), [(1280, False), (1280, True), (390, False)], ids=["light", "dark", "phone"]
)
def test_it_is_accessible(
    width: int, dark: bool, file: Path, open_page: Callable[..., Page]
) -> None:
    page = open_page(width, dark=dark)
    browser = page.open(file)
    assert page.serious() == []
    step(browser, "insert-skip")
    browser.get_by_label("search").fill("stage_1")
    browser.get_by_label("search").press("Enter")
    assert browser.locator(".gv-node").count() > 0
    assert page.serious() == []


@pytest.mark.slow
def test_it_fits_a_phone(file: Path, open_page: Callable[..., Page]) -> None:
    opened = open_page(390, 844)
    browser = opened.open(file)
    head(browser, LAYER_1).click()
    assert opened.sideways() == 0
    assert head(browser, LAYER_1, "before").is_hidden()
