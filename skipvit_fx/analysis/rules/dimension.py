"""Operators that run along dimensions: sorts, softmax, sums, norms."""

from __future__ import annotations

from typing import Any

from skipvit_fx.analysis.axes import (
    Axes,
    MixesTokens,
    PoolsTokens,
    axes_of,
    merge_ints,
    nonzero,
    tokens_of,
)
from skipvit_fx.analysis.rules.call import (
    Call,
    labelled_self,
    only_tokens,
    refuse_moving,
    refuse_samples,
    rule,
)
from skipvit_fx.analysis.rules.pointwise import pointwise
from skipvit_fx.torch_internals import aten


def _dims(call: Call, name: str) -> list[int]:
    """The dimensions that the call names.

    Raises:
        MixesTokens: it names none, which means all.
    """
    value: Any = call.argument(name)
    dims = list(value) if isinstance(value, (list, tuple)) else [value]
    if not dims or dims == [None]:
        raise MixesTokens(f"{call.name} runs over all axes")
    return dims


@rule(
    aten.cumsum,
    aten.cumprod,
    aten.sort,
    aten.topk,
    aten.glu,
    aten.flip,
    aten.roll,
    aten._log_softmax,
)
def _along(call: Call) -> list[Axes | None]:
    """Operators along dimensions that hold neither tokens nor samples, which may change the length of these."""
    axes = labelled_self(call)
    plural = call.func.overloadpacket in (aten.flip, aten.roll)
    normal = refuse_moving(axes, _dims(call, "dims" if plural else "dim"), call.name)
    first, *others = (
        tuple(merge_ints((out.shape[d],)) if d in normal else dim for d, dim in enumerate(axes))
        for out in call.outs
    )
    moves = call.func.overloadpacket is not aten._log_softmax
    return [first if moves else nonzero(first), *map(nonzero, others)]  # indices


@rule(aten._softmax, aten._safe_softmax)
def _softmax(call: Call) -> list[Axes | None]:
    axes = list(labelled_self(call))
    d = call.argument("dim") % len(axes)
    refuse_samples(axes[d], "softmax")
    tokens = only_tokens(axes[d], "softmax")
    if tokens:
        if tokens.weights:
            raise MixesTokens(
                "a softmax of attention weights, in which a token without weight counts"
            )
        call.softmax_over = tokens
    axes = list(nonzero(tuple(axes)))
    if tokens:
        axes[d] = (tokens._replace(weights=True),)
    return [tuple(axes)]


_OF_WEIGHTS = frozenset({aten.amax, aten.amin, aten.max, aten.mean, aten.min, aten.prod, aten.sum})
"""Reductions that keep zero weights zero."""


@rule(
    aten.all,
    aten.amax,
    aten.amin,
    aten.any,
    aten.argmax,
    aten.argmin,
    aten.linalg_vector_norm,
    aten.logsumexp,
    aten.max,
    aten.mean,
    aten.min,
    aten.norm,
    aten.prod,
    aten.std,
    aten.std_mean,
    aten.sum,
    aten.var,
    aten.var_mean,
)
def _reduce(call: Call) -> list[Axes | None]:
    if call.argument("other") is not None:  # max(x, y), min(x, y)
        return pointwise(call)
    axes = labelled_self(call)
    normal = [d % len(axes) for d in _dims(call, "dim")]
    for d in normal:
        refuse_samples(axes[d], call.name)
        if tokens_of(axes[d]):
            raise PoolsTokens(f"{call.name} runs over the token axis")
    keeps = call.outs[0].ndim == len(axes)
    left = tuple(
        () if d in normal else dim for d, dim in enumerate(axes) if keeps or d not in normal
    )
    first = left if call.func.overloadpacket in _OF_WEIGHTS else nonzero(left)
    return [first, *[nonzero(left)] * (len(call.outs) - 1)]


@rule(aten.native_layer_norm, aten._fused_rms_norm)
def _layer_norm(call: Call) -> list[Axes | None]:
    axes = labelled_self(call)
    normalized = len(call.argument("normalized_shape"))
    refuse_moving(axes, range(-normalized, 0), "normalisation")
    statistics: Axes = (*nonzero(axes)[:-normalized], *((),) * normalized)
    return [nonzero(axes), *[statistics] * (len(call.outs) - 1)]


@rule(aten.embedding)
def _embedding(call: Call) -> list[Axes | None]:
    axes = axes_of(call.argument("indices"))
    if axes is None or axes_of(call.self) is not None:
        raise MixesTokens("an embedding table made of tokens")
    return [(*nonzero(axes), merge_ints((call.out.shape[-1],)))]
