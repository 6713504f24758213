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
from skipvit_fx.plan import Plan, Span, Stage

pytestmark = pytest.mark.every_case

RATIOS = st.fractions(min_value=0, max_value=1).filter(lambda ratio: ratio < 1)
AMOUNTS = RATIOS | st.integers(0, 300)


def one(*stages: Stage, returns: int | None = None, fused: bool = False) -> Plan:
    """A plan of one span."""
    return Plan((Span(stages, returns, fused),))


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    spans: list[Span] = []
    first = 0
    for last in range(count := draw(st.integers(0, 3))):
        layers = draw(st.sets(st.integers(first, first + 9), min_size=1, max_size=5))
        amounts = draw(AMOUNTS) if draw(st.booleans()) else None
        stages = [Stage(n, draw(AMOUNTS) if amounts is None else amounts) for n in sorted(layers)]
        returns = st.integers(max(layers) + 1, max(layers) + 9)
        back = draw(returns | st.none() if last == count - 1 else returns)
        kinds = ["", "fused", "merged"] if min(layers) else ["", "fused"]
        kind = draw(st.sampled_from(kinds))
        spans.append(Span(tuple(stages), back, fused=kind == "fused", merged=kind == "merged"))
        first = back or 0
    return Plan(tuple(spans))


def assert_plan_error(error: pytest.ExceptionInfo[PlanError], message: str) -> None:
    assert message in error.value.message
    assert error.value.hint
    assert error.value.hint in str(error.value)


# The notation.


