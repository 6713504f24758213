"""Tokens return."""

from __future__ import annotations

from skipvit_fx.passes.insert_return import InsertReturn
from support.tiny import Tiny, assert_documented, run_up_to


def test_as_documented() -> None:
    assert_documented(run_up_to(InsertReturn, Tiny()))


def test_the_last_to_leave_is_the_first_to_return() -> None:
    ran = run_up_to(InsertReturn, Tiny(), "1,2(25%,25%)+3")
    at = next(i for i, line in enumerate(ran.after) if ".put_back" in line)
    second, first = ran.after[at : at + 2]
    assert second.startswith("stage_2_returned = skipvit.stage_2.put_back(add_3, stage_2_bypassed")
    assert first.startswith("stage_1_returned = skipvit.stage_1.put_back(stage_2_returned, stage_1")


def test_before_the_final_norm() -> None:
    ran = run_up_to(InsertReturn, Tiny(), "1(50%)+4")
    assert "norm = norm(stage_1_returned)" in ran.after


def test_where_cut_and_return_are_one_node() -> None:
    ran = run_up_to(InsertReturn, Tiny(), "1(50%)+2", cut="block")
    assert (
        "stage_1_returned = skipvit.stage_1.put_back(stage_1_kept_tokens, stage_1_bypassed, "
        in " ".join(ran.after)
    )


def test_without_a_return_nothing_changes() -> None:
    assert run_up_to(InsertReturn, Tiny(), "1(50%)").events == ()
    assert run_up_to(InsertReturn, Tiny(), "").events == ()
