"""The sizes of merged tokens count in attention."""

from __future__ import annotations

import pytest

from skipvit_fx.passes.weigh_keys import WeighKeys
from support.tiny import Tiny, assert_documented, run_up_to


def test_as_documented() -> None:
    assert_documented(run_up_to(WeighKeys, Tiny(), "1(50%)+3+merged"))


def test_layers_that_are_alike_share_what_is_added() -> None:
    ran = run_up_to(WeighKeys, Tiny(), "1(50%)+merged")
    assert sum("log_sizes_" in line for line in ran.after) == 1
    assert sum(line.endswith("stage_1_log_sizes)") for line in ran.after) == 2


def test_each_stage_has_its_own_sizes() -> None:
    ran = run_up_to(WeighKeys, Tiny(), "1,2(2)+merged")
    assert [line.split(" = ")[0] for line in ran.after if "skipvit" in line and "log_" in line] == [
        "stage_1_log_sizes",
        "stage_2_log_sizes",
    ]


@pytest.mark.parametrize("plan", ["", "1(50%)+3", "1(50%)+2+merged"])
def test_attention_over_single_patches_is_left_alone(plan: str) -> None:
    assert run_up_to(WeighKeys, Tiny(), plan).events == ()


def test_sizes_count_only_if_asked_for() -> None:
    options = {"proportional_attention": False}
    assert run_up_to(WeighKeys, Tiny(), "1(50%)+merged", **options).events == ()