@pytest.mark.parametrize(
    ("text", "plan"),
    [
        ("", Plan()),
        ("6(55%)", one(Stage(6, "55%"))),
        ("6(0%)", one(Stage(6, 0.0))),
        ("6(55%)+11", one(Stage(6, "0.55"), returns=11)),
        ("6(12.5%)+11", one(Stage(6, Fraction(1, 8)), returns=11)),
        ("6(0.05%)+11", one(Stage(6, Fraction(1, 2000)), returns=11)),
        ("6(100/3%)+11", one(Stage(6, "1/3"), returns=11)),
        ("6(45%)+fused", one(Stage(6, 0.45), fused=True)),
        ("6(45%)+11+fused", one(Stage(6, 0.45), returns=11, fused=True)),
        ("4,7(30%,30%)+10", one(Stage(4, 0.3), Stage(7, 0.3), returns=10)),
        ("6(8)", one(Stage(6, 8))),
        ("6(0)", one(Stage(6, "0"))),
        ("0(50%)", one(Stage(0, 0.5))),
        ("6,7(8,8)", one(Stage(6, 8), Stage(7, "8"))),
        ("3-5(8)", one(*(Stage(n, 8) for n in (3, 4, 5)))),
        ("1,3-5,7,8(8)", one(*(Stage(n, 8) for n in (1, 3, 4, 5, 7, 8)))),
        ("3,4,5(8,8,9)", one(Stage(3, 8), Stage(4, 8), Stage(5, 9))),
        ("1,2(10%,8)+4+fused", one(Stage(1, 0.1), Stage(2, 8), returns=4, fused=True)),
        (
            "4(30%)+5;5(30%)+6;6(30%)",
            Plan((*(Span((Stage(n, 0.3),), n + 1) for n in (4, 5)), Span((Stage(6, 0.3),)))),
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
        ("4,7(30%)+10", "4,7(30%,30%)+10"),
        ("1 - 3 (8, 9, 10) + 4 ; 9(1)", "1,2,3(8,9,10)+4;9(1)"),
        ("3-3(5%)", "3(5%)"),
        ("1,2,3(5%,5%,5%)", "1-3(5%)"),
        ("4-5(008)\n+6", "4,5(8,8)+6"),
    ],
)
def test_text_that_is_not_canonical(text: str, canonical: str) -> None:
    assert str(Plan.parse(text)) == canonical


@settings(deadline=None)
@given(plans())
def test_text_round_trip(plan: Plan) -> None:
    assert Plan.parse(str(plan)) == plan


@settings(deadline=None)
@given(st.text("0123456789,;()%+.-/ fusedmrg", max_size=20))
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
    (span,) = plan.spans
    assert Plan((replace(span, return_layer=11),)) == Plan.parse("4,7(30%,30%)+11")
    assert replace(span.stages[0], amount=0.5) == Stage(4, "50%")
    assert (repr(plan), repr(span)) == ("Plan('4,7(30%,30%)+10')", "Span('4,7(30%,30%)+10')")
    for value, name in ((plan, "spans"), (span, "return_layer"), (span.stages[0], "layer")):
        with pytest.raises(FrozenInstanceError):
            setattr(value, name, 5)


def test_the_stages_of_all_spans() -> None:
    plan = Plan.parse("1,2(10%,8)+3;3-5(4)")
    assert [(stage.layer, stage.amount) for stage in plan.stages] == [
        (1, Fraction(1, 10)),
        *((2, 8), (3, 4), (4, 4), (5, 4)),
    ]


# Ratios and counts are exact.


@pytest.mark.parametrize(
    ("given_ratio", "ratio"),
    [
        (0.29, Fraction(29, 100)),
        (0.1 + 0.2, Fraction("0.30000000000000004")),
        (1e-20, Fraction(1, 10**20)),
        (-0.0, Fraction(0)),
        ("0.29", Fraction(29, 100)),
        ("29%", Fraction(29, 100)),
        (" 29 % ", Fraction(29, 100)),
        ("2/7", Fraction(2, 7)),
        (Fraction(2, 7), Fraction(2, 7)),
    ],
)
def test_ratio_is_exact(given_ratio: Any, ratio: Fraction) -> None:
    stage = Stage(6, given_ratio)
    assert stage.amount == ratio
    assert type(stage.amount) is Fraction


def test_ratio_of_a_numpy_float() -> None:
    numpy = pytest.importorskip("numpy")
    assert Stage(6, numpy.float64(0.29)).amount == Fraction(29, 100)


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


@pytest.mark.parametrize(
    ("amount", "n", "dropped"), [(8, 196, 8), (8, 8, 7), (9, 8, 7), (0, 8, 0), (3, 1, 0)]
)
def test_a_number_of_tokens_never_takes_the_last(amount: int, n: int, dropped: int) -> None:
    stage = Stage(6, amount)
    assert stage.amount == amount
    assert type(stage.amount) is int
    assert (stage.dropped(n), stage.kept(n)) == (dropped, n - dropped)


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
    ("text", "at", "message"),
    [
        ("garbage", 1, "expected a layer number"),
        ("6", 2, "expected '('"),
        ("+11", 1, "expected a layer number"),
        ("6(55%", 6, "expected ')'"),
        ("6((55%))", 3, "expected an amount"),
        ("6(55%)+11(5%)", 10, "expected +LAYER, +fused, +merged, a semicolon or the end"),
        ("(55%)", 1, "expected a layer number"),
        ("six(55%)", 1, "expected a layer number"),
        ("1 1(55%)", 3, "expected '('"),
        ("6.0(55%)", 2, "expected '('"),
        ("٦(55%)", 1, "expected a layer number"),
        (f"{10**10}(55%)", 10, "expected '('"),
        ("-1(55%)", 1, "expected a layer number"),
        ("1-(55%)", 3, "expected a layer number"),
        ("5-3(55%)", 3, "the range ends before it begins, at layer 5"),
        ("6(0.55)", 3, "0.55 is neither a percentage nor a number of tokens"),
        ("6(-5)", 3, "-5 is neither a percentage nor a number of tokens"),
        ("6()", 3, "expected an amount"),
        ("6(%)", 3, "expected an amount"),
        ("6(nan%)", 3, "expected an amount"),
        ("6(5e1%)", 4, "expected ')'"),
        ("6(1/0%)", 3, "ratio '1/0%' is not a number"),
        ("6(0.1/2%)", 3, "0.1 is neither a percentage nor a number of tokens"),
        (f"6(0.{'1' * 5000}%)", 3, "is not a number"),
        ("6(100%)", 3, "ratio 100% is outside [0, 1)"),
        ("6(-5%)", 3, "ratio -5% is outside [0, 1)"),
        ("4,7,9(30%,5)+10", 7, "2 amounts for 3 layers"),
        ("4 (30%, 30%)+10", 4, "2 amounts for 1 layer"),
        ("6,6(30%,30%)", 1, "layer 6 is repeated"),
        ("1-3,2(8)", 1, "layer 2 comes after layer 3"),
        ("7,4(30%,30%)+10", 1, "layer 4 comes after layer 7"),
        ("6(55%)+6", 7, "return at layer 6, but layer 6 still drops"),
        ("4,7(30%,30%)+5", 13, "return at layer 5, but layer 7 still drops"),
        ("6(55%)11", 7, "expected +LAYER, +fused, +merged, a semicolon or the end"),
        ("6(55%)+11+12", 11, "expected fused or merged"),
        ("6(55%)+fused+11", 13, "expected +LAYER, +fused, +merged, a semicolon or the end"),
        ("6(55%)+fused+fused", 13, "expected +LAYER, +fused, +merged, a semicolon or the end"),
        ("6(55%)+", 8, "expected fused or merged"),
        ("6(55%)+fuse", 8, "expected fused or merged"),
        ("6(55%)+merge", 8, "expected fused or merged"),
        ("6(55%)+fused+merged", 13, "expected +LAYER, +fused, +merged, a semicolon or the end"),
        ("1(5)+2;0(5)+merged", 8, "cannot be merged at layer 0"),
        ("6(55%);", 8, "expected a layer number"),
        (";6(55%)", 1, "expected a layer number"),
        ("6(55%)+7;;7(5)", 10, "expected a layer number"),
        ("4(5);6(5)", 6, "the span 4(5) never returns, and 6(5) follows it"),
        ("4(5)+6;\n5(5)+7", 9, "layer 5 drops tokens before those of 4(5)+6 return"),
        ("1(5)+2;4(5)+6;2(5)", 15, "layer 2 drops tokens before those of 4(5)+6 return"),
    ],
)
def test_bad_text(text: str, at: int, message: str) -> None:
    with pytest.raises(PlanError) as error:
        Plan.parse(text)
    assert_plan_error(error, message)
    said, plan, caret = error.value.message.split("\n")
    assert said.endswith(f"(character {at} of the plan)")
    assert plan == f"  {' '.join(text.splitlines())}"
    assert caret == f"  {' ' * (at - 1)}^"


