"""Rewritten models for the tools in clients/, small enough for each of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import skipvit_fx
from support.models import BY_NAME, TORCHVISION
from support.once import made_once

TOLERANCE = 1e-4
CASES = {
    "vit": ("vit", "2(55%)+4"),
    "fused": ("vit", "1,3(30%,40%)+4+fused"),
    "beit": ("beit", "1,3(30%,40%)+4"),
    "torchvision": ("torchvision", "1,3(30%,40%)+4"),
    "tied": ("vit", "2(55%)+4"),
}
"""A family and a plan each; in the one that is tied, every patch scores like the others."""


class Rewritten(NamedTuple):
    """A model, its rewrite and images, in eval mode, with what the rewrite computes on them."""

    model: nn.Module
    fast: Any
    x: Tensor
    output: Tensor


@made_once
def rewritten(case: str) -> Rewritten:
    """A copy of its own for every test."""
    name, plan = CASES[case]
    family = TORCHVISION if name == "torchvision" else BY_NAME[name]
    model, x = family.build(), family.input(2)
    if case == "tied":
        _without_queries(model)
    fast = skipvit_fx.rewrite(model, plan, example_inputs=(x,)).eval()
    with torch.no_grad():
        return Rewritten(model, fast, x, fast(x))


def _without_queries(model: Any) -> None:
    with torch.no_grad():
        for block in model.blocks:
            width = block.attn.qkv.in_features
            block.attn.qkv.weight[:width] = 0
            block.attn.qkv.bias[:width] = 0


def gradients(module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Of every parameter that has one."""
    module.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_close(got: Any, wanted: Any) -> None:
    """Equal except for rounding."""
    torch.testing.assert_close(got, wanted, rtol=0, atol=TOLERANCE)
