"""Plans: the notation both ways, exact counts, and an error with a hint for every bad input."""

import copy
import math
import pickle
from dataclasses import FrozenInstanceError, replace
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skipvit_fx.errors import PlanError, SkipViTError
from skipvit_fx.plan import Plan, Stage

pytestmark = pytest.mark.every_case

RATIOS = st.fractions(min_value=0, max_value=1).filter(lambda ratio: ratio < 1)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    layers = sorted(draw(st.sets(st.integers(1, 200), max_size=5)))
    stages = tuple(Stage(layer, draw(RATIOS)) for layer in layers)
    if not stages:
        return Plan()
    returns = st.none() | st.integers(layers[-1] + 1, layers[-1] + 50)
    return Plan(stages, draw(returns), draw(st.booleans()))


def assert_plan_error(error: pytest.ExceptionInfo[PlanError], message: str) -> None:
    assert message in error.value.message
    assert error.value.hint
    assert error.value.hint in str(error.value)


# The notation.


@pytest.mark.parametrize(
    ("text", "plan"),
    [
        ("", Plan()),
        ("6(55%)", Plan((Stage(6, "55%"),))),
        ("6(0%)", Plan((Stage(6, 0),))),
        ("6(55%)+11", Plan((Stage(6, "0.55"),), 11)),
        ("6(12.5%)+11", Plan((Stage(6, Fraction(1, 8)),), 11)),
        ("6(0.05%)+11", Plan((Stage(6, Fraction(1, 2000)),), 11)),
        ("6(100/3%)+11", Plan((Stage(6, "1/3"),), 11)),
        ("6(45%)+fused", Plan((Stage(6, 0.45),), fused=True)),
        ("6(45%)+11+fused", Plan((Stage(6, 0.45),), 11, fused=True)),
        ("4,7(30%,30%)+10", Plan((Stage(4, 0.3), Stage(7, 0.3)), 10)),
        (
            "1,2,3(10%,20%,30%)+4+fused",
            Plan((Stage(1, 0.1), Stage(2, 0.2), Stage(3, 0.3)), 4, True),
        ),
    ],
)
def test_canonical_text(text: str, plan: Plan) -> None:
    assert Plan.parse(text) == plan
    assert str(plan) == text


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("  ", ""),
        (" 6 ( 55 % ) + 11 + fused ", "6(55%)+11+fused"),
        ("6(45%) + 11", "6(45%)+11"),
        ("4, 7(30%, 30%)+10", "4,7(30%,30%)+10"),
        ("\t6(45%)\n", "6(45%)"),
        ("06(012.500%)+011", "6(12.5%)+11"),
        ("6(0.00%)", "6(0%)"),
        ("6(25/2%)", "6(12.5%)"),
    ],
)
def test_text_that_is_not_canonical(text: str, canonical: str) -> None:
    assert str(Plan.parse(text)) == canonical


@settings(deadline=None)
@given(plans())
def test_text_round_trip(plan: Plan) -> None:
    assert Plan.parse(str(plan)) == plan


@settings(deadline=None)
@given(st.text("0123456789,()%+.-/ fused", max_size=20))
def test_text_is_read_or_refused(text: str) -> None:
    try:
        plan = Plan.parse(text)
    except PlanError:
        return
    assert Plan.parse(str(plan)) == plan


def test_a_plan_is_a_value() -> None:
    plan = Plan.parse("4,7(30%,30%)+10")
    assert hash(plan) == hash(Plan.parse("4,7(30.0%,30%)+10"))
    assert copy.deepcopy(plan) == plan
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert replace(plan, return_layer=11) == Plan.parse("4,7(30%,30%)+11")
    assert replace(plan.stages[0], ratio=0.5) == Stage(4, "50%")
    with pytest.raises(FrozenInstanceError):
        plan.return_layer = 11  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        plan.stages[0].layer = 5  # type: ignore[misc]


# Ratios and counts are exact.


@pytest.mark.parametrize(
    ("given_ratio", "ratio"),
    [
        (0.29, Fraction(29, 100)),
        (0.1 + 0.2, Fraction("0.30000000000000004")),
        (1e-20, Fraction(1, 10**20)),
        (-0.0, Fraction(0)),
        (0, Fraction(0)),
        ("0.29", Fraction(29, 100)),
        ("29%", Fraction(29, 100)),
        (" 29 % ", Fraction(29, 100)),
        ("2/7", Fraction(2, 7)),
        (Fraction(2, 7), Fraction(2, 7)),
    ],
)
def test_ratio_is_exact(given_ratio: Any, ratio: Fraction) -> None:
    stage = Stage(6, given_ratio)
    assert stage.ratio == ratio
    assert type(stage.ratio) is Fraction


