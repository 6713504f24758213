"""Fake tensors: shapes, dtypes and devices without data."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree


def new_fake_mode() -> FakeTensorMode:
    """A mode under which real parameters may meet fake activations, and nothing is computed."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def fake_inputs(mode: FakeTensorMode, example: Any, *, more_batch: int = 0) -> Any:
    """``example`` with every tensor made fake, its batch axis (axis 0) longer by ``more_batch``."""

    def fake(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if more_batch and leaf.ndim:
            with mode:
                return torch.empty(
                    (leaf.shape[0] + more_batch, *leaf.shape[1:]),
                    dtype=leaf.dtype,
                    device=leaf.device,
                )
        return mode.from_tensor(leaf.detach(), static_shapes=True)

    return pytree.tree_map(fake, example)
