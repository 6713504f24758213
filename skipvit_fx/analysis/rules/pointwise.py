"""Operators that treat every element alone, and what is broadcast."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from skipvit_fx.analysis.axes import (
    Axes,
    Dim,
    MixesTokens,
    Tokens,
    axes_of,
    merge_ints,
    plain,
    size,
    tensors_in,
    tokens_of,
)
from skipvit_fx.analysis.rules.call import (
    Call,
    Position,
    labelled_self,
    only_tokens,
    rule,
)

aten = torch.ops.aten


def pointwise(call: Call) -> Axes:
    """Token axes that line up stay; an operand of fixed token length is noted as a :class:`Position`."""
    out = call.out[0] if isinstance(call.out, (tuple, list)) else call.out
    operands = [t for t in tensors_in((call.args, call.kwargs)) if t.ndim]
    return align(call, [(t, axes_of(t)) for t in operands], tuple(out.shape))


def align(call: Call, operands: Sequence[tuple[Tensor, Axes | None]], shape: Sequence[int]) -> Axes:
    """The axes of operands that are broadcast to ``shape``; notes operands of fixed token length in the call.

    Every operand comes with its axes, ``None`` for one without tokens.

    Raises:
        MixesTokens: token axes meet that are out of step.
    """
    rank = len(shape)
    result: list[Dim] = []
    noted: dict[tuple[int, int], Tokens] = {}
    for d in range(rank):
        present = []
        for i, (tensor, axes) in enumerate(operands):
            own = d - rank + tensor.ndim
            if own >= 0 and tensor.shape[own] != 1:
                present.append((i, own, (axes or plain(tensor.shape))[own]))
        with_tokens = {dim for _, _, dim in present if tokens_of(dim)}
        if len(with_tokens) > 1:
            raise MixesTokens(f"token axes that are out of step meet in {call.func.overloadpacket}")
        if not with_tokens:
            labelled = [dim for i, _, dim in present if operands[i][1] is not None]
            result.append(next(iter(labelled), merge_ints((shape[d],))))
            continue
        (dim,) = with_tokens
        result.append(dim)
        for i, own, other in present:
            if not tokens_of(other):
                tokens = only_tokens(dim, "an operand of fixed length")
                assert tokens is not None
                if operands[i][1] is not None:
                    raise MixesTokens(
                        "a token axis meets an axis of fixed length that moves with tokens"
                    )
                noted[i, own] = tokens
    batch = next((d for d, dim in enumerate(result) if _is_batch(dim)), None)
    for (i, own), tokens in noted.items():
        operand = operands[i][0]
        per_sample, repeat = False, 1
        if batch is not None:
            at = batch - rank + operand.ndim
            per_sample = at >= 0 and operand.shape[at] != 1
            repeat = math.prod(size(factor) for factor in result[batch][1:])
        call.positions.append(Position(operand, own, tokens, rank, batch, per_sample, repeat))
    return tuple(result)


def _is_batch(dim: Dim) -> bool:
    return bool(dim) and not isinstance(dim[0], (int, Tokens))


@rule(
    aten._to_copy,
    aten.alias,
    aten.bernoulli,
    aten.copy,
    aten.copy_,
    aten.detach,
    aten.dropout,
    aten.hardswish,
    aten.native_dropout,
    aten.rsub,
    aten.floor_divide,
    aten._prelu_kernel,
    aten.rrelu_with_noise,
)
def _pointwise_untagged(call: Call) -> Axes:
    return pointwise(call)


@rule(
    aten.bernoulli_,
    aten.fill_,
    aten.normal_,
    aten.random_,
    aten.uniform_,
    aten.zero_,
    aten.empty_like,
    aten.full_like,
    aten.lift_fresh_copy,
    aten.ones_like,
    aten.rand_like,
    aten.randn_like,
    aten.zeros_like,
)
def _same_as_self(call: Call) -> Axes:
    return labelled_self(call)


@rule(aten.new_empty, aten.new_zeros, aten.new_ones, aten.new_full, aten.sym_size, aten.sym_numel)
def _unrelated(call: Call) -> None:
    return None
