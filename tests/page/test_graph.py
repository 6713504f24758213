"""The data of the drawn graph says what the graph is."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import skipvit_fx as sv
from skipvit_fx.graph.record import record_of
from skipvit_fx.page.graph import graph_data
from support.tiny import Tiny

X = torch.zeros(2, 3, 16, 16)
TOKENS, LEFT = 17, 9


@pytest.fixture(scope="module")
def fast() -> Any:
    model = Tiny(positions=True, sizes="read").eval()
    return sv.rewrite(model, "1(50%)+3", example_inputs=(X,), validate=False)


@pytest.fixture(scope="module")
def data(fast: Any) -> dict[str, Any]:
    return graph_data(fast)


def after(data: dict[str, Any]) -> list[dict[str, Any]]:
    """The graph after the last pass, by what the steps say."""
    graph = [dict(node) for node in data["before"]]
    for step in data["steps"]:
        for node in step["inserted"]:
            place = [other["name"] for other in graph].index(node["after"]) + 1
            graph.insert(place, {"name": node["name"], "reads": node["reads"]})
        for node in step["rewired"]:
            (there,) = (other for other in graph if other["name"] == node["name"])
            assert there["reads"] == node["before"]
            there["reads"] = node["reads"]
        graph = [node for node in graph if node["name"] not in step["erased"]]
    return graph


def test_it_is_plain(data: dict[str, Any]) -> None:
    assert json.loads(json.dumps(data)) == data


def test_what_was_counted_before_is_taken(fast: Any, data: dict[str, Any]) -> None:
    assert graph_data(fast, sv.inspect(fast)) == data


def test_the_steps_lead_from_one_graph_to_the_other(fast: Any, data: dict[str, Any]) -> None:
    found = [(node["name"], node["reads"]) for node in after(data)]
    wanted = [(n.name, [read.name for read in n.all_input_nodes]) for n in fast.graph.nodes]
    assert found == wanted
    names = [step["name"] for step in data["steps"]]
    assert names == [step.name for step in record_of(fast).passes]
    said = {step["name"]: step["about"] for step in data["steps"]}
    assert said["insert-skip"] == "Choose the patches that stay, and pass the others around."
    (skip,) = (step for step in data["steps"] if step["name"] == "insert-skip")
    assert {n["name"] for n in skip["inserted"]} >= {"stage_1_kept", "stage_1_bypassed"}
    assert {n["name"] for n in skip["rewired"]} == {"blocks_0_norm2", "add_1"}
    assert any(step["erased"] for step in data["steps"])


def test_every_node_is_in_its_layer(data: dict[str, Any]) -> None:
    groups = [group["name"] for group in data["groups"]]
    assert groups == ["before layer 1", "layer 1", "layer 2", "layer 3", "after layer 3"]
    for node in data["nodes"].values():
        if node["module_path"].startswith("blocks."):
            assert node["group"] == 1 + int(node["module_path"].split(".")[1])
    where = {name: node["group"] for name, node in data["nodes"].items()}
    assert (where["embed"], where["head"]) == (0, 4)
    assert where["stage_1_scores"] == where["stage_1_kept_tokens"] == 1
    assert where["stage_1_returned"] == 3
    there = {node["name"] for node in [*data["before"], *after(data)]}
    assert there <= set(data["nodes"])


def test_layers_have_their_tokens(data: dict[str, Any]) -> None:
    assert data["tokens"] == TOKENS
    assert [group["tokens"] for group in data["groups"][1:3]] == [
        {"attention": TOKENS, "ffn": LEFT},
        {"attention": LEFT, "ffn": LEFT},
    ]
    assert [(group["leave"], group["return"]) for group in data["groups"]] == [
        *((0, 0), (8, 0), (0, 0), (0, 8), (0, 0))
    ]
    assert all(g["macs"] <= g["macs_before"] for g in data["groups"])


def test_nodes_have_shapes_kinds_and_lines(data: dict[str, Any]) -> None:
    nodes = data["nodes"]
    norm = nodes["blocks_1_norm1"]
    assert norm == {
        "group": 2,
        "kind": "author",
        "label": "norm1",
        "op": "call_module",
        "target": "blocks.1.norm1",
        "module_path": "blocks.1.norm1",
        "source": {"place": norm["source"]["place"], "code": "h = self.norm1(x)"},
        "inserted_by": None,
        "shape": [1, LEFT, 8],
        "shape_before": [1, TOKENS, 8],
        "token_dims": [1],
        "macs": 0,
        "tensor": True,
    }
    assert norm["source"]["place"].startswith("support/tiny.py:")
    kept = nodes["stage_1_kept_tokens"]
    assert (kept["kind"], kept["inserted_by"]) == ("inserted", "insert-skip")
    assert (kept["shape"], kept["shape_before"]) == ([1, LEFT, 8], [1, TOKENS, 8])
    assert (kept["token_dims"], kept["source"], kept["module_path"]) == ([1], None, "")
    assert nodes["stage_1_returned"]["token_dims"] == [1]
    assert nodes["blocks_0_norm2"]["kind"] == "rewired"
    assert nodes["stage_1_bypassed"]["shape"] == [1, TOKENS - LEFT, 8]
    assert nodes["embed"]["token_dims"] == []
    assert not nodes["getitem"]["tensor"]


def test_the_same_rewrite_has_the_same_data(data: dict[str, Any]) -> None:
    model = Tiny(positions=True, sizes="read").eval()
    again = sv.rewrite(model, "1(50%)+3", example_inputs=(X,), validate=False)
    assert json.dumps(graph_data(again)) == json.dumps(data)


def test_a_plan_that_drops_nothing_changes_nothing() -> None:
    options = {"eliminate_dead_tokens": False, "validate": False}
    fast = sv.rewrite(Tiny().eval(), "", example_inputs=(X,), **options)
    data = graph_data(fast)
    assert not any(s["inserted"] or s["rewired"] or s["erased"] for s in data["steps"])
    assert {node["kind"] for node in data["nodes"].values()} == {"author"}


def test_any_other_module_is_refused() -> None:
    with pytest.raises(sv.SkipViTError, match=r"was not made by skipvit_fx\.rewrite"):
        graph_data(Tiny())
