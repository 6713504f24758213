"""`skipvit view`: the graph in Model Explorer, or the files that it reads."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from skipvit_fx.cli.app import app
from support.commands import share_rewrites

ASKED = ["vit_tiny_patch16_224", "1(30%)+3", "--img-size", "64", "--depth", "3", "--no-validate"]
FILES = ["", ".inserted-by", ".multiply-adds", ".tokens"]


@pytest.fixture(autouse=True)
def _shared(monkeypatch: pytest.MonkeyPatch) -> None:
    share_rewrites(monkeypatch)


def view(*args: str) -> Result:
    return CliRunner().invoke(app, ["view", *ASKED, *args])


class Explorer(ModuleType):
    """Stands in for Model Explorer: reads what it is told to show."""

    def __init__(self) -> None:
        super().__init__("model_explorer")
        self.shown: list[Any] = []

    def config(self) -> Explorer:
        return self

    def add_model_from_path(self, path: str) -> Explorer:
        self.shown.append(json.loads(Path(path).read_text(encoding="utf-8")))
        return self

    add_node_data_from_path = add_model_from_path

    def visualize_from_config(self, config: Any) -> None:
        assert config is self
        self.shown.append("opened")


@pytest.mark.slow
def test_it_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    explorer = Explorer()
    monkeypatch.setitem(sys.modules, "model_explorer", explorer)
    result = view()
    assert result.exit_code == 0, result.output
    graph, *data, opened = explorer.shown
    assert graph["graphs"][0]["id"] == "VisionTransformer with 1(30%)+3"
    assert [next(iter(d.values()))["name"] for d in data] == [
        "tokens",
        "multiply-adds",
        "inserted by",
    ]
    assert opened == "opened"


def test_without_the_package_nothing_is_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "model_explorer", None)
    result = view()
    assert result.exit_code == 2
    assert "ai-edge-model-explorer" in result.output
    assert "pip install 'skipvit_fx[view]'" in result.output
    assert "--out" in result.output
    assert "random weights" not in result.output


def test_files_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "model_explorer", None)  # not needed for that
    result = view("--out", str(tmp_path / "graph.json"))
    assert result.exit_code == 0, result.output
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(
        f"graph{kind}.json" for kind in FILES
    )
    graph = json.loads((tmp_path / "graph.json").read_text(encoding="utf-8"))
    tokens = json.loads((tmp_path / "graph.tokens.json").read_text(encoding="utf-8"))
    assert list(tokens) == [graph["graphs"][0]["id"]]


def test_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "model_explorer", None)
    result = view("--json")
    assert result.exit_code == 0, result.output
    (graph,) = json.loads(result.stdout)["graphs"]
    assert "stage_1_kept" in [node["id"] for node in graph["nodes"]]


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    result = view("--out", str(tmp_path / "missing" / "graph.json"))
    assert result.exit_code == 2
    assert "cannot write" in result.output
    assert "graph.json" in result.output.replace("\n", "")
