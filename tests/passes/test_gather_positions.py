"""Tables with a row per position, under a drop."""

from __future__ import annotations

from skipvit_fx.passes.gather_positions import GatherPositionOperands
from support.tiny import Tiny, assert_documented, run_up_to


def test_as_documented() -> None:
    assert_documented(run_up_to(GatherPositionOperands, Tiny(positions=True)))


def test_a_later_stage_gathers_the_rows_of_its_survivors() -> None:
    ran = run_up_to(GatherPositionOperands, Tiny(positions=True), "1,2(25%,25%)+4")
    gathered = [line.partition(" = ")[2] for line in ran.after if ".gather_" in line]
    assert gathered == [
        "skipvit.stage_1.gather_1(blocks_1_table, stage_1_kept)",
        "skipvit.stage_2.gather_2(blocks_2_table, stage_2_positions)",
    ]


def test_without_positions_nothing_changes() -> None:
    assert run_up_to(GatherPositionOperands, Tiny()).events == ()
    assert run_up_to(GatherPositionOperands, Tiny(positions=True), "1(50%)+2").events == ()