@pytest.mark.parametrize("text", [None, 6, b"6(55%)", Plan()])
def test_text_of_the_wrong_type(text: Any) -> None:
    with pytest.raises(PlanError) as error:
        Plan.parse(text)
    assert_plan_error(error, "a plan's notation must be a string, got")


@pytest.mark.parametrize(
    ("ratio", "message"),
    [
        (1.0, "ratio 1.0 is outside [0, 1)"),
        (-1, "amount -1 is negative"),
        ("-8", "ratio -8 is outside [0, 1)"),
        (-0.1, "ratio -0.1 is outside [0, 1)"),
        (Fraction(4, 3), "ratio 4/3 is outside [0, 1)"),
        (math.nan, "ratio nan is not a number in [0, 1)"),
        (math.inf, "ratio inf is not a number in [0, 1)"),
        (-math.inf, "ratio -inf is not a number in [0, 1)"),
        ("half", "ratio 'half' is not a number"),
        ("", "ratio '' is not a number"),
        (None, "amount None is not a number"),
        (True, "amount True is not a number"),
        ([0.5], "amount [0.5] is not a number"),
        (0.5j, "amount 0.5j is not a number"),
    ],
)
def test_bad_ratio(ratio: Any, message: str) -> None:
    with pytest.raises(PlanError) as error:
        Stage(6, ratio)
    assert_plan_error(error, message)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
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
        ({"stages": [Stage(6, 0.5)]}, "must be a tuple of one or more Stage"),
        ({"stages": ((6, 0.5),)}, "must be a tuple of one or more Stage"),
        ({"stages": Stage(6, 0.5)}, "must be a tuple of one or more Stage"),
        ({"stages": ()}, "must be a tuple of one or more Stage"),
        ({"stages": (Stage(6, 0.5),), "return_layer": "11"}, "return layer '11' is not an integer"),
        ({"stages": (Stage(6, 0.5),), "return_layer": True}, "return layer True is not an integer"),
        ({"stages": (Stage(6, 0.5),), "fused": 1}, "fused must be True or False, got 1"),
        ({"stages": (Stage(6, 0.5),), "merged": 1}, "merged must be True or False, got 1"),
        (
            {"stages": (Stage(6, 0.5),), "fused": True, "merged": True},
            "a span is either fused or merged",
        ),
        ({"stages": (Stage(0, 0.5),), "merged": True}, "cannot be merged at layer 0"),
        ({"stages": (Stage(6, 0.5),), "return_layer": 6}, "return at layer 6, but layer 6 still"),
        ({"stages": (Stage(0, 0.5),), "return_layer": 0}, "return at layer 0, but layer 0 still"),
        ({"stages": (Stage(6, 0.5), Stage(6, 0.5))}, "layer 6 is repeated"),
        ({"stages": (Stage(7, 0.5), Stage(6, 0.5))}, "layer 6 comes after layer 7"),
    ],
)
def test_bad_span(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError) as error:
        Span(**fields)
    assert_plan_error(error, message)


