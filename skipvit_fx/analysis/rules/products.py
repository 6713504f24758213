"""Sums of products."""

from __future__ import annotations

import torch
from torch import Tensor

from skipvit_fx.analysis.axes import (
    Axes,
    Dim,
    MixesTokens,
    axes_of,
    merge_ints,
    tokens_of,
)
from skipvit_fx.analysis.rules.call import (
    Call,
    axes_or_plain,
    labelled_self,
    refuse_tokens,
    rule,
)
from skipvit_fx.analysis.rules.pointwise import align

aten = torch.ops.aten


def contract(call: Call, a: Axes, b: Axes, a_dim: int, b_dim: int) -> None:
    """Check that what is summed over are channels, or attention weights with their values."""
    left, right = tokens_of(a[a_dim]), tokens_of(b[b_dim])
    if left is None and right is None:
        return
    if left is None or right is None:
        raise MixesTokens("a matrix of fixed size is multiplied over the token axis")
    same = left._replace(weights=False) == right._replace(weights=False)
    if not (
        same and left.weights != right.weights and a[a_dim] == (left,) and b[b_dim] == (right,)
    ):
        raise MixesTokens("a sum over the token axis that is not attention weights times values")
    call.sums_weights = True


def _mm(call: Call, a: Tensor, b: Tensor) -> Axes:
    left, right = axes_or_plain(a), axes_or_plain(b)
    contract(call, left, right, -1, -2)
    batch: tuple[Dim, ...] = ()
    if len(left) == 3:
        # a matrix that is expanded over the batch (stride 0) is one matrix, whatever the length
        dims = [ax[0] for ax, t in ((left, a), (right, b)) if t.stride(0) != 0 or t.shape[0] == 1]
        if any(tokens_of(dim) for dim in dims) and len(set(dims)) > 1:
            raise MixesTokens("a batch of matrices per token meets one of fixed length")
        candidates = [dim for dim in dims if any(not isinstance(f, int) for f in dim)]
        batch = (max(candidates or dims or [left[0]], key=len),)
    return (*batch, left[-2], right[-1])


@rule(aten.mm, aten.bmm)
def _matrix_product(call: Call) -> Axes:
    return _mm(call, call.args[0], call.args[1])


@rule(aten.mv)
def _matrix_vector(call: Call) -> Axes:
    a, b = axes_or_plain(call.args[0]), axes_or_plain(call.args[1])
    contract(call, a, b, -1, -1)
    return (a[0],)


@rule(aten.addmm, aten.baddbmm)
def _add_matrix_product(call: Call) -> Axes:
    bias, a, b = call.args[:3]
    axes = _mm(call, a, b)
    return (
        align(call, [(bias, axes_of(bias)), (call.out, axes)], call.out.shape)
        if bias.ndim
        else axes
    )


@rule(aten.linear)
def _linear(call: Call) -> Axes:
    axes = labelled_self(call)
    refuse_tokens(axes, [-1], "a linear layer")
    return (*axes[:-1], merge_ints((call.out.shape[-1],)))


@rule(aten.convolution)
def _convolution(call: Call) -> Axes:
    """A convolution whose kernel has length 1 along the token axis treats every token alone."""
    axes = labelled_self(call)
    weight = call.args[1]
    stride, padding, _, transposed = call.args[3:7]
    for d in range(2, len(axes)):
        kernel = (weight.shape[d], stride[d - 2], padding[d - 2], transposed)
        if tokens_of(axes[d]) and kernel != (1, 1, 0, False):
            raise MixesTokens("a convolution runs over the token axis")
    refuse_tokens(axes, [1], "a convolution's sum over channels")
    spatial = tuple(
        axes[d] if tokens_of(axes[d]) else merge_ints((call.out.shape[d],))
        for d in range(2, len(axes))
    )
    return (axes[0], merge_ints((call.out.shape[1],)), *spatial)
