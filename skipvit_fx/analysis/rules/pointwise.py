"""Elementwise operators, and broadcasting."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from skipvit_fx.analysis.axes import (
    Axes,
    Batch,
    Dim,
    MixesTokens,
    Tokens,
    axes_of,
    batch_of,
    merge_ints,
    nonzero,
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
from skipvit_fx.torch_internals import aten, overload_name

FACTORIES = (aten.new_empty, aten.new_zeros, aten.new_ones, aten.new_full)
"""Operators that take only dtype and device from their tensor."""


def pointwise(call: Call) -> list[Axes | None]:
    """Keep token axes that line up; an operand of fixed token length is noted as a :class:`Position`."""
    operands = [t for t in tensors_in((call.args, call.kwargs)) if t.ndim]
    axes = align(call, [(t, axes_of(t)) for t in operands], tuple(call.outs[0].shape))
    first = axes if _keeps_zeros(call) else nonzero(axes)
    return [first, *[nonzero(axes)] * (len(call.outs) - 1)]  # masks and the like


def align(call: Call, operands: Sequence[tuple[Tensor, Axes | None]], shape: Sequence[int]) -> Axes:
    """The axes of operands broadcast to ``shape``; notes operands of fixed token length in the call.

    Every operand comes with its axes, ``None`` for one without tokens.

    Raises:
        MixesTokens: token or batch axes that are out of step meet.
    """
    rank = len(shape)
    result: list[Dim] = []
    noted: dict[tuple[int, int], Tokens] = {}
    for d in range(rank):
        present = []
        for i, (tensor, axes) in enumerate(operands):
            own = d - rank + tensor.ndim
            if own >= 0 and (its := (axes or plain(tensor.shape))[own]):
                present.append((i, own, its))
        dim = _in_step(call, [dim for i, _, dim in present if operands[i][1] is not None])
        result.append(merge_ints((shape[d],)) if dim is None else dim)
        if dim is None or not tokens_of(dim):
            continue
        for i, own, _ in present:
            if operands[i][1] is None:
                tokens = only_tokens(dim, "an operand of fixed length")
                assert tokens is not None
                noted[i, own] = tokens
    batch = next((d for d, dim in enumerate(result) if dim and isinstance(dim[0], Batch)), None)
    for (i, own), tokens in noted.items():
        operand = operands[i][0]
        per_sample, repeat = False, 1
        if batch is not None:
            at = batch - rank + operand.ndim
            per_sample = at >= 0 and operand.shape[at] != 1
            repeat = math.prod(size(factor) for factor in result[batch][1:])
        call.positions.append(Position(operand, own, tokens, rank, batch, per_sample, repeat))
    return tuple(result)


def _in_step(call: Call, labelled: Sequence[Dim]) -> Dim | None:
    """The common dimension of the operands with tokens that meet here; ``None`` if there are none."""
    dims = list(dict.fromkeys(nonzero(tuple(labelled))))
    if not dims:
        return None
    if len(dims) == 1:  # weights times anything are weights
        return next((dim for dim in labelled if (dim,) != nonzero((dim,))), dims[0])
    if all(map(tokens_of, dims)):
        raise MixesTokens(f"token axes that are out of step meet in {call.name}")
    if any(map(tokens_of, dims)):
        raise MixesTokens("a token axis meets an axis of fixed length that moves with tokens")
    if any(map(batch_of, dims)):
        raise MixesTokens(f"{call.name} mixes the samples of a batch: they are out of step")
    raise MixesTokens(f"axes that are out of step meet in {call.name}")


_OF_WEIGHTS = frozenset(
    {aten._to_copy, aten.alias, aten.clone, aten.detach, aten.lift_fresh_copy, aten.neg, aten.relu}
    | {aten.abs, aten.sqrt, aten.dropout, aten.native_dropout, aten.mul, aten.mul_}
)
"""Operators under which zero stays zero, whatever the other operands."""


def _keeps_zeros(call: Call) -> bool:
    """Whether a zero weight is still zero afterwards.

    The bias of a linear layer that mixes heads is part of that layer, which appears here as a product and a sum. The
    bias is not zero, but that layer is defined on the tokens that are present.
    """
    packet = call.func.overloadpacket
    if packet in (aten.add, aten.sub, aten.add_, aten.sub_):
        other = call.argument("other")
        if not isinstance(other, Tensor) or not _weighs(call.self):
            return False
        return _weighs(other) or (other.ndim == 1 and not tokens_of(labelled_self(call)[-1]))
    if packet in (aten.div, aten.div_):
        other = call.argument("other")
        return not (isinstance(other, Tensor) and _weighs(other))
    if packet in (aten.pow, aten.pow_):
        exponent = call.argument("exponent")
        return isinstance(exponent, (int, float)) and exponent > 0
    if packet in (aten.masked_fill, aten.masked_fill_):
        return call.argument("value") == 0 if overload_name(call.func) == "Scalar" else False
    return packet in _OF_WEIGHTS


def _weighs(tensor: Tensor) -> bool:
    axes = axes_of(tensor)
    return axes is not None and axes != nonzero(axes)


@rule(
    aten._to_copy,
    aten.alias,
    aten.bernoulli,
    aten.bernoulli_,
    aten.copy,
    aten.copy_,
    aten.detach,
    aten.dropout,
    aten.hardswish,
    aten.lift_fresh_copy,
    aten.native_dropout,
    aten.rsub,
    aten.floor_divide,
    aten._prelu_kernel,
    aten.rrelu_with_noise,
)
def _pointwise_untagged(call: Call) -> list[Axes | None]:
    return pointwise(call)


@rule(
    aten.fill_,
    aten.normal_,
    aten.random_,
    aten.uniform_,
    aten.zero_,
    aten.empty_like,
    aten.full_like,
    aten.ones_like,
    aten.rand_like,
    aten.randn_like,
    aten.zeros_like,
)
def _same_as_self(call: Call) -> list[Axes | None]:
    return call.same(nonzero(labelled_self(call)))


@rule(*FACTORIES, aten.sym_size, aten.sym_numel)
def _unrelated(call: Call) -> list[Axes | None]:
    return [None] * len(call.outs)
