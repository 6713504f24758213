"""Every set of numbers is a plan, and published plans are among the candidates."""

from __future__ import annotations

import random

import pytest

from skipvit_fx.plan import Plan
from skipvit_fx.planner.space import PAPER, Space, profiled, published

KINDS = ("skip", "fused", "merged")

pytestmark = pytest.mark.every_case


def drawn(space: Space, generator: random.Random) -> dict[str, int]:
    return {d.name: generator.randint(d.low, d.high) for d in space.dimensions()}


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 12])
def test_any_numbers_make_a_plan_that_fits(stages: int) -> None:
    space = Space(6, (1, 2, 3, 5, 6), KINDS, stages)
    generator = random.Random(0)
    counts, kinds, spans, never = set(), set(), set(), set()
    for _ in range(2000):
        plan = space.plan(drawn(space, generator))
        plan.check(6)
        assert Plan.parse(str(plan)) == plan
        layers = [stage.layer for stage in plan.stages]
        assert set(layers) <= {1, 2, 3, 5, 6}
        counts.add(len(layers))
        spans.add(len(plan.spans))
        kinds |= {(span.fused, span.merged) for span in plan.spans}
        never.add(plan.spans[-1].return_layer is None)
        for span in plan.spans:
            assert not span.merged or all(stage.amount <= 0.5 for stage in span.stages)
    assert min(counts) == 1
    assert max(counts) == min(stages, 5)
    assert kinds == {(False, False), (True, False), (False, True)}
    assert max(spans) == min(stages, 3)
    assert never == {True, False}


def test_a_plan_of_so_many_groups_has_its_numbers() -> None:
    space = Space(12, tuple(range(1, 13)), KINDS, 2)
    for text in (*PAPER, "1(25%)+13", "3(30%)+5;5(40%)+merged", "12(50%)+fused"):
        plan = Plan.parse(text)
        values = space.values(plan)
        assert values is not None, text
        assert space.plan(values) == plan
        for dimension in space.dimensions():
            assert dimension.low <= values[dimension.name] <= dimension.high


@pytest.mark.parametrize(
    "text", ["1-12(8)+merged", "4,7,10(30%)+fused", "6(51%)", "6(7)", "0(50%)", "6(70%)+merged"]
)
def test_other_plans_have_none(text: str) -> None:
    assert Space(12, tuple(range(1, 13)), KINDS, 2).values(Plan.parse(text)) is None


def test_published_plans() -> None:
    names = published(12, 196)
    assert {str(Plan.parse(plan)) for plan in PAPER} <= names.keys()
    assert names["1-12(8)+merged"] == names["1-12(13)+merged"] == "ToMe"
    assert names["4,7,10(30%,30%,30%)+fused"] == "EViT"
    assert set(published(4, 49)) == {"1-4(2)+merged", "1-4(3)+merged"}
    assert "6(45%)+fused" in published(10, 49)
    assert "6(45%)+11" in published(10, 49)
    assert "6(45%)+11" not in published(9, 49)


def test_the_profile_has_one_stage_at_each_layer() -> None:
    plans = profiled(Space(4, (2, 4), KINDS, 2), 5)
    assert [str(plan) for plan in plans.values()] == [
        *("2(25%)+5", "2(50%)+5", "2(75%)+5", "4(25%)+5", "4(50%)+5", "4(75%)+5"),
    ]
    assert list(plans)[:2] == [(2, 25), (2, 50)]
