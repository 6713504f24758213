"""Models for the report: with names that are markup, and with patches that are in no grid."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import skipvit_fx
from support.tiny import Block, Tiny

SCRIPT = "<script>alert(1)</script>"


class Hostile(Tiny):
    """A block and classes whose names would run a script in a page that does not escape them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks.add_module(SCRIPT, Block())
        self.config = SimpleNamespace(
            num_labels=5, id2label={i: f"{SCRIPT}<!-- {i}" for i in range(5)}
        )


def hostile() -> tuple[Any, Tensor]:
    """It, rewritten, and images."""
    x = torch.rand(2, 3, 16, 16)
    return (
        skipvit_fx.rewrite(Hostile().eval(), "1(50%)+3", example_inputs=x, validate=False),
        x,
    )


class Shuffled(Tiny):
    """Its patches are in an order of their own."""

    def __init__(self) -> None:
        super().__init__()
        order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
        self.register_buffer("order", order)

    def tokens(self, x: Tensor, states: list[Tensor] | None = None) -> Tensor:
        patches = self.embed(x).flatten(2).transpose(1, 2)[:, self.order]
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), patches], 1)
        for block in self.blocks:
            x = block(x)
        return x
