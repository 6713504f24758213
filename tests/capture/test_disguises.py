"""Models that hold surprising attributes, or run something other than their class's forward."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import skipvit_fx
from skipvit_fx.errors import TraceError
from support.checks import rewrite
from support.models import scramble
from support.odd_models import DIM, Block, Odd, image
from support.once import made_once

PLAN = "1(40%)+3"


def odd(make: type[Odd] = Odd) -> Odd:
    return scramble(make([Block() for _ in range(2)])).eval()


@made_once
def odd_and_rewrite() -> tuple[Odd, Any]:
    model = odd()
    return model, rewrite(model, PLAN)


def assert_skips_like(fast: Any, wanted: Tensor, model: nn.Module) -> None:
    """``fast`` computes ``wanted``, which is not what ``model`` computes, and ``model``'s with skipping off."""
    with torch.no_grad():
        torch.testing.assert_close(fast(image()), wanted, rtol=1e-5, atol=1e-5)
        full = model(image())
        assert (full - wanted).abs().max() > 1e-2
        skipvit_fx.set_skipping(fast, False)
        assert torch.equal(fast(image()), full)


# -- attributes ----------------------------------------------------------------------------------------------------


def test_attributes_of_any_name() -> None:
    factors = dict.fromkeys(
        ["enabled", "drops", "defaults", "built_in", "author", "train_only"], 0.7
    )

    class Named(Odd):
        def layers(self, x: Tensor) -> Tensor:
            for name in factors:
                x = x * getattr(self, name)
            return super().layers(x)

    model, plain = odd(Named), odd()
    vars(model).update(factors)
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        for tensor in (plain.embed.weight, plain.embed.bias, plain.cls_token, plain.pos):
            tensor.mul_(0.7 ** len(factors))
        wanted = rewrite(plain, PLAN)(image())
    fast = rewrite(model, PLAN)
    assert {name: getattr(fast, name) for name in factors} == factors
    assert_skips_like(fast, wanted, model)


@pytest.mark.parametrize("kind", ["child", "parameter", "attribute"])
@pytest.mark.parametrize("name", ["skipvit", "skipping", "own", "graph", "meta", "recompile"])
def test_names_that_a_rewritten_model_needs(kind: str, name: str) -> None:
    model = odd()
    things = {"child": nn.Linear(DIM, DIM), "parameter": nn.Parameter(torch.ones(DIM))}
    setattr(model, name, things.get(kind, 2.0))
    with pytest.raises(TraceError, match=f"needs for itself: {name}") as caught:
        rewrite(model, PLAN)
    assert "child" in caught.value.hint


def test_within_a_wrapper_any_name_will_do() -> None:
    class Wrapper(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.model(x)
            return y

    model, plain = odd_and_rewrite()
    wanted = plain(image()).detach()
    model.skipping = nn.Parameter(torch.ones(DIM))
    assert_skips_like(rewrite(Wrapper(model), PLAN), wanted, model)


# -- another forward -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
@pytest.mark.parametrize("place", ["", "blocks.1"])
def test_a_method_put_on_the_object_is_its_forward(place: str, frontend: str) -> None:
    def halved(self: Any, x: Tensor) -> Any:
        return written(self, x) * 0.5

    model, subclassed = odd(), odd()
    patched, other = model.get_submodule(place), subclassed.get_submodule(place)
    written = type(patched).forward
    patched.forward = types.MethodType(halved, patched)
    other.__class__ = type("Halved", (type(other),), {"forward": halved})
    wanted = rewrite(subclassed, PLAN, frontend=frontend)(image()).detach()
    assert_skips_like(rewrite(model, PLAN, frontend=frontend), wanted, model)


def _closure(module: nn.Module) -> None:
    before = module.forward
    module.forward = lambda x: before(x)


def _partial(module: nn.Module) -> None:
    module.forward = functools.partial(type(module).forward, module)


@pytest.mark.parametrize("patch", [_closure, _partial])
@pytest.mark.parametrize("place", ["", "blocks.1", "blocks.1.mlp"])
def test_a_function_in_place_of_a_forward_is_refused(
    place: str, patch: Callable[[nn.Module], None]
) -> None:
    model = odd()
    patch(model.get_submodule(place))
    with pytest.raises(TraceError, match=f"module '{place or '<root>'}'.*not its method"):
        rewrite(model, PLAN)


def test_a_call_that_is_no_forward_is_refused() -> None:
    class Doubled(Odd):
        def __call__(self, x: Tensor) -> Any:
            return super().__call__(x) * 2

    with pytest.raises(TraceError, match=r"called through .*Doubled\.__call__"):
        rewrite(odd(Doubled), PLAN)


def test_a_compiled_model_is_refused() -> None:
    with pytest.raises(TraceError, match=r"OptimizedModule, was compiled") as caught:
        rewrite(torch.compile(odd(), backend="eager"), PLAN)
    assert "compile, wrap or patch what rewrite returns" in caught.value.hint


def test_a_scripted_model_is_refused() -> None:
    with pytest.warns((FutureWarning, DeprecationWarning), match="deprecated"):
        scripted = torch.jit.trace(odd(), image())
    with pytest.raises(TraceError, match="compiled by TorchScript"):
        rewrite(scripted, PLAN)


@pytest.mark.parametrize("place", ["", "blocks.1"])
def test_a_module_compiled_in_place(place: str) -> None:
    model, plain = odd_and_rewrite()
    wanted = plain(image()).detach()
    model.get_submodule(place).compile(backend="eager")
    assert_skips_like(rewrite(model, PLAN), wanted, model)


def test_a_traced_model() -> None:
    model, plain = odd_and_rewrite()
    wanted = plain(image()).detach()
    assert_skips_like(rewrite(fx.symbolic_trace(model), PLAN), wanted, model)
