"""Who reads the stream under a drop, off the way to the return, gets all tokens."""

from __future__ import annotations

from skipvit_fx.passes.fill_taps import FillTaps
from support.tiny import Tiny, assert_documented, run_up_to


def test_as_documented() -> None:
    assert_documented(run_up_to(FillTaps, Tiny(hidden=1), fill_taps=True))


def test_tokens_are_put_back_for_every_drop_that_the_tapped_node_is_under() -> None:
    ran = run_up_to(FillTaps, Tiny(hidden=2), "1,2(25%,25%)+4", fill_taps=True)
    second, first = (line for line in ran.after if ".tap_" in line)
    assert second.startswith("stage_2_tap_1 = skipvit.stage_2.tap_1(add_3, stage_2_bypassed")
    assert first.startswith("stage_1_tap_1 = skipvit.stage_1.tap_1(stage_2_tap_1, stage_1_bypassed")
    assert ran.after[-1] == "return [head, stage_1_tap_1]"


def test_without_taps_nothing_changes() -> None:
    assert run_up_to(FillTaps, Tiny(), fill_taps=True).events == ()
    assert run_up_to(FillTaps, Tiny(hidden=1), "2(50%)+3", fill_taps=True).events == ()
