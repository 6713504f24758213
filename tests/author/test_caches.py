"""Caching functions that were made after the last import: found where a model's code can reach them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import skipvit_fx
from skipvit_fx.author.caches import caches_of
from support.client_models import PLAN, pixels, vit


def table() -> Callable[[int], Tensor]:
    @functools.lru_cache
    def made(channels: int) -> Tensor:
        return torch.linspace(0.5, 1.5, channels)

    return made


class Norm(nn.Module):
    """A norm times a table that is kept; `get` is where it comes from."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)

    def get(self, channels: int) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x) * self.get(x.shape[-1])
        return out


def in_an_attribute() -> tuple[nn.Module, Any]:
    class Kept(Norm):
        def get(self, channels: int) -> Tensor:
            made: Tensor = self.tables["of channels"][0](channels)
            return made

    module, found = Kept(), table()
    module.tables = {"of channels": [found]}
    return module, found


def in_a_closure() -> tuple[nn.Module, Any]:
    found = table()

    class Kept(Norm):
        def get(self, channels: int) -> Tensor:
            return found(channels)

    return Kept(), found


def in_a_class() -> tuple[nn.Module, Any]:
    class Kept(Norm):
        made = staticmethod(table())

        def get(self, channels: int) -> Tensor:
            return self.made(channels)

    return Kept(), Kept.made


def under_a_new_name() -> tuple[nn.Module, Any]:
    globals()["late"] = found = table()

    class Kept(Norm):
        def get(self, channels: int) -> Tensor:
            made: Tensor = globals()["late"](channels)
            return made

    return Kept(), found


def in_a_property() -> tuple[nn.Module, Any]:
    found = table()

    class Kept(Norm):
        @property
        def made(self) -> Callable[[int], Tensor]:
            return found

        def get(self, channels: int) -> Tensor:
            return self.made(channels)

    return Kept(), found


PLACES = [in_an_attribute, in_a_closure, in_a_class, under_a_new_name, in_a_property]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.slow
def test_a_new_cache_is_found_and_left_as_it_was(
    place: Callable[[], tuple[nn.Module, Any]],
) -> None:
    caches_of(nn.Linear(1, 1))  # all imports are known
    module, cache = place()
    model: Any = vit(depth=3)
    model.norm = module
    assert any(found is cache for found in caches_of(model))
    fast = skipvit_fx.rewrite(model, PLAN, example_inputs=pixels(), validate=False)
    assert not cache.cache_info().currsize  # what the capture put in was fake
    with torch.no_grad():
        assert fast(pixels()).isfinite().all()
        assert type(cache(32)) is Tensor
