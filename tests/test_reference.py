"""The reference agrees with a second one that is nothing like it, and notices a wrong one."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from support.models import BY_NAME, FAMILIES, TORCHVISION, Family, layout_of, names
from support.reference import (
    MaskedRun,
    StageResult,
    assert_same_tokens,
    drop_count,
    masked_reference,
    physical_reference,
    plan_text,
    relative_error,
)

pytestmark = pytest.mark.every_case

PLANS: dict[str, dict[str, Any]] = {
    "one": {"stages": [(2, "0.55")], "return_layer": 4},
    "two": {"stages": [(1, "0.3"), (3, "0.3")], "return_layer": 4},
    "neighbours": {"stages": [(1, "0.3"), (2, "0.5")], "return_layer": 3},
    "before-norm": {"stages": [(2, "0.3"), (3, "0.4")], "return_layer": 5},
    "last-layer": {"stages": [(4, "0.5")], "return_layer": 5},
    "no-return": {"stages": [(2, "0.3"), (4, "0.5")]},
    "block": {"stages": [(1, "0.4"), (2, "0.25")], "return_layer": 4, "cut": "block"},
    "block-no-return": {"stages": [(1, "0.4"), (4, "0.25")], "cut": "block"},
    "block-before-norm": {"stages": [(2, "0.4"), (3, "0.25")], "return_layer": 5, "cut": "block"},
}
PLAIN = [
    "vit",
    "vit-layerscale-qknorm",
    "vit-cls-avg",
    "dinov2-reg4",
    "reg4-gap",
    "siglip-map",
    "vit-coincident",
]


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


ALL = [*FAMILIES, TORCHVISION]


@pytest.mark.parametrize("family", ALL, ids=names(ALL))
def test_nothing_dropped_is_the_model(family: Family) -> None:
    model, x = family.build(), family.input()
    result = masked_reference(model, x, layout_of(model), stages=[(2, 0)], return_layer=4)
    assert relative_error(result.output, model(x)) < 1e-6
    assert result.stages[0].dropped.shape[1] == 0
    assert torch.equal(result.stages[0].kept[0], torch.arange(result.stages[0].kept.shape[1]))


@pytest.mark.parametrize("family", ALL, ids=names(ALL))
def test_dropping_matters_and_leaves_no_hooks(family: Family) -> None:
    model, x = family.build(), family.input()
    before = model(x)
    result = masked_reference(model, x, layout_of(model), stages=[(2, "0.5")], return_layer=4)
    assert relative_error(result.output, before) > 1e-3
    assert torch.equal(model(x), before)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("name", PLAIN)
def test_masked_is_physical(name: str, plan: dict[str, Any]) -> None:
    family = BY_NAME[name]
    model, x = family.build(), family.input()
    masked = masked_reference(model, x, layout_of(model), **plan)
    physical = physical_reference(model, x, **plan)
    assert relative_error(masked.output, physical.output) < 1e-5
    assert_same_tokens(masked.stages, physical.stages)
    assert all(stage.margin > 0 for stage in masked.stages)


def test_gradients_of_masked_and_physical_agree() -> None:
    model, x = BY_NAME["vit"].build(), BY_NAME["vit"].input()
    grads = []
    with torch.enable_grad():
        for result in (
            masked_reference(model, x, layout_of(model), **PLANS["two"]),
            physical_reference(model, x, **PLANS["two"]),
        ):
            model.zero_grad()
            result.output.square().sum().backward()
            grads.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(relative_error(a, b) < 1e-4 for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(
    ("ratio", "present", "kept"),
    [
        ("0.55", 196, 89),
        ("0.3", 196, 138),
        ("0.3", 138, 97),
        ("0.45", 196, 108),
        ("0.1", 10, 9),
        (0.7, 10, 3),
    ],
)
def test_counts(ratio: str | float, present: int, kept: int) -> None:
    assert present - drop_count(ratio, present) == kept
    assert kept == math.ceil((1 - Fraction(str(ratio))) * present)


def test_counts_in_a_run_at_full_size() -> None:
    family = Family("full", "vit_tiny_patch16_224", image=(224, 224))
    model, x = family.build(), family.input(batch=1)
    one = masked_reference(model, x, layout_of(model), stages=[(2, "0.55")], return_layer=4)
    assert one.stages[0].kept.shape == (1, 89)
    two = masked_reference(
        model, x, layout_of(model), stages=[(2, "0.3"), (3, "0.3")], return_layer=5
    )
    assert [stage.kept.shape[1] for stage in two.stages] == [138, 97]
    assert [stage.dropped.shape[1] for stage in two.stages] == [58, 41]


@pytest.mark.parametrize(
    "name", ["dinov2-reg4", "deit-distilled", "reg4-gap", "cait", "naflex-map"]
)
def test_every_patch_and_no_prefix_is_accounted_for(name: str) -> None:
    family = BY_NAME[name]
    model, x = family.build(), family.input()
    stages = masked_reference(
        model, x, layout_of(model), stages=[(1, "0.4"), (3, "0.6")], return_layer=4
    ).stages
    n = stages[0].scores.shape[1]
    assert n == 24
    everyone = (
        torch.cat([stages[-1].kept, *(stage.dropped for stage in stages)], dim=1).sort(dim=1).values
    )
    assert torch.equal(everyone, torch.arange(n).expand(3, n))
    assert torch.equal(
        torch.cat([stages[1].kept, stages[1].dropped], 1).sort(1).values, stages[0].kept
    )


def test_equal_scores_keep_the_earlier_patch() -> None:
    model = BY_NAME["vit-no-pos"].build()
    x = torch.ones(1, 3, 64, 96)  # every patch is the same, and nothing says where it is
    for reference in (
        masked_reference(model, x, layout_of(model), stages=[(2, "0.5")], return_layer=4),
        physical_reference(model, x, stages=[(2, "0.5")], return_layer=4),
    ):
        stage = reference.stages[0]
        if stage.margin == 0:
            assert torch.equal(stage.kept[0], torch.arange(12))
    assert torch.equal(
        MaskedRun.ranking(torch.tensor([[0.2, 0.5, 0.5, 0.2]])), torch.tensor([[1, 2, 0, 3]])
    )


# EViT's fused token, which only the physical reference knows.


def test_fused_token_of_nothing_is_no_token() -> None:
    model, x = BY_NAME["vit"].build(), BY_NAME["vit"].input()
    result = physical_reference(model, x, stages=[(2, 0)], fused=True)
    assert relative_error(result.output, model(x)) < 1e-6


def test_fused_token_counts_as_a_patch_and_may_leave() -> None:
    model, x = BY_NAME["vit"].build(), BY_NAME["vit"].input()
    stages = physical_reference(
        model, x, stages=[(1, "0.5"), (2, "0.5"), (3, "0.5")], fused=True
    ).stages
    assert [stage.scores.shape[1] for stage in stages] == [24, 13, 8]
    assert [stage.dropped.shape[1] for stage in stages] == [12, 6, 4]
    for i in range(2):
        later = torch.cat([stages[i + 1].kept, stages[i + 1].dropped], dim=1)
        assert (later == 24 + i).any(dim=1).all()


def test_fused_token_is_the_weighted_sum() -> None:
    model, x = BY_NAME["vit"].build(), BY_NAME["vit"].input()
    seen: list[Tensor] = []
    layer2 = model.blocks[1]
    handles = [layer2.norm2.register_forward_pre_hook(lambda module, args: seen.append(args[0]))]
    model(x)
    stage = physical_reference(model, x, stages=[(2, "0.5")], fused=True).stages[0]
    for handle in handles:
        handle.remove()
    whole, short = seen
    rows = whole[:, 1:].gather(1, stage.dropped[..., None].expand(-1, -1, 64))
    wanted = (rows * stage.scores.gather(1, stage.dropped)[..., None]).sum(1)
    assert short.shape[1] == 1 + 12 + 1
    assert relative_error(short[:, -1], wanted) < 1e-6


@pytest.mark.parametrize("return_layer", [4, 5])
def test_fused_token_changes_the_answer_and_leaves_when_the_patches_return(
    return_layer: int,
) -> None:
    model, x = BY_NAME["siglip-map"].build(), BY_NAME["siglip-map"].input()
    plan: dict[str, Any] = {"stages": [(2, "0.5"), (3, "0.4")], "return_layer": return_layer}
    seen: list[int] = []
    handle = model.norm.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].shape[1])
    )
    fused = physical_reference(model, x, fused=True, **plan)
    plain = physical_reference(model, x, **plan)
    handle.remove()
    assert seen == [24, 24]
    assert relative_error(fused.output, plain.output) > 1e-3


# A wrong reference is told from the right one by what the comparison of outputs and tokens allows.


class MaskForgottenInOneLayer(MaskedRun):
    def hidden(self) -> Tensor | None:
        return None if self.layer == 3 else self.gone


class MaskedTooEarly(MaskedRun):
    """Returned tokens stay hidden for one layer more."""

    def hidden(self) -> Tensor | None:
        if self.gone is not None and self.gone.any():
            self.last = self.gone
        return self.last if self.layer in self.returns else self.gone


class FrozenAtLayerOutput(MaskedRun):
    """The state after the whole layer in place of that after its attention."""

    def _at_mid(self, state: Tensor) -> Tensor:
        return state

    def _at_border(self, layer: int, state: Tensor) -> Tensor:
        if self.gone is not None and layer - 1 in self.stages:
            self._decide(layer - 1, state)
        return super()._at_border(layer, state)


class FrozenToZero(MaskedRun):
    def hold(self, state: Tensor) -> Tensor:
        return torch.zeros_like(state)


class NeverFrozen(MaskedRun):
    """Dropped tokens go through the layers, unseen."""

    def _at_border(self, layer: int, state: Tensor) -> Tensor:
        self.frozen = None
        return super()._at_border(layer, state)


class WorstFirst(MaskedRun):
    ranking = staticmethod(lambda scores: scores.argsort(dim=-1, stable=True))


class SecondStageSeesAll(MaskedRun):
    """The patches dropped before are seen again in the layer of the next cut."""

    def hidden(self) -> Tensor | None:
        return None if self.layer in self.stages else self.gone


WRONG = [
    MaskForgottenInOneLayer,
    MaskedTooEarly,
    FrozenAtLayerOutput,
    FrozenToZero,
    NeverFrozen,
    WorstFirst,
    SecondStageSeesAll,
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
@pytest.mark.parametrize("name", ["vit", "reg4-gap", "cait", "res-post-norm"])
def test_a_wrong_reference_is_told_apart(name: str, wrong: type[MaskedRun]) -> None:
    family = BY_NAME[name]
    model, x = family.build(), family.input()
    plan: dict[str, Any] = {"stages": [(1, "0.4"), (3, "0.3")], "return_layer": 4}
    right = masked_reference(model, x, layout_of(model), **plan)
    other = masked_reference(model, x, layout_of(model), run=wrong, **plan)
    assert relative_error(other.output, right.output) > 1e-3
    assert relative_error(right.output, right.output) == 0


def test_one_exchanged_token_is_told_apart() -> None:
    right = StageResult(2, torch.tensor([[0, 2]]), torch.tensor([[1, 3]]), torch.rand(1, 4), 1.0)
    wrong = StageResult(2, torch.tensor([[0, 3]]), torch.tensor([[1, 2]]), right.scores, 1.0)
    shuffled = StageResult(2, torch.tensor([[2, 0]]), torch.tensor([[3, 1]]), right.scores, 1.0)
    assert_same_tokens([shuffled], [right])
    for other in (wrong, StageResult(3, right.kept, right.dropped, right.scores, 1.0)):
        with pytest.raises(AssertionError):
            assert_same_tokens([other], [right])
    with pytest.raises(AssertionError):
        assert_same_tokens([], [right])


def test_relative_error_sees_shape_type_and_nan() -> None:
    a = torch.rand(2, 3)
    assert relative_error(a, a.clone()) == 0
    assert relative_error({"x": (a, a)}, {"x": (a, a * 2)}) == pytest.approx(0.5)
    assert relative_error(a * torch.nan, a) == math.inf
    for other in (a[:1], a.double(), [a]):
        with pytest.raises(AssertionError):
            relative_error(other, a)


def test_plan_text() -> None:
    assert plan_text([(6, "0.55")], 11) == "6(55%)+11"
    assert plan_text([(4, 0.3), (7, 0.3)], 10) == "4,7(30%,30%)+10"
    assert plan_text([(6, "0.125")], fused=True) == "6(12.5%)+fused"
