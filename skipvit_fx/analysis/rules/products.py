"""Sums of products."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from skipvit_fx.analysis.axes import (
    Axes,
    Dim,
    MixesTokens,
    axes_of,
    batch_of,
    merge_ints,
    tokens_of,
)
from skipvit_fx.analysis.rules.call import (
    Call,
    axes_or_plain,
    labelled_self,
    refuse_moving,
    refuse_samples,
    rule,
)
from skipvit_fx.analysis.rules.pointwise import align
from skipvit_fx.torch_internals import aten


def contract(call: Call, left: Dim, right: Dim) -> None:
    """Check that the sum is over channels, or over attention weights times their values."""
    for dim in (left, right):
        refuse_samples(dim, "a matrix product")
    a, b = tokens_of(left), tokens_of(right)
    if a is None and b is None:
        return
    if a is None or b is None:
        raise MixesTokens("a matrix of fixed size is multiplied over the token axis")
    same = a._replace(weights=False) == b._replace(weights=False)
    zero = not a.nonzero and not b.nonzero
    if not (same and zero and a.weights != b.weights and left == (a,) and right == (b,)):
        raise MixesTokens("a sum over the token axis that is not attention weights times values")
    call.sums_weights = True


def _product(call: Call, a: Tensor, b: Tensor) -> Axes:
    """The axes of ``a @ b``, both matrices or both batches of matrices."""
    left, right = axes_or_plain(a), axes_or_plain(b)
    contract(call, left[-1], right[-2])
    if len(left) == 2:
        return (left[-2], right[-1])
    joint = _joint(_shared(a, b, left, right))
    known = [axes for axes in (axes_of(a), axes_of(b)) if axes is not None]
    if tokens_of(joint) and not all(any(map(batch_of, axes)) for axes in known):
        raise MixesTokens("a matrix for each token, the same for all samples")
    return (joint, left[-2], right[-1])


def _shared(a: Tensor, b: Tensor, left: Axes, right: Axes) -> Iterator[tuple[Dim, bool]]:
    """The batch dimension of each factor, and whether that factor is labelled.

    A matrix expanded over the batch (stride 0) is a single matrix, whatever the length.
    """
    for tensor, axes in ((a, left), (b, right)):
        if tensor.stride(0) != 0 or tensor.shape[0] == 1:
            yield axes[0], axes_of(tensor) is not None


def _joint(dims: Iterator[tuple[Dim, bool]]) -> Dim:
    """The one dimension that stands for all of them."""
    given = list(dims)
    labelled = list(dict.fromkeys(dim for dim, is_labelled in given if is_labelled))
    if len(labelled) > 1:
        raise MixesTokens("batches of matrices that are out of step are multiplied")
    (joint,) = labelled or [given[0][0]]
    if tokens_of(joint) and any(dim != joint for dim, _ in given):
        raise MixesTokens("a batch of matrices per token meets one of fixed length")
    return joint


@rule(aten.mm, aten.bmm)
def _matrix_product(call: Call) -> list[Axes | None]:
    return [_product(call, call.argument("self"), call.argument("mat2"))]


@rule(aten.mv)
def _matrix_vector(call: Call) -> list[Axes | None]:
    a, b = axes_or_plain(call.self), axes_or_plain(call.argument("vec"))
    contract(call, a[-1], b[-1])
    return [(a[0],)]


_FACTORS = {aten.addmm: ("mat1", "mat2"), aten.baddbmm: ("batch1", "batch2")}


@rule(*_FACTORS)
def _add_matrix_product(call: Call) -> list[Axes | None]:
    a, b = map(call.argument, _FACTORS[call.func.overloadpacket])
    axes, bias = _product(call, a, b), call.self
    return [align(call, [(bias, axes_of(bias)), (call.out, axes)], call.out.shape)]


@rule(aten.linear)
def _linear(call: Call) -> list[Axes | None]:
    axes = labelled_self(call)
    refuse_moving(axes, [-1], "a linear layer")
    if any(axes_of(t) for t in (call.argument("weight"), call.argument("bias")) if t is not None):
        raise MixesTokens("a linear layer whose weights are tokens")
    return [(*axes[:-1], merge_ints((call.out.shape[-1],)))]


@rule(aten.convolution)
def _convolution(call: Call) -> list[Axes | None]:
    """A convolution whose kernel has length 1 along the token axis treats every token on its own."""
    axes = labelled_self(call)
    weight: Tensor = call.argument("weight")
    if axes_of(weight) is not None:
        raise MixesTokens("a convolution whose kernel is made of tokens")
    refuse_moving(axes, [1], "a convolution's sum over channels")
    if call.argument("transposed") and any(map(tokens_of, axes[2:])):
        raise MixesTokens("a transposed convolution runs over the token axis")
    for d in range(2, len(axes)):
        at = {name: call.argument(name) for name in ("stride", "padding")}
        step, pad = (values[d - 2] if len(values) > 1 else values[0] for values in at.values())
        if tokens_of(axes[d]) and (weight.shape[d], step, pad) != (1, 1, 0):
            raise MixesTokens("a convolution runs over the token axis")
        refuse_samples(axes[d], "a convolution")
    spatial = tuple(
        axes[d] if tokens_of(axes[d]) else merge_ints((call.out.shape[d],))
        for d in range(2, len(axes))
    )
    if tokens_of(axes[0]) and weight.ndim != len(axes):
        raise MixesTokens("a convolution without a batch axis")
    return [(axes[0], merge_ints((call.out.shape[1],)), *spatial)]