def test_ratio_of_a_numpy_float() -> None:
    numpy = pytest.importorskip("numpy")
    assert Stage(6, numpy.float64(0.29)).ratio == Fraction(29, 100)


@pytest.mark.parametrize(
    ("ratio", "n", "kept"),
    [("55%", 196, 89), ("30%", 196, 138), ("30%", 138, 97), ("45%", 196, 108), (0.29, 100, 71)],
)
def test_counts_of_the_paper(ratio: Any, n: int, kept: int) -> None:
    assert Stage(6, ratio).kept(n) == kept


@settings(deadline=None)
@given(RATIOS, st.integers(0, 10**6))
def test_counts_add_up(ratio: Fraction, n: int) -> None:
    stage = Stage(1, ratio)
    assert stage.kept(n) + stage.dropped(n) == n
    assert stage.dropped(n) == math.floor(ratio * n)
    assert stage.kept(n) == math.ceil((1 - ratio) * n)
    assert n == 0 or stage.kept(n) >= 1


def test_counts_of_a_symbolic_size() -> None:
    import torch
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    sizes = ShapeEnv()
    n = sizes.create_unbacked_symint()
    torch._check(n >= 0)
    stage = Stage(6, "55%")
    kept, dropped = stage.kept(n), stage.dropped(n)
    assert isinstance(kept, torch.SymInt)
    assert isinstance(dropped, torch.SymInt)
    assert not sizes.guards
    assert kept.node.expr.subs(n.node.expr, 196) == 89
    assert dropped.node.expr.subs(n.node.expr, 196) == 107


# Errors: each names what is wrong and has a hint.


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("garbage", "cannot read the plan 'garbage'"),
        ("6", "cannot read the plan '6'"),
        ("+11", "cannot read the plan '+11'"),
        ("6(55%", "cannot read the plan '6(55%'"),
        ("6((55%))", "cannot read the plan"),
        ("6(55%)+11(5%)", "cannot read the plan"),
        ("(55%)", "'' is not a layer number"),
        ("six(55%)", "'six' is not a layer number"),
        ("1 1(55%)", "'1 1' is not a layer number"),
        ("6.0(55%)", "'6.0' is not a layer number"),
        ("٦(55%)", "'٦' is not a layer number"),
        (f"{10**10}(55%)", "is not a layer number"),
        ("0(55%)", "layer 0 is out of range"),
        ("-1(55%)", "layer -1 is out of range"),
        ("6(55)", "'55' is not a percentage"),
        ("6()", "'' is not a percentage"),
        ("6(%)", "ratio '%' is not a number"),
        ("6(nan%)", "ratio 'nan%' is not a number"),
        ("6(5e1%)", "ratio '5e1%' is not a number"),
        ("6(1/0%)", "ratio '1/0%' is not a number"),
        ("6(0.1/2%)", "ratio '0.1/2%' is not a number"),
        (f"6(0.{'1' * 5000}%)", "is not a number"),
        ("6(100%)", "ratio 100% is outside [0, 1)"),
        ("6(-5%)", "ratio -5% is outside [0, 1)"),
        ("4,7(30%)+10", "2 layer(s) but 1 ratio(s)"),
        ("4(30%,30%)+10", "1 layer(s) but 2 ratio(s)"),
        ("6,6(30%,30%)", "layer 6 is repeated"),
        ("7,4(30%,30%)+10", "layer 4 comes after layer 7"),
        ("6(55%)+6", "return at layer 6, but layer 6 still drops"),
        ("4,7(30%,30%)+5", "return at layer 5, but layer 7 still drops"),
        ("6(55%)11", "cannot read '11' after the ratios"),
        ("6(55%)+11+12", "cannot read '+11+12' after the ratios"),
        ("6(55%)+fused+11", "cannot read '+fused+11' after the ratios"),
        ("6(55%)+fused+fused", "'fused' is not a layer number"),
        ("6(55%)+", "'' is not a layer number"),
        ("6(55%)+fuse", "'fuse' is not a layer number"),
    ],
)
def test_bad_text(text: str, message: str) -> None:
    with pytest.raises(PlanError) as error:
        Plan.parse(text)
    assert_plan_error(error, message)


