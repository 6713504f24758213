"""What `inspect` says about a rewrite: numbers, table, diff, graph."""

from __future__ import annotations

import copy
import json
from typing import Any

import networkx as nx
import pytest
import torch
from torch import nn

import skipvit_fx
from skipvit_fx.graph.record import graph_lines, record_of
from skipvit_fx.reports.inspection_report import Inspection
from support.checks import fast_vit_small
from support.models import BY_NAME

GIGA = 1e9


@pytest.fixture(scope="module")
def fast() -> Any:
    return fast_vit_small()


@pytest.fixture(scope="module")
def report(fast: Any) -> Inspection:
    return skipvit_fx.inspect(fast)


def tokens(report: Inspection) -> list[tuple[int, int, int]]:
    return [(x.attention_tokens, x.queries, x.ffn_tokens) for x in report.layers]


def small(plan: str, name: str = "vit", depth: int = 4, **options: Any) -> Inspection:
    family = BY_NAME[name]
    model, example = family.build(depth=depth), family.input()
    return skipvit_fx.inspect(skipvit_fx.rewrite(model, plan, example_inputs=example, **options))


def test_tokens_per_layer(report: Inspection) -> None:
    full = (197, 197, 197)
    assert tokens(report) == [
        *[full] * 5,
        (197, 197, 90),
        *[(90, 90, 90)] * 4,
        full,
        (197, 1, 1),
    ]
    assert [layer.dropped for layer in report.layers] == [0] * 5 + [107] + [0] * 6
    assert [layer.returned for layer in report.layers] == [0] * 10 + [107, 0]
    assert [layer.module_path for layer in report.layers] == [f"blocks.{i}.attn" for i in range(12)]
    assert (report.prefix, report.patches, report.tail) == (1, 196, 0)


def test_macs(report: Inspection) -> None:
    assert round(report.macs / GIGA, 3) == 3.331
    assert round(report.baseline_macs / GIGA, 4) == 4.5989
    parts = [*report.layers, report.embedding, report.head]
    assert sum(part.macs for part in parts) == report.macs
    assert sum(part.baseline_macs for part in parts) == report.baseline_macs
    assert len({layer.baseline_macs for layer in report.layers}) == 1
    assert sum(node.macs for node in report.nodes) == report.macs


@pytest.mark.slow
def test_two_stages_and_a_return_before_the_norm() -> None:
    two = small("1,3(30%,40%)+5", eliminate_dead_tokens=False)
    # 24 patches: 7 leave, then 6 of 17
    assert tokens(two) == [(25, 25, 18), (18, 18, 18), (18, 18, 12), (12, 12, 12)]
    assert [layer.dropped for layer in two.layers] == [7, 0, 6, 0]
    assert [layer.returned for layer in two.layers] == [0] * 4
    assert two.head.returned == 13


def test_what_nobody_reads_does_not_return() -> None:
    assert small("1(50%)+3", depth=2).head.returned == 0


@pytest.mark.slow
def test_block_cut() -> None:
    block = small("2(50%)+4", cut="block", eliminate_dead_tokens=False)
    assert tokens(block) == [(25, 25, 25), (25, 25, 25), (13, 13, 13), (25, 25, 25)]
    assert [layer.dropped for layer in block.layers] == [0, 12, 0, 0]


@pytest.mark.slow
def test_fused_token_is_a_row() -> None:
    fused = small("1,2(50%,50%)+4+fused", eliminate_dead_tokens=False)
    # 24 patches: 12 stay and one stands in, of these 13 again 7 and one
    assert tokens(fused) == [(25, 25, 14), (14, 14, 9), (9, 9, 9), (25, 25, 25)]
    assert fused.layers[3].returned == 25 - 9


@pytest.mark.parametrize(
    "name", ["vit-unfused", "parallel-scaling", "beit-unfused", "relpos-unfused", "cait", "eva-gqa"]
)
@pytest.mark.slow
def test_other_attentions(name: str) -> None:
    other = small("2(50%)+4", name, eliminate_dead_tokens=False)
    full = other.prefix + other.patches
    short = other.prefix + other.patches // 2
    parallel = name.startswith("parallel")  # the cut comes after the FFN
    assert tokens(other) == [
        (full, full, full),
        (full, full, full if parallel else short),
        (short, short, short),
        (full, full, full),
    ]


def test_nothing_dropped() -> None:
    none = small("1(0%)+2", depth=2)
    assert tokens(none) == [(25, 25, 25)] * 2
    assert none.macs - none.baseline_macs == 25 * 64  # the score alone
    assert all(layer.dropped == layer.returned == 0 for layer in none.layers)


def test_empty_plan() -> None:
    report = small("", depth=2, eliminate_dead_tokens=False)
    assert report.macs == report.baseline_macs
    assert report.inserted == ()
    assert report.diff() == ""
    assert "an empty plan" in str(report)


def test_table(report: Inspection) -> None:
    lines = str(report).splitlines()
    assert lines[0] == "VisionTransformer with plan 6(55%)+11, cut after the attention, score auto"
    assert lines[1].startswith("1 prefix + 196 patch tokens;")
    assert lines[2] == "class token: row 0: read by the head"
    assert (
        "layer 6: leave after blocks.5.attn, before blocks.5.norm2; return before blocks.10"
        in lines
    )
    sixth = next(line for line in lines if "blocks.5.attn" in line)
    assert " ".join(sixth.split()) == "6 blocks.5.attn 197 197 90 0.2522 0.3784 107 leave"
    assert "107 return" in next(line for line in lines if "blocks.10.attn" in line)
    total = next(line for line in lines if line.strip().startswith("total"))
    assert total.split() == ["total", "3.3313", "4.5989", "72.4%"]
    assert not any(line != line.rstrip() for line in lines)
    where = next(line for line in lines if "skipvit.stage_1.put_back" in line)
    assert "layer 11" in where
    assert "insert-return" in where
    assert "add_20" in where


