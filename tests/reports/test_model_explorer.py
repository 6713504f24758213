"""What Model Explorer gets: the graph itself, in the form of its data classes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import skipvit_fx as sv
from skipvit_fx.reports.inspection_report import Inspection
from support.tiny import Tiny

X = torch.zeros(2, 3, 16, 16)

# The fields of its data classes, which its page reads.
COLLECTION = {"label", "graphs", "graphSorting"}
GRAPH = {
    *("id", "nodes", "groupNodeAttributes", "groupNodeConfigs", "nodeLabelsToHide"),
    *("tasksData", "layoutConfigs"),
}
NODE = {
    *("id", "label", "namespace", "subgraphIds", "attrs", "incomingEdges"),
    *("outputsMetadata", "inputsMetadata", "style", "config"),
}
EDGE = {"sourceNodeId", "sourceNodeOutputId", "targetNodeInputId"}
STYLE = {"backgroundColor", "borderColor", "hoveredBorderColor"}
DATA = {"results", "name", "thresholds", "gradient"}


@pytest.fixture(scope="module")
def fast() -> Any:
    return sv.rewrite(Tiny().eval(), "1(50%)+3", example_inputs=(X,), validate=False)


@pytest.fixture(scope="module")
def report(fast: Any) -> Inspection:
    return sv.inspect(fast)


@pytest.fixture(scope="module")
def nodes(report: Inspection) -> dict[str, Any]:
    return {node["id"]: node for node in report.to_model_explorer()["graphs"][0]["nodes"]}


def attributes(node: dict[str, Any]) -> dict[str, str]:
    return {pair["key"]: pair["value"] for pair in node["attrs"]}


def test_the_form(report: Inspection) -> None:
    collection = report.to_model_explorer()
    assert json.loads(json.dumps(collection)) == collection
    assert collection.keys() <= COLLECTION
    (graph,) = collection["graphs"]
    assert graph.keys() <= GRAPH
    for node in graph["nodes"]:
        assert node.keys() <= NODE
        assert all(edge.keys() <= EDGE for edge in node["incomingEdges"])
        assert node.get("style", {}).keys() <= STYLE
        assert all(set(pair) == {"key", "value"} for pair in node["attrs"])
        texts = [node["id"], node["label"], node["namespace"], *attributes(node).values()]
        assert all(isinstance(text, str) for text in texts)
    for values in graph["groupNodeAttributes"].values():
        assert all(isinstance(value, str) for value in values.values())


@pytest.mark.slow
def test_its_own_classes_take_it(report: Inspection) -> None:
    """Where it is installed; its types of node data leave out the texts that its page shows."""
    model_explorer = pytest.importorskip(
        "model_explorer", reason="ai-edge-model-explorer is not installed"
    )
    dacite = pytest.importorskip("dacite")
    graphs = model_explorer.graph_builder
    collection = report.to_model_explorer()
    made = dacite.from_dict(graphs.GraphCollection, collection, dacite.Config(strict=True))
    assert len(made.graphs[0].nodes) == len(report.nodes)


def test_it_is_the_graph(fast: Any, nodes: dict[str, Any]) -> None:
    assert list(nodes) == [node.name for node in fast.graph.nodes]
    for node in fast.graph.nodes:
        edges = nodes[node.name]["incomingEdges"]
        assert [e["sourceNodeId"] for e in edges] == [r.name for r in node.all_input_nodes]
        assert [e["targetNodeInputId"] for e in edges] == [str(i) for i in range(len(edges))]


def test_nodes_are_in_layers_and_modules(nodes: dict[str, Any]) -> None:
    places = {name: (node["namespace"], node["label"]) for name, node in nodes.items()}
    assert places["embed"] == ("before layer 1", "embed")
    assert places["blocks_1_norm1"] == ("layer 2/blocks/1", "norm1")
    assert places["scaled_dot_product_attention"][0] == "layer 1/blocks/0"
    assert places["stage_1_kept_tokens"] == ("layer 1/inserted", "stage_1_kept_tokens")
    assert places["stage_1_returned"] == ("layer 3/inserted", "stage_1_returned")
    assert places["head"] == ("after layer 3", "head")


def test_nodes_have_what_is_known_of_them(report: Inspection, nodes: dict[str, Any]) -> None:
    kept = attributes(nodes["stage_1_kept_tokens"])
    assert (kept["inserted by"], kept["tokens"], kept["shape"]) == ("insert-skip", "9", "1x9x8")
    assert kept["shape with skipping off"] == "1x17x8"
    norm = attributes(nodes["blocks_1_norm1"])
    assert norm["source line"].startswith("support/tiny.py:")
    assert norm["source line"].endswith(": h = self.norm1(x)")
    assert norm["module"] == "blocks.1.norm1"
    macs = sum(int(attributes(node)["multiply-adds"]) for node in nodes.values())
    assert macs == report.macs
    styled = {name for name, node in nodes.items() if "style" in node}
    assert styled == {node.name for node in report.inserted}


def test_groups_have_what_is_known_of_layers(report: Inspection) -> None:
    (graph,) = report.to_model_explorer()["graphs"]
    groups = graph["groupNodeAttributes"]
    assert groups[""]["plan"] == "1(50%)+3"
    assert groups["layer 1"]["tokens after the feed-forward network"] == "9"
    assert groups["layer 3"]["return"] == "8"


def test_node_data(report: Inspection, nodes: dict[str, Any]) -> None:
    found = report.model_explorer_data()
    assert json.loads(json.dumps(found)) == found
    assert list(found) == ["tokens", "multiply-adds", "inserted by"]
    (graph,) = report.to_model_explorer()["graphs"]
    for name, by_graph in found.items():
        ((graph_id, data),) = by_graph.items()
        assert graph_id == graph["id"]
        assert data["name"] == name
        assert data.keys() <= DATA
        assert data["results"].keys() <= nodes.keys()
    values = {name: next(iter(d.values()))["results"] for name, d in found.items()}
    assert values["tokens"]["blocks_1_norm1"] == {"value": 9}
    assert sum(v["value"] for v in values["multiply-adds"].values()) == report.macs
    assert values["inserted by"]["stage_1_kept"]["value"] == "insert-skip"


def test_a_file_is_written(report: Inspection, tmp_path: Path) -> None:
    written = report.to_model_explorer(tmp_path / "graph.json")
    assert json.loads((tmp_path / "graph.json").read_text(encoding="utf-8")) == written


def test_a_file_that_cannot_be_written(report: Inspection, tmp_path: Path) -> None:
    with pytest.raises(sv.ExportError, match="cannot write") as caught:
        report.to_model_explorer(tmp_path)
    assert "a folder that exists" in caught.value.hint
    assert not list(tmp_path.parent.glob(".*.part"))


def test_without_the_package(report: Inspection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "model_explorer", None)
    assert report.to_model_explorer()["graphs"]
