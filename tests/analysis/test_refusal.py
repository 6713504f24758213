"""What cannot be rewritten soundly is refused, with the place, the reason and what to try."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import skipvit_fx
from skipvit_fx.errors import TraceError, UnsupportedModelError
from support.checks import assert_exact, rewrite
from support.models import REFUSED, Refused, names
from support.odd_models import BAD, DEPTH, MIXERS, POSITIONAL, TOKENS, Example, Odd, image, mixing
from support.reference import relative_error

Plan = dict[str, Any]
SPAN: Plan = {"stages": [(1, "0.5")], "return_layer": DEPTH}  # around all of layers 2 and 3
PLACES = ["leaf", "traced"]


def assert_refused(model: Any, x: Tensor, plan: Plan = SPAN, *, within: str = "") -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        rewrite(model, plan, x)
    error = caught.value
    assert error.reason
    assert error.hint
    assert error.node
    assert error.module_path.startswith(within)
    assert error.node in str(error)
    assert error.reason in str(error)


def assert_accepted(model: Odd, plan: Plan) -> None:
    assert_exact(rewrite(model, plan), model, image(batch=3), model.layout(), plan)


@pytest.mark.parametrize("refused", REFUSED, ids=names(REFUSED))
def test_other_architectures(refused: Refused) -> None:
    model, x = refused.build(), refused.input()
    with torch.no_grad():
        model(x)
    with pytest.raises((UnsupportedModelError, TraceError)) as caught:
        skipvit_fx.rewrite(model, "2(50%)+3", example_inputs=(x,))
    assert caught.value.hint
    assert str(caught.value)
    if isinstance(caught.value, UnsupportedModelError):
        assert caught.value.reason


@pytest.mark.parametrize("example", BAD, ids=str)
def test_attention_that_is_none_of_ours(example: Example) -> None:
    model = example.build()
    with pytest.raises(UnsupportedModelError) as caught:
        rewrite(model, SPAN, image())
    assert caught.value.reason
    assert caught.value.hint


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", sorted(set(MIXERS) - POSITIONAL))
def test_mixing_in_the_span(name: str, place: str) -> None:
    assert_refused(mixing(name, place, layer=2), image(), within="blocks.1")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name.startswith("batch-norm") else [])
        for name in sorted(POSITIONAL)
    ],
)
def test_position_in_the_span_is_right_or_refused(name: str, place: str) -> None:
    model = mixing(name, place, layer=2)
    try:
        assert_accepted(model, SPAN)
    except UnsupportedModelError as error:
        refusal = error
    else:
        return
    assert refusal.reason
    assert refusal.hint
    assert refusal.node


@pytest.mark.parametrize("name", ["roll", "mean-token", "conv1d", "flip"])
@pytest.mark.slow
def test_mixing_in_the_ffn_of_the_cut_layer_is_in_the_span(name: str) -> None:
    assert_refused(mixing(name, "leaf", layer=1), image(), within="blocks.0")
    assert_accepted(mixing(name, "leaf", layer=1), {**SPAN, "cut": "block"})


@pytest.mark.parametrize("name", ["roll", "mean-token", "conv1d", "flip"])
@pytest.mark.parametrize("layer", [2, 3, 4])
def test_without_return_the_span_goes_on_to_the_end(name: str, layer: int) -> None:
    plan: Plan = {"stages": [(2, "0.5")]}
    assert_refused(mixing(name, "leaf", layer), image(), plan, within=f"blocks.{layer - 1}")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if index % 3 else [])
        for index, name in enumerate(sorted(MIXERS))
    ],
)
def test_mixing_after_the_return_is_no_obstacle(name: str) -> None:
    assert_accepted(mixing(name, "leaf", layer=4), SPAN)


@pytest.mark.parametrize("name", ["roll", "mean-token", "grid-conv", "sort", "linear-over-tokens"])
@pytest.mark.parametrize("place", PLACES)
def test_mixing_before_the_cut_is_no_obstacle(name: str, place: str) -> None:
    assert_accepted(mixing(name, place, layer=1), {"stages": [(2, "0.5")], "return_layer": 4})


@pytest.mark.parametrize("name", ["roll", "mean-token", "grid-conv", "sort", "linear-over-tokens"])
def test_mixing_before_the_scoring_attention_is_right_or_refused(name: str) -> None:
    """The keys that are scored there need not be the tokens that would leave."""
    try:
        assert_accepted(
            mixing(name, "traced", layer=2), {"stages": [(2, "0.5")], "return_layer": 4}
        )
    except UnsupportedModelError as error:
        refusal = error
    else:
        return
    assert refusal.reason
    assert refusal.hint


def test_nothing_dropped_needs_no_refusal_but_may() -> None:
    """At 0 % a model that mixes is the model, if it is accepted at all."""
    model, x = mixing("roll", "leaf", layer=2), image()
    try:
        fast = rewrite(model, {"stages": [(1, "0")], "return_layer": 4}, x)
    except UnsupportedModelError:
        return
    with torch.no_grad():
        assert torch.equal(fast(x), model(x))


# The examples themselves: a mixer is one because it does not commute with taking tokens away.


@pytest.mark.parametrize("name", sorted(MIXERS))
def test_mixers_do_not_commute_with_dropping(name: str) -> None:
    mix = MIXERS[name]()
    if isinstance(mix, torch.nn.Module):
        mix.eval()
    x = torch.randn(2, TOKENS, 32, generator=torch.Generator().manual_seed(0))
    kept = [0, 1, 4, 5, 8, 9, 13, 16, 20]
    with torch.no_grad():
        if name == "batch-norm-over-tokens":
            mix.inner.bias.copy_(torch.arange(TOKENS))  # type: ignore[attr-defined]
        if name == "first-patch":
            kept.remove(1)
        if name == "last-token":
            kept.remove(20)
        whole = mix(x)
        assert whole.shape == x.shape
        try:
            short = mix(x[:, kept])
        except RuntimeError:
            return  # it cannot even be done
        assert relative_error(short, whole[:, kept]) > 1e-3