@pytest.mark.slow
def test_switched_off_is_said_and_counted_as_on(fast: Any, report: Inspection) -> None:
    skipvit_fx.set_skipping(fast, False)
    try:
        off = skipvit_fx.inspect(fast)
    finally:
        skipvit_fx.set_skipping(fast, True)
    assert not off.skipping
    assert report.skipping
    assert "switched off" in str(off)
    assert "switched off" not in str(report)
    assert (off.layers, off.macs) == (report.layers, report.macs)


def test_dict_is_plain(report: Inspection) -> None:
    plain = report.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert list(plain) == [
        *("model", "plan", "cut", "score", "frontend", "frontend_reason"),
        *("eliminate_dead_tokens", "skipping", "validated"),
        *("prefix", "patches", "tail", "class_token", "stages"),
        *("layers", "embedding", "head", "macs", "baseline_macs", "search", "inserted"),
    ]
    assert plain["class_token"] == "row 0: read by the head"
    assert plain["stages"] == [
        {
            "layer": 6,
            "leave_after": "blocks.5.attn",
            "leave_before": "blocks.5.norm2",
            "return_before": "blocks.10",
        }
    ]
    assert plain["layers"][5] == {
        "index": 6,
        "module_path": "blocks.5.attn",
        "attention_tokens": 197,
        "queries": 197,
        "ffn_tokens": 90,
        "dropped": 107,
        "returned": 0,
        "macs": report.layers[5].macs,
        "baseline_macs": report.layers[5].baseline_macs,
        "bytes": report.layers[5].bytes,
        "baseline_bytes": report.layers[5].baseline_bytes,
    }


@pytest.mark.slow
def test_the_same_rewrite_has_the_same_report() -> None:
    one, other = small("1(50%)+2", depth=2), small("1(50%)+2", depth=2)
    assert one == other
    assert one.to_dict() == other.to_dict()


def test_diff(fast: Any, report: Inspection) -> None:
    lines = report.diff().splitlines()
    assert lines[:2] == ["--- VisionTransformer", "+++ VisionTransformer with 6(55%)+11"]
    added = [line[1:] for line in lines[2:] if line.startswith("+")]
    assert any(
        line.startswith("stage_1_kept_tokens = call_module skipvit.stage_1.keep(add_11, ")
        and line.endswith("  # insert-skip")
        for line in added
    )
    assert all("  # " in line for line in added), "every change has a pass behind it"
    bare = {line.split("  # ")[0] for line in added}
    assert bare == set(graph_lines(fast.graph)) - set(record_of(fast).before)
    removed = {line[1:].split("  # ")[0] for line in lines[2:] if line.startswith("-")}
    assert removed == set(record_of(fast).before) - set(graph_lines(fast.graph))


def test_every_inserted_node_has_its_pass(report: Inspection) -> None:
    passes = {node.target: (node.inserted_by, node.layer) for node in report.inserted}
    assert passes["skipvit.stage_1.score"] == ("insert-score", 6)
    assert passes["skipvit.stage_1.select"] == ("insert-skip", 6)
    assert passes["skipvit.stage_1.keep"] == ("insert-skip", 6)
    assert passes["skipvit.stage_1.put_back"] == ("insert-return", 11)
    for node in report.nodes:
        if node.target.startswith("skipvit.") and node.target != "skipvit.fixed_x":
            assert node.inserted_by is not None, node


def test_networkx(fast: Any, report: Inspection) -> None:
    graph = report.to_networkx()
    assert list(graph) == [node.name for node in fast.graph.nodes]
    assert nx.is_directed_acyclic_graph(graph)
    for node in fast.graph.nodes:
        assert set(graph.predecessors(node.name)) == {n.name for n in node.all_input_nodes}
    assert graph.nodes["stage_1_kept_tokens"] == {
        "op": "call_module",
        "target": "skipvit.stage_1.keep",
        "inserted_by": "insert-skip",
        "layer": 6,
        "shape": (1, 90, 384),
        "macs": 0,
    }
    assert graph.nodes["blocks_6_mlp"]["inserted_by"] is None
    assert graph.nodes["blocks_6_mlp"]["shape"] == (1, 90, 384)
    assert graph.nodes["patch_embed"]["layer"] == 0
    assert graph.nodes["head"]["layer"] == 13
    assert graph.nodes["stage_1_choice"]["shape"] == ((1, 89), (1, 107))
    assert all({"shape", "layer"} <= set(graph.nodes[name]) for name in graph)


def test_the_module_is_left_alone(fast: Any) -> None:
    lines = graph_lines(fast.graph)
    skipvit_fx.inspect(fast)
    assert graph_lines(fast.graph) == lines
    assert all(type(p) is nn.Parameter for p in fast.parameters())
    assert not any(m._forward_hooks for m in fast.modules())


@pytest.mark.slow
def test_a_copy_can_be_inspected(fast: Any, report: Inspection) -> None:
    assert skipvit_fx.inspect(copy.deepcopy(fast)) == report


@pytest.mark.parametrize("other", ["model", "graph", "no module"])
def test_what_was_not_rewritten_is_refused(other: str) -> None:
    given: Any = {
        "model": BY_NAME["vit"].build(),
        "graph": torch.fx.symbolic_trace(nn.Linear(2, 2)),
        "no module": None,
    }[other]
    with pytest.raises(skipvit_fx.NotRewrittenError, match=r"not made by skipvit_fx\.rewrite") as e:
        skipvit_fx.inspect(given)
    assert "rewrite(model, plan)" in e.value.hint
