"""Tokens leave the sequence."""

from __future__ import annotations

from skipvit_fx.passes.insert_skip import InsertSkip
from support.tiny import Tiny, assert_documented, run_up_to


def test_as_documented() -> None:
    assert_documented(run_up_to(InsertSkip, Tiny()))


def test_a_later_stage_knows_where_its_survivors_were() -> None:
    ran = run_up_to(InsertSkip, Tiny(), "1,2(25%,25%)+3")
    assert "stage_2_positions = skipvit.stage_2.positions(stage_1_kept, stage_2_kept)" in ran.after
    assert ran.context.skips[1].positions is ran.context.skips[1].kept
    assert ran.context.skips[2].positions.name == "stage_2_positions"


def test_nothing_is_bypassed_that_never_returns() -> None:
    ran = run_up_to(InsertSkip, Tiny(), "1(50%)")
    assert not any("bypassed" in line for line in ran.after)
    assert ran.context.skips[1].bypassed is None


def test_a_fused_token_stands_in_for_the_dropped() -> None:
    ran = run_up_to(InsertSkip, Tiny(), "1(50%)+fused")
    at = next(i for i, line in enumerate(ran.after) if line.startswith("stage_1_with_fused"))
    given = "stage_1_kept_tokens, stage_1_bypassed, stage_1_dropped, stage_1_scores"
    assert ran.after[at] == f"stage_1_with_fused = skipvit.stage_1.fuse({given})"
    assert ran.after[at + 1] == "blocks_0_norm2 = blocks.0.norm2(stage_1_with_fused)"


def test_without_a_drop_nothing_leaves() -> None:
    assert run_up_to(InsertSkip, Tiny(), "").events == ()
