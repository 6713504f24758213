"""The example inputs of an export, and its batch size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from skipvit_fx.capture.example import (
    arguments_of,
    batch_size,
    example_from_config,
    floating_like,
    has_samples,
)
from skipvit_fx.errors import ExportError
from skipvit_fx.export.profiles import Profile
from skipvit_fx.graph.record import find_record
from skipvit_fx.torch_internals import pytree

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments."""


def inputs_of(
    model: nn.Module, example: Any, batch: int | str | None, profile: Profile
) -> tuple[Arguments, int | None]:
    """Example inputs of the batch size to export, and that size; ``None`` if it is dynamic.

    Raises:
        ExportError: the batch size is invalid, does not fit the example or is not possible for this profile.
    """
    if isinstance(batch, str):
        if batch != "dynamic" or profile.fixed_batch:
            raise ExportError(
                f"batch={batch!r} is not possible for target {profile.name!r}",
                hint="give a number"
                + ("" if profile.fixed_batch else " or 'dynamic'")
                + "; write one file for each batch size that is served",
            )
    elif batch is not None and (not isinstance(batch, int) or batch < 1):
        raise ExportError(
            f"a batch of {batch} is not possible", hint="give a batch size of 1 or more"
        )
    dynamic = batch == "dynamic" or (batch is None and not profile.fixed_batch)
    given = arguments_of(example) if example is not None else _own_example(model)
    own = batch_size(*given)
    if own is None:
        raise ExportError(
            "there is no image among the example inputs", hint="pass example_inputs=(images,)"
        )
    if isinstance(batch, int) and example is not None and own != batch:
        raise ExportError(
            f"batch={batch}, but the example inputs have a batch of {own}",
            hint="leave one of the two out",
        )
    if dynamic:  # a size of 1 would be mistaken for a broadcast
        return _with_batch(given, own, max(own, 2)), None
    size = batch if isinstance(batch, int) else own if example is not None else 1
    return _with_batch(given, own, size), size


def _own_example(model: nn.Module) -> Arguments:
    record = find_record(model)
    if record is None:
        return example_from_config(model), {}
    like = floating_like(model)

    def made(leaf: Any) -> Any:
        return torch.zeros_like(leaf, device=like.device) if isinstance(leaf, Tensor) else leaf

    args, kwargs = pytree.tree_map(made, (record.args, record.kwargs))
    return tuple(args), dict(kwargs)


def _with_batch(inputs: Arguments, own: int, batch: int) -> Arguments:
    def sized(leaf: Any) -> Any:
        if own == batch or not has_samples(leaf, own):
            return leaf
        return leaf[:1].expand(batch, *leaf.shape[1:]).clone()

    args, kwargs = pytree.tree_map(sized, inputs)
    return args, kwargs