@pytest.mark.parametrize("text", [None, 6, b"6(55%)", Plan()])
def test_text_of_the_wrong_type(text: Any) -> None:
    with pytest.raises(PlanError) as error:
        Plan.parse(text)
    assert_plan_error(error, "a plan's notation must be a string, got")


@pytest.mark.parametrize(
    ("ratio", "message"),
    [
        (1, "ratio 1 is outside [0, 1)"),
        (1.0, "ratio 1.0 is outside [0, 1)"),
        (55, "ratio 55 is outside [0, 1)"),
        (-0.1, "ratio -0.1 is outside [0, 1)"),
        ("55", "ratio 55 is outside [0, 1)"),
        (Fraction(4, 3), "ratio 4/3 is outside [0, 1)"),
        (math.nan, "ratio nan is not a number in [0, 1)"),
        (math.inf, "ratio inf is not a number in [0, 1)"),
        (-math.inf, "ratio -inf is not a number in [0, 1)"),
        ("half", "ratio 'half' is not a number"),
        ("", "ratio '' is not a number"),
        (None, "ratio None is not a number"),
        (True, "ratio True is not a number"),
        ([0.5], "ratio [0.5] is not a number"),
        (0.5j, "ratio 0.5j is not a number"),
    ],
)
def test_bad_ratio(ratio: Any, message: str) -> None:
    with pytest.raises(PlanError) as error:
        Stage(6, ratio)
    assert_plan_error(error, message)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (0, "layer 0 is out of range"),
        (-3, "layer -3 is out of range"),
        (6.0, "layer 6.0 is not an integer"),
        ("6", "layer '6' is not an integer"),
        (True, "layer True is not an integer"),
        (None, "layer None is not an integer"),
    ],
)
def test_bad_layer(layer: Any, message: str) -> None:
    with pytest.raises(PlanError) as error:
        Stage(layer, 0.5)
    assert_plan_error(error, message)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stages": [Stage(6, 0.5)]}, "stages must be a tuple of Stage"),
        ({"stages": ((6, 0.5),)}, "stages must be a tuple of Stage"),
        ({"stages": Stage(6, 0.5)}, "stages must be a tuple of Stage"),
        ({"stages": (Stage(6, 0.5),), "return_layer": "11"}, "return layer '11' is not an integer"),
        ({"stages": (Stage(6, 0.5),), "return_layer": True}, "return layer True is not an integer"),
        ({"stages": (Stage(6, 0.5),), "fused": 1}, "fused must be True or False, got 1"),
        ({"stages": (Stage(6, 0.5),), "return_layer": 6}, "return at layer 6, but layer 6 still"),
        ({"stages": (Stage(6, 0.5), Stage(6, 0.5))}, "layer 6 is repeated"),
        ({"stages": (Stage(7, 0.5), Stage(6, 0.5))}, "layer 6 comes after layer 7"),
        ({"return_layer": 11}, "a plan without stages has nothing to return or fuse"),
        ({"fused": True}, "a plan without stages has nothing to return or fuse"),
    ],
)
def test_bad_plan(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError) as error:
        Plan(**fields)
    assert_plan_error(error, message)


def test_plan_errors_can_be_caught_as_ours_or_as_value_errors() -> None:
    assert issubclass(PlanError, SkipViTError)
    assert issubclass(PlanError, ValueError)


# A plan against a model's depth.


@pytest.mark.parametrize("text", ["", "1(55%)", "12(55%)+13", "4,7(30%,30%)+10", "6(45%)+fused"])
def test_plan_fits_twelve_layers(text: str) -> None:
    Plan.parse(text).check(12)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("13(55%)", "layer 13 is out of range: the model has 12 layers"),
        ("6,13(30%,30%)", "layer 13 is out of range: the model has 12 layers"),
        ("6(55%)+14", "return layer 14 is out of range: the model has 12 layers"),
    ],
)
def test_plan_does_not_fit_twelve_layers(text: str, message: str) -> None:
    with pytest.raises(PlanError) as error:
        Plan.parse(text).check(12)
    assert_plan_error(error, message)
