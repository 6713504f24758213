"""Where patches are is told by what the model sees there, or not at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import skipvit_fx
from skipvit_fx.reports.grid import Grid, find_grid
from support.models import BY_NAME, FAMILIES
from support.tiny import Tiny


class Ordered(Tiny):
    """Patches in an order of the test's choice."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.order = order

    def tokens(self, x: Tensor, states: list[Tensor] | None = None) -> Tensor:
        grid = self.embed(x)
        if self.order == "columns":
            grid = grid.transpose(2, 3)
        elif self.order == "right to left":
            grid = grid.flip(3)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), grid.flatten(2).transpose(1, 2)], 1)
        for block in self.blocks:
            x = block(x)
        return x


class Oblong(Tiny):
    """Patches of 8 x 2 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Conv2d(3, 8, (8, 2), (8, 2))


def rewritten(model: torch.nn.Module, x: Tensor) -> Any:
    return skipvit_fx.rewrite(model.eval(), "1(50%)+3", example_inputs=x, validate=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", [family.name for family in FAMILIES])
def test_every_family(name: str) -> None:
    """With prefix tokens, without, with overlapping patches, not square."""
    family = BY_NAME[name]
    x = family.input(2)
    fast = skipvit_fx.rewrite(family.build(), "2(50%)+4", example_inputs=x, validate=False)
    patches = skipvit_fx.trace_tokens(fast, x)[0].scores.shape[1]
    height, width = family.image
    grid = find_grid(fast, (x,), {})
    assert grid is not None
    assert grid.rows * grid.columns == patches
    assert grid.rows / grid.columns == height / width


def test_rows_from_left_to_right() -> None:
    x = torch.rand(2, 3, 16, 16)
    assert find_grid(rewritten(Tiny(), x), (x,), {}) == Grid(4, 4)


@pytest.mark.parametrize("order", ["columns", "right to left"])
def test_another_order_is_not_taken_for_rows(order: str) -> None:
    x = torch.rand(2, 3, 16, 16)
    assert find_grid(rewritten(Ordered(order), x), (x,), {}) is None


def test_an_oblong_image_with_registers() -> None:
    family = BY_NAME["dinov2-reg4"]
    x = family.input(2)
    fast = skipvit_fx.rewrite(family.build(depth=1), "1(50%)", example_inputs=x, validate=False)
    assert find_grid(fast, (x,), {}) == Grid(4, 6)


def test_patches_that_are_not_square() -> None:
    x = torch.rand(2, 3, 16, 16)
    assert find_grid(rewritten(Oblong(), x), (x,), {}) == Grid(2, 8)


def test_nothing_stays_behind() -> None:
    x = torch.rand(2, 3, 16, 16)
    fast = rewritten(Tiny(), x).train()
    skipvit_fx.set_skipping(fast, False)
    before = x.clone()
    assert find_grid(fast, (x,), {}) == Grid(4, 4)
    assert torch.equal(x, before)
    assert fast.training
    assert not fast.skipping


def test_without_an_image_there_is_no_grid() -> None:
    x = torch.rand(2, 3, 16, 16)
    assert find_grid(rewritten(Tiny(), x), (x.long(),), {}) is None
