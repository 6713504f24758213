"""Which axis of a tensor carries the tokens: the abstract values of the token analysis.

Every dimension of a tensor is a product of factors. A plain factor is an ``int``; :class:`Tokens` and :class:`Batch`
stand for the token axis and the batch axis, even after merging with others into one dimension, as in
``[batch * heads, tokens, channels]``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor


class MixesTokens(Exception):  # noqa: N818 - a finding of the analysis, caught within it
    """An operator does not keep tokens and samples apart, or is not known to."""


class PoolsTokens(MixesTokens):
    """A reduction over the whole token axis: sound where only the remaining tokens should be read."""


class Tokens(NamedTuple):
    """The token axis: ``prefix`` prefix rows, then ``patches`` patch rows, then ``suffix`` rows.

    ``weights`` marks the key axis of a softmax, which depends on all tokens. It may only be summed over, with values,
    and only while a missing token would have weight zero; ``nonzero`` says that this no longer holds.
    """

    prefix: int
    patches: int
    suffix: int
    weights: bool = False
    nonzero: bool = False


class Batch(NamedTuple):
    """The batch axis."""

    samples: int


Factor: TypeAlias = int | Tokens | Batch
Dim: TypeAlias = tuple[Factor, ...]
Axes: TypeAlias = tuple[Dim, ...]


def size(factor: Factor) -> int:
    """The length of one factor."""
    if isinstance(factor, Tokens):
        return factor.prefix + factor.patches + factor.suffix
    return factor.samples if isinstance(factor, Batch) else factor


def lengths(axes: Axes) -> tuple[int, ...]:
    """The shape of a tensor that has these axes."""
    return tuple(math.prod(size(factor) for factor in dim) for dim in axes)


def tokens_of(dim: Dim) -> Tokens | None:
    """The token factor of one dimension, if it has one."""
    return next((factor for factor in dim if isinstance(factor, Tokens)), None)


def batch_of(dim: Dim) -> Batch | None:
    """The batch factor of one dimension, if it has one."""
    return next((factor for factor in dim if isinstance(factor, Batch)), None)


def has_tokens(axes: Axes | None) -> bool:
    """Whether any dimension carries tokens."""
    return axes is not None and any(tokens_of(dim) for dim in axes)


def token_dim(axes: Axes) -> int:
    """The only dimension that carries tokens.

    Raises:
        MixesTokens: there are none, or two (an attention matrix).
    """
    dims = [d for d, dim in enumerate(axes) if tokens_of(dim)]
    if len(dims) != 1:
        raise MixesTokens(f"expected one token axis, found {len(dims)}")
    return dims[0]


def plain_token_dim(axes: Axes | None) -> int | None:
    """The dimension that is a token axis and nothing else, if it is the only one with tokens."""
    dims = [d for d, dim in enumerate(axes or ()) if tokens_of(dim)]
    return dims[0] if axes and len(dims) == 1 and len(axes[dims[0]]) == 1 else None


def plain(shape: Sequence[int]) -> Axes:
    """The axes of a tensor without tokens."""
    return tuple((s,) if s != 1 else () for s in shape)


def nonzero(axes: Axes) -> Axes:
    """The same axes, with a note that a missing token need not have weight zero."""
    return tuple(
        tuple(f._replace(nonzero=f.weights) if isinstance(f, Tokens) else f for f in dim)
        for dim in axes
    )


def merge_ints(factors: Iterable[Factor]) -> Dim:
    """The factors with neighbouring plain ones merged and ones left out."""
    merged: list[Factor] = []
    for factor in factors:
        last = merged[-1] if merged else None
        if factor == 1:
            continue
        if isinstance(factor, int) and isinstance(last, int):
            merged[-1] = last * factor
        else:
            merged.append(factor)
    return tuple(merged)


def regroup(axes: Axes, shape: Sequence[int]) -> Axes:
    """The axes after a reshape to ``shape``: factors keep their order, and only plain ones may be split.

    Raises:
        MixesTokens: the reshape cuts the token axis or the batch axis (a grid, a window).
    """
    queue = [factor for dim in axes for factor in dim if factor != 1]
    result: list[Dim] = []
    for wanted in shape:
        taken: list[Factor] = []
        product = 1
        if wanted == 1 and queue and not isinstance(queue[0], int) and size(queue[0]) == 1:
            taken.append(queue.pop(0))  # a batch of one
        while product < wanted:
            if not queue:
                raise MixesTokens("a reshape whose sizes do not fit together")
            factor = queue.pop(0)
            rest = wanted // product
            if wanted % product == 0 and rest % size(factor) == 0:
                taken.append(factor)
                product *= size(factor)
            elif isinstance(factor, int) and wanted % product == 0 and factor % rest == 0:
                taken.append(rest)
                queue.insert(0, factor // rest)
                product = wanted
            else:
                raise MixesTokens(f"a reshape to {list(shape)} cuts the token axis into pieces")
        result.append(merge_ints(taken))
    if queue:
        raise MixesTokens("a reshape whose sizes do not fit together")
    return tuple(result)


_LABEL = "_skipvit_axes"
_LOST = "_skipvit_lost"
_DATA = "_skipvit_data"


def axes_of(tensor: Tensor) -> Axes | None:
    """The axes of a tensor that has a token axis, else ``None``."""
    return getattr(tensor, _LABEL, None)


def set_axes(tensor: Tensor, axes: Axes | None) -> None:
    """Label a tensor with ``axes``; without a token factor in them it gets no label."""
    setattr(tensor, _LABEL, axes if has_tokens(axes) else None)


def is_data(tensor: Tensor) -> bool:
    """Whether the tensor depends on the model's input."""
    return getattr(tensor, _DATA, False)


def mark_data(tensor: Tensor) -> None:
    """Note that the tensor depends on the model's input."""
    setattr(tensor, _DATA, True)


def is_lost(tensor: Tensor) -> bool:
    """Whether a token axis was lost on the way to this tensor."""
    return getattr(tensor, _LOST, False)


def mark_lost(tensor: Tensor) -> None:
    """Note that a token axis was lost on the way to this tensor."""
    setattr(tensor, _LOST, True)


def tensors_in(tree: Any) -> list[Tensor]:
    """Every tensor in nested tuples, lists and dicts, in order."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        return [t for value in tree.values() for t in tensors_in(value)]
    if isinstance(tree, (tuple, list)):
        return [t for value in tree for t in tensors_in(value)]
    return []
