"""Sizes under a drop follow what they are the size of."""

from __future__ import annotations

import pytest

from skipvit_fx.passes.follow_token_sizes import FollowTokenSizes
from support.tiny import Tiny, assert_documented, run_up_to


def test_as_documented() -> None:
    assert_documented(run_up_to(FollowTokenSizes, Tiny(sizes="literal")))


def test_only_the_layers_under_the_drop_change() -> None:
    ran = run_up_to(FollowTokenSizes, Tiny(sizes="literal"))
    assert [kind for kind, _ in ran.events] == ["insert", "rewire", "rewire"]
    assert all(node.endswith("_1") or node == "mul_1_tokens" for _, node in ran.events)


@pytest.mark.parametrize("sizes", ["read", ""])
def test_what_follows_already_stays(sizes: str) -> None:
    ran = run_up_to(FollowTokenSizes, Tiny(sizes=sizes))
    assert ran.before == ran.after
    assert ran.events == ()


def test_without_a_drop_nothing_changes() -> None:
    assert run_up_to(FollowTokenSizes, Tiny(sizes="literal"), "").events == ()
