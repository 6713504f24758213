"""The record knows the graph after each pass: what is replayed is what was there."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

import skipvit_fx as sv
from skipvit_fx.capture.opening import with_capture
from skipvit_fx.graph.record import NodeRecord, node_records, record_of
from skipvit_fx.options import Options
from skipvit_fx.passes import passes_for
from skipvit_fx.plan import Plan
from skipvit_fx.rewriting.context import start_rewrite
from skipvit_fx.rewriting.passes import run_passes
from support.tiny import Tiny

X = torch.zeros(2, 3, 16, 16)
CASES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "all": ({"hidden": 1, "positions": True, "sizes": "literal"}, "1(50%)+3", {"fill_taps": True}),
    "read": ({"sizes": "read"}, "1,2(25%,25%)+3", {}),
    "merged": ({}, "1-2(2)+3+merged", {}),
    "fused": ({}, "1(50%)+fused", {}),
    "spans": ({"positions": True}, "1(25%)+2;2(25%)+3", {}),
}


def seen(options: dict[str, Any], plan: str, chosen: dict[str, Any]) -> list[list[NodeRecord]]:
    """The graph before the first pass and after each, looked at between the passes."""

    def work(capture: Any) -> list[list[NodeRecord]]:
        context = start_rewrite(capture, Options(Plan.parse(plan), **chosen))
        graphs = [list(node_records(context.editor.graph))]
        for step in passes_for(context.options):
            run_passes([step], context)
            graphs.append(list(node_records(context.editor.graph)))
        return graphs

    return with_capture(Tiny(**options).eval(), (X,), {}, work)


def placed(nodes: Any) -> list[NodeRecord]:
    """Without the neighbour, which later passes may change."""
    return [node._replace(after="") for node in nodes]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
def test_each_graph_is_replayed(case: str) -> None:
    options, plan, chosen = CASES[case]
    fast = sv.rewrite(Tiny(**options).eval(), plan, example_inputs=(X,), validate=False, **chosen)
    record = record_of(fast)
    graphs = list(map(placed, record.graphs()))
    assert graphs == list(map(placed, seen(options, plan, chosen)))
    assert graphs[-1] == placed(node_records(fast.graph))
    assert len({len(graph) for graph in graphs}) > 2, "the example shows little"
    for copied in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert list(map(placed, record_of(copied).graphs())) == graphs


def test_it_is_small() -> None:
    """Much smaller than the lines of the diff would be for every pass."""
    fast = sv.rewrite(Tiny().eval(), "1(50%)+3", example_inputs=(X,), validate=False)
    record = record_of(fast)
    changed = sum(len(step.nodes) for step in record.passes)
    assert changed < len(record.nodes) / 2
    assert len(pickle.dumps((record.nodes, record.passes))) < 200 * len(record.nodes)


def test_another_graph_knows_its_own_modules() -> None:
    fast = sv.rewrite(Tiny().eval(), "1(50%)+3", example_inputs=(X,))
    fast.double()(torch.rand(2, 3, 16, 16, dtype=torch.float64))
    second = fast.own.calls[1]
    *_, last = second.record.graphs()
    assert placed(last) == placed(node_records(second.graph))
    called = {node.target for node in last if node.inserted_by and node.op == "call_module"}
    assert "skipvit.call_2.stage_1.keep" in called


@pytest.mark.slow
def test_it_comes_back_with_a_saved_file(tmp_path: Any) -> None:
    fast = sv.rewrite(Tiny().eval(), "1(50%)+3", example_inputs=(X,))
    sv.save(fast, tmp_path / "fast.safetensors")
    again = sv.load(tmp_path / "fast.safetensors", Tiny())
    assert list(record_of(again).graphs()) == list(record_of(fast).graphs())