FIRST, SECOND = Span((Stage(2, 0.5),), 4), Span((Stage(3, 0.5),))


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([FIRST], "the spans of a plan must be a tuple of Span"),
        ((Stage(6, 0.5),), "the spans of a plan must be a tuple of Span"),
        (FIRST, "the spans of a plan must be a tuple of Span"),
        ((FIRST, SECOND), "layer 3 drops tokens before those of 2(50%)+4 return"),
        ((SECOND, SECOND), "the span 3(50%) never returns, and 3(50%) follows it"),
    ],
)
def test_bad_plan(spans: Any, message: str) -> None:
    with pytest.raises(PlanError) as error:
        Plan(spans)
    assert_plan_error(error, message)


def test_plan_errors_can_be_caught_as_ours_or_as_value_errors() -> None:
    assert issubclass(PlanError, SkipViTError)
    assert issubclass(PlanError, ValueError)


# A plan against a model's depth.


@pytest.mark.parametrize(
    "text", ["", "0(55%)", "1(55%)", "12(55%)+13", "4,7(30%)+10", "1-12(8)", "6(45%)+7;7(3)"]
)
def test_plan_fits_twelve_layers(text: str) -> None:
    Plan.parse(text).check(12)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("13(55%)", "layer 13 is out of range: the model has 12 layers"),
        ("6,13(30%,30%)", "layer 13 is out of range: the model has 12 layers"),
        ("6(55%)+8;9(3)+14", "return layer 14 is out of range: the model has 12 layers"),
        ("6(55%)+7;13(3)", "layer 13 is out of range: the model has 12 layers"),
        ("6(55%)+14", "return layer 14 is out of range: the model has 12 layers"),
    ],
)
def test_plan_does_not_fit_twelve_layers(text: str, message: str) -> None:
    with pytest.raises(PlanError) as error:
        Plan.parse(text).check(12)
    assert_plan_error(error, message)
