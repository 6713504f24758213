"""A rewritten model equals the reference, and the model itself wherever nothing is skipped."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import skipvit_fx
from skipvit_fx.errors import UnsupportedModelError
from support.checks import TOLERANCE, assert_matches, rewrite
from support.models import BY_NAME, FAMILIES, TORCHVISION, Family, layout_of, names
from support.odd_models import EITHER, GOOD, Example, image
from support.reference import (
    assert_same_tokens,
    masked_reference,
    physical_reference,
    relative_error,
)

Plan = dict[str, Any]

TWO: Plan = {"stages": [(1, "0.3"), (3, "0.4")], "return_layer": 4}
BEFORE_NORM: Plan = {"stages": [(2, "0.55")], "return_layer": 5}
NO_RETURN: Plan = {"stages": [(2, "0.55")]}
OTHERS: dict[str, Plan] = {
    "one": {"stages": [(2, "0.55")], "return_layer": 4},
    "next-layer": {"stages": [(2, "0.55")], "return_layer": 3},
    "neighbours": {"stages": [(1, "0.3"), (2, "0.5")], "return_layer": 3},
    "first-to-norm": {"stages": [(1, "0.125"), (2, "0.25"), (4, "0.5")], "return_layer": 5},
    "last-layer": {"stages": [(4, "0.5")], "return_layer": 5},
    "last-layer-no-return": {"stages": [(4, "0.5")]},
    "two-no-return": {"stages": [(1, "0.3"), (3, "0.4")]},
    "block": {"stages": [(1, "0.4"), (2, "0.25")], "return_layer": 4, "cut": "block"},
    "block-before-norm": {"stages": [(2, "0.4")], "return_layer": 5, "cut": "block"},
    "block-no-return": {"stages": [(1, "0.4"), (3, "0.25")], "cut": "block"},
}
CORE = [
    "vit",
    "vit-unfused",
    "dinov2-reg4",
    "siglip-map",
    "parallel-scaling",
    "beit",
    "dinov3-token",
    "relpos-shared",
    "cait",
    "naflex-gap",
]
CORE_THEN_SLOW = [
    pytest.param(family, marks=[] if family.name in CORE else pytest.mark.slow)
    for family in FAMILIES
]
# Where the head does not say whether the first token is a class token, or a register like others.
UNCLEAR = [
    "vit-cls-avg",
    "reg4-gap",
    "reg4-map",
    "diff-attention",
    "beit",
    "eva02",
    "dinov3",
    "rope-reg1-gap",
    "pe-core",
    "naflex-gap",
    "naflex-map",
]


def rewritten_or_refused(*args: Any, **options: Any) -> Any:
    """The rewritten model, or None if it was refused properly."""
    try:
        return rewrite(*args, **options)
    except UnsupportedModelError as error:
        refusal = error
    assert refusal.reason
    assert refusal.hint
    return None


def score_of(model: nn.Module) -> str:
    """Named outright, so that a wrong guess of ``auto`` fails in one test and not in all."""
    return "mean" if layout_of(model).cls is None else "cls"


def assert_is_the_model(fast: Any, model: nn.Module, x: Tensor, *, train: bool) -> None:
    """Equal to the last bit, in eval and, from the same random state, in train."""
    with torch.no_grad():
        assert torch.equal(fast.eval()(x), model.eval()(x))
        assert torch.equal(fast.graph_forward(x), model(x)), "the graph, not the author's forward"
        if train:
            torch.manual_seed(3)
            wanted = model.train()(x)
            torch.manual_seed(3)
            got = fast.train().graph_forward(x)
            assert not torch.equal(wanted, model.eval()(x)), "nothing random is alive in training"
            assert torch.equal(got, wanted)
    fast.eval(), model.eval()


def check(family: Family, plan: Plan, **options: Any) -> None:
    model, x = family.build(), family.input()
    fast = rewrite(model, plan, family.input(batch=2), score=score_of(model), **options)
    with torch.no_grad():
        wanted = masked_reference(model, x, layout_of(model), **plan)
    assert_matches(fast, x, wanted)


@pytest.mark.parametrize("family", FAMILIES, ids=names(FAMILIES))
def test_two_stages_then_off_and_on(family: Family) -> None:
    model, x = family.build(rate=0.1), family.input()
    fast = rewrite(model, TWO, family.input(batch=2), score=score_of(model))
    with torch.no_grad():
        wanted = masked_reference(model, x, layout_of(model), **TWO)
        on = fast(x)
    assert_matches(fast, x, wanted)
    skipvit_fx.set_skipping(fast, False)
    assert_is_the_model(fast, model, x, train=True)
    skipvit_fx.set_skipping(fast, True)
    if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        with torch.no_grad():
            assert torch.equal(fast(x), on)


@pytest.mark.parametrize("family", CORE_THEN_SLOW, ids=names(FAMILIES))
@pytest.mark.slow
def test_return_before_the_norm(family: Family) -> None:
    check(family, BEFORE_NORM, eliminate_dead_tokens=False)


@pytest.mark.parametrize("family", CORE_THEN_SLOW, ids=names(FAMILIES))
def test_no_return(family: Family) -> None:
    check(family, NO_RETURN)


@pytest.mark.parametrize("plan", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("name", CORE[:3])
@pytest.mark.slow
def test_plans(name: str, plan: Plan) -> None:
    check(BY_NAME[name], plan)


@pytest.mark.parametrize("plan", OTHERS.values(), ids=OTHERS)
@pytest.mark.slow
def test_plans_with_dead_tokens_computed(plan: Plan) -> None:
    check(BY_NAME["dinov2-reg4"], plan, eliminate_dead_tokens=False)


@pytest.mark.parametrize("plan", [OTHERS["block"], OTHERS["first-to-norm"]], ids=["block", "three"])
@pytest.mark.parametrize("name", CORE[3:])
@pytest.mark.slow
def test_plans_of_other_families(name: str, plan: Plan) -> None:
    check(BY_NAME[name], plan)


@pytest.mark.parametrize("name", UNCLEAR)
@pytest.mark.slow
def test_auto_score_takes_the_class_token_where_there_is_one(name: str) -> None:
    family = BY_NAME[name]
    model, x = family.build(), family.input()
    fast = rewrite(model, OTHERS["one"], x)
    with torch.no_grad():
        assert_matches(fast, x, masked_reference(model, x, layout_of(model), **OTHERS["one"]))


@pytest.mark.parametrize("name", ["vit", "dinov2-reg4", "deit-distilled"])
@pytest.mark.slow
def test_mean_query_where_asked_for(name: str) -> None:
    family = BY_NAME[name]
    model, x = family.build(), family.input()
    fast = rewrite(model, TWO, x, score="mean")
    with torch.no_grad():
        wanted = masked_reference(model, x, layout_of(model), score="mean", **TWO)
    assert_matches(fast, x, wanted)


@pytest.mark.parametrize(
    ("name", "eliminate"), [*((name, True) for name in CORE), ("vit", False), ("cait", False)]
)
@pytest.mark.slow
def test_nothing_dropped_is_the_model(name: str, eliminate: bool) -> None:
    family = BY_NAME[name]
    model, x = family.build(rate=0.1), family.input()
    fast = rewrite(
        model, {"stages": [(2, "0")], "return_layer": 4}, x, eliminate_dead_tokens=eliminate
    )
    assert_is_the_model(fast, model, x, train=True)


@pytest.mark.parametrize(("name", "read"), [("deit-distilled", 2), ("vit", 1), ("dinov2-reg4", 1)])
@pytest.mark.slow
def test_a_plan_without_stages_leaves_out_what_nobody_reads(name: str, read: int) -> None:
    model, x = BY_NAME[name].build(), BY_NAME[name].input()
    fast = skipvit_fx.rewrite(model, skipvit_fx.Plan(), example_inputs=(x,))
    inspection = skipvit_fx.inspect(fast)
    assert inspection.macs < inspection.baseline_macs
    assert inspection.layers[-1].ffn_tokens == read
    with torch.no_grad():
        assert relative_error(fast(x), model(x)) < TOLERANCE


@pytest.mark.parametrize("name", ["vit", "reg4-gap", "beit", "rope-axial", "cait"])
def test_gradients(name: str) -> None:
    """Through the frozen states as through the rest, and not through the choice."""
    family = BY_NAME[name]
    model, x = family.build(), family.input()
    fast = rewrite(model, TWO, x, score=score_of(model))
    grads = []
    reference = partial(masked_reference, model, x, layout_of(model), **TWO)
    for run in (lambda: reference().output, lambda: fast(x)):
        model.zero_grad()
        run().square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    wanted, got = grads
    scale = max(float(g.abs().max()) for g in wanted.values() if g is not None)
    for key, grad in wanted.items():
        assert (grad is None) == (got[key] is None), key
        if grad is not None:
            assert float((got[key] - grad).abs().max()) < TOLERANCE * scale, key


@pytest.mark.parametrize("name", ["vit", "reg4-gap", "beit", "rope-axial", "cait", "naflex-map"])
@pytest.mark.slow
def test_training_with_skipping_on(name: str) -> None:
    family = BY_NAME[name]
    model, x = family.build(rate=0.1), family.input()
    fast = rewrite(model, TWO, x).train()
    torch.manual_seed(0)
    first = fast(x)
    torch.manual_seed(1)
    assert not torch.equal(fast(x), first)
    first.square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


FUSED: dict[str, Plan] = {
    "one": {"stages": [(2, "0.55")], "return_layer": 4},
    "one-no-return": {"stages": [(2, "0.55")]},
    "before-norm": {"stages": [(2, "0.3")], "return_layer": 5},
    "three": {"stages": [(1, "0.5"), (2, "0.5"), (3, "0.5")], "return_layer": 4},
    "three-no-return": {"stages": [(1, "0.5"), (2, "0.5"), (3, "0.5")]},
    "block": {"stages": [(1, "0.5"), (2, "0.5")], "return_layer": 4, "cut": "block"},
}


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        *(("vit", plan) for plan in FUSED),
        *((name, "three") for name in ("vit-layerscale-qknorm", "dinov2-reg4", "siglip-map")),
        *((name, "three-no-return") for name in ("dinov2-reg4", "siglip-map")),
    ],
)
def test_fused_token(name: str, plan: str) -> None:
    family = BY_NAME[name]
    model, x = family.build(), family.input()
    fast = rewrite(model, FUSED[plan], x, fused=True, score=score_of(model))
    with torch.no_grad():
        wanted = physical_reference(model, x, fused=True, **FUSED[plan])
        assert all(stage.margin > 1e-5 for stage in wanted.stages)
        assert relative_error(fast(x), wanted.output) < TOLERANCE
    skipvit_fx.set_skipping(fast, False)
    assert_is_the_model(fast, model, x, train=False)


@pytest.mark.parametrize("name", ["beit", "rope-axial", "relpos-mlp", "cait", "parallel-things"])
@pytest.mark.slow
def test_fused_token_elsewhere_is_sound_or_refused(name: str) -> None:
    """A fused token has no position: what depends on one must not be guessed."""
    family = BY_NAME[name]
    model, x = family.build(), family.input()
    fast = rewritten_or_refused(model, FUSED["one"], x, fused=True, score=score_of(model))
    if fast is None:
        return
    with torch.no_grad():
        assert fast(x).isfinite().all()
    skipvit_fx.set_skipping(fast, False)
    assert_is_the_model(fast, model, x, train=False)


@pytest.mark.slow
@pytest.mark.parametrize("plan", [TWO, BEFORE_NORM, NO_RETURN], ids=["two", "norm", "no-return"])
def test_torchvision_is_right_or_refused(plan: Plan) -> None:
    model, x = TORCHVISION.build(), TORCHVISION.input()
    fast = rewritten_or_refused(model, plan, TORCHVISION.input(batch=2))
    if fast is None:
        return
    with torch.no_grad():
        assert_matches(fast, x, masked_reference(model, x, layout_of(model), **plan))


ODD_PLANS: dict[str, Plan] = {
    "two": TWO,
    "before-norm": BEFORE_NORM,
    "block": OTHERS["block"],
    "no-return": NO_RETURN,
}


# Each odd model under two plans; under the two others as well where positions or layout matter.
QUICK = ("two", "no-return")
THOROUGH = (
    "plain",
    "sequence-first",
    "post-norm",
    "rope-leaf-sliced",
    "position-on-stream",
    "registers-last",
)


@pytest.mark.parametrize(
    ("example", "plan"),
    [
        pytest.param(example, plan, id=f"{example}-{name}")
        for example in GOOD
        for name, plan in ODD_PLANS.items()
        if name in QUICK or example.name in THOROUGH
    ],
)
@pytest.mark.slow
def test_odd_models(example: Example, plan: Plan) -> None:
    model, x = example.build(), image(batch=3)
    if "return_layer" not in plan and example.name in ("grid-output", "flatten-head"):
        with pytest.raises(UnsupportedModelError) as caught:  # the head needs every patch
            rewrite(model, plan, image())
        assert caught.value.reason
        assert caught.value.hint
        return
    fast = rewrite(model, plan, image(), score="cls")
    with torch.no_grad():
        assert_matches(fast, x, masked_reference(model, x, model.layout(), **plan))
    skipvit_fx.set_skipping(fast, False)
    assert_is_the_model(fast, model, x, train=False)


@pytest.mark.parametrize("plan", [TWO, NO_RETURN], ids=QUICK)
@pytest.mark.parametrize("example", EITHER, ids=str)
@pytest.mark.slow
def test_odder_models_are_right_or_refused(example: Example, plan: Plan) -> None:
    model, x = example.build(), image(batch=3)
    fast = rewritten_or_refused(model, plan, image(), score="cls")
    if fast is None:
        return
    with torch.no_grad():
        assert_matches(fast, x, masked_reference(model, x, model.layout(), **plan))


def test_styles_of_the_same_attention_agree() -> None:
    """The odd models themselves: six spellings of one function."""
    same = {"plain", "einsum", "heads-last", "merged-heads", "sequence-first", "literal-sizes"}
    x = image()
    results = []
    for example in GOOD:
        if example.name in same:
            model = example.build()
            with torch.no_grad():
                results.append(masked_reference(model, x, model.layout(), **TWO))
    assert len(results) == len(same)
    for result in results:
        assert relative_error(result.output, results[0].output) < 1e-5
        assert_same_tokens(result.stages, results[0].stages)


@pytest.mark.parametrize("name", ["vit", "beit", "rope-mixed", "hybrid-resnet26d", "naflex-gap"])
@pytest.mark.slow
def test_the_model_is_untouched_and_shares_everything(name: str) -> None:
    family = BY_NAME[name]
    model, x = family.build(), family.input()
    with torch.no_grad():
        before = model(x)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modules = dict(model.named_modules())
    fast = rewrite(model, TWO, x)
    fast(x).sum().backward()
    fast.zero_grad()
    assert list(fast.state_dict()) == list(state)
    parameters = dict(fast.named_parameters())
    assert list(parameters) == [key for key, _ in model.named_parameters()]
    for key, parameter in model.named_parameters():
        assert parameters[key] is parameter
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])
        assert fast.state_dict()[key].data_ptr() == value.data_ptr()
    assert all(module is modules[key] for key, module in model.named_modules())
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    with torch.no_grad():
        assert torch.equal(model(x), before)
