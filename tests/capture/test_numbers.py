"""A number that changes at every call, such as a temperature: one graph takes it if it is only a factor."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import skipvit_fx
from skipvit_fx.errors import GuardError
from skipvit_fx.graph.more_graphs import MOST_CALLS
from support.client_models import pixels, vit
from support.models import layout_of
from support.reference import masked_reference, relative_error

PLAN = "1(50%)+3"
STAGES: Any = {"stages": [(1, "0.5")], "return_layer": 3}
VALUES = [1.0, 0.3, 2.5, -1.0, 0.0, 7.0, *(0.1 * i for i in range(20))]


class Scaled(nn.Module):
    """A model that takes a number; `how` is what it does with it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.model = vit(depth=2)
        self.how = how

    def forward(self, x: Tensor, t: float = 1.0, *, shift: int = 0) -> Tensor:
        model, how = self.model, self.how
        x = model.patch_embed(x)
        x = model._pos_embed(x)
        for block in model.blocks:
            x = block(x * (1 + t * 0.1)) + shift if how == "inside" else block(x)
        if how == "cut":
            x = x[:, : max(int(t), 1)]
        if how == "branch":
            x = x * 2 if t > 0.5 else x
        out: Tensor = model.forward_head(model.norm(x))
        return out * t + shift if how == "outside" else out


def rewritten(model: nn.Module) -> Any:
    return skipvit_fx.rewrite(model, PLAN, example_inputs=pixels())


def calls(fast: Any) -> int:
    return len(fast.own.calls)


def wanted(model: Any, t: float, shift: int = 0) -> Tensor:
    whole = masked_reference(
        _Called(model, t, shift).eval(), pixels(), layout_of(model.model), **STAGES
    ).output
    assert isinstance(whole, Tensor)
    return whole


class _Called(nn.Module):
    def __init__(self, model: nn.Module, t: float, shift: int) -> None:
        super().__init__()
        self.model, self.t, self.shift = model, t, shift

    def forward(self, x: Tensor) -> Any:
        return self.model(x, self.t, shift=self.shift)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["inside", "outside"])
def test_a_factor(how: str) -> None:
    model = Scaled(how).eval()
    fast = rewritten(model)
    with torch.no_grad():
        for i, t in enumerate(VALUES):
            got = fast(pixels(), t, shift=i) if i % 2 else fast(pixels(), t=t, shift=i)
            assert relative_error(got, wanted(model, t, i)) < 1e-5
        assert calls(fast) <= 4  # the default, the first other value, and what takes any
        assert relative_error(fast(pixels()), wanted(model, 1.0)) < 1e-5
        for copied in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            assert calls(copied) == calls(fast)
            got = copied(pixels(), 0.77, shift=3)
            assert relative_error(got, wanted(model, 0.77, 3)) < 1e-5
            assert calls(copied) == calls(fast)


@pytest.mark.slow
def test_a_factor_that_is_compiled() -> None:
    model = Scaled("inside").eval()
    fast = rewritten(model)
    with torch.no_grad():
        for t in (0.1, 0.2, 0.3):
            fast(pixels(), t)
        before = calls(fast)
        compiled: Any = torch.compile(fast, backend="eager", fullgraph=True)
        for t in (0.4, 0.5, 0.6):
            assert relative_error(compiled(pixels(), t), wanted(model, t)) < 1e-5
    assert calls(fast) == before


@pytest.mark.slow
def test_a_branch_is_guarded() -> None:
    model = Scaled("branch").eval()
    fast = rewritten(model)
    with torch.no_grad():
        for t in (0.1, 0.2, 0.9, 0.3, 0.8, 0.4):
            assert relative_error(fast(pixels(), t), wanted(model, t)) < 1e-5
    assert calls(fast) <= 5


@pytest.mark.slow
def test_what_decides_a_shape_has_a_graph_for_each_value() -> None:
    model = Scaled("cut").eval()
    fast = rewritten(model)
    with torch.no_grad():
        for t in (1.0, 2.0, 3.0):
            out: Tensor = fast(pixels(), t)
            assert relative_error(out, wanted(model, t)) < 1e-5
        assert calls(fast) == 3
        fast.own.calls *= MOST_CALLS
        with pytest.raises(GuardError, match=f"{MOST_CALLS} ways"):
            fast(pixels(), 4.0)
