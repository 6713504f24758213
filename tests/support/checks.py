"""Rewrites as tests ask for them, and what must hold of each."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import skipvit_fx
from support.odd_models import image
from support.once import made_once
from support.reference import (
    ReferenceResult,
    assert_same_tokens,
    masked_reference,
    plan_text,
    relative_error,
)

TOLERANCE = 1e-4


def rewrite(
    model: nn.Module,
    plan: str | dict[str, Any],
    x: Any = ...,
    *,
    fused: bool = False,
    **options: Any,
) -> Any:
    """``model`` rewritten.

    Args:
        plan: as text, or as the reference takes it.
        x: the example; by default two images as the odd models take them, ``None`` for the model's own.
    """
    if isinstance(plan, dict):
        options |= {"cut": plan["cut"]} if "cut" in plan else {}
        plan = plan_text(plan["stages"], plan.get("return_layer"), fused)
    example = image() if x is ... else x
    return skipvit_fx.rewrite(model, plan, example_inputs=example, **options)


@made_once
def fast_vit_small() -> Any:
    """With the plan of the README."""
    return skipvit_fx.rewrite(timm.create_model("vit_small_patch16_224").eval(), "6(55%)+11")


def assert_exact(fast: Any, model: nn.Module, x: Any, layout: Any, plan: dict[str, Any]) -> None:
    """Same output and same tokens as the reference."""
    with torch.no_grad():
        wanted = masked_reference(model, x, layout, **plan)
    assert_matches(fast, x, wanted)


def assert_matches(fast: Any, x: Any, wanted: ReferenceResult) -> None:
    """Same output and same tokens as a reference, which must be worth comparing with."""
    for stage in wanted.stages:
        assert stage.margin > 1e-6, "the reference is at a tie: choose another seed"
    with torch.no_grad():
        got = fast(x)
        assert type(got) is type(wanted.output)
        assert relative_error(got, wanted.output) < TOLERANCE
        assert_same_tokens(skipvit_fx.trace_tokens(fast, x), wanted.stages)


def assert_same_bits(got: Any, wanted: Any) -> None:
    """The same class, and the same tensors in it, to the last bit."""
    assert type(got) is type(wanted)
    pairs = list(zip(tree_leaves(got), tree_leaves(wanted), strict=True))
    assert any(isinstance(b, Tensor) for _, b in pairs)
    assert all(torch.equal(a, b) for a, b in pairs if isinstance(b, Tensor))
