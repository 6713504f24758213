"""Rows that nothing reads are not computed."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from skipvit_fx.passes.eliminate_dead_tokens import EliminateDeadTokens
from support.tiny import Tiny, assert_documented, run_up_to


def by_queries(tokens: Tensor, *, queries: Tensor) -> Tensor:
    return queries.mean((1, 3))


def test_as_documented() -> None:
    assert_documented(run_up_to(EliminateDeadTokens, Tiny()))


def test_keys_and_values_stay_whole() -> None:
    ran = run_up_to(EliminateDeadTokens, Tiny(), "")
    assert "blocks_2_k = blocks.2.k(blocks_2_norm1)" in ran.after
    assert "blocks_2_v = blocks.2.v(blocks_2_norm1)" in ran.after
    names = {node.name for node in ran.context.narrow}
    assert {"blocks_2_q", "blocks_2_mlp", "norm"} <= names
    assert names.isdisjoint({"blocks_2_k", "blocks_2_v", "blocks_1_mlp"})


@pytest.mark.parametrize("score", ["received", by_queries])
def test_queries_that_score_are_not_left_out(score: Any) -> None:
    """In the last layer, where the head reads one row."""
    ran = run_up_to(EliminateDeadTokens, Tiny(), "3(50%)", score=score)
    names = {node.name for node in ran.context.narrow}
    assert "blocks_2_mlp" in names
    assert names.isdisjoint({"blocks_2_q", "blocks_2_k", "blocks_2_v"})


def test_tokens_that_nobody_reads_do_not_return() -> None:
    ran = run_up_to(EliminateDeadTokens, Tiny(), "1(50%)+4")
    assert not any("stage_1_returned" in line for line in ran.after if ".put_back" not in line)


def test_where_all_rows_are_read_nothing_changes() -> None:
    class Pooled(Tiny):
        def forward(self, x: Tensor) -> Tensor:
            return self.tokens(x).mean(1)

    ran = run_up_to(EliminateDeadTokens, Pooled(), "")
    assert ran.events == ()
    assert not ran.context.narrow


def test_what_is_found_on_an_edited_graph_is_not_kept_for_the_next_plan() -> None:
    """Without a plan no other pass asks what mixes tokens."""
    ran = run_up_to(EliminateDeadTokens, Tiny(), "")
    assert ran.context.narrow
    assert not ran.context.analysis.mixes
