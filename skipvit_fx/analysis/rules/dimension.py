"""Operators that run along dimensions: sorts, softmax, sums, norms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from skipvit_fx.analysis.axes import (
    Axes,
    MixesTokens,
    PoolsTokens,
    axes_of,
    merge_ints,
    tokens_of,
)
from skipvit_fx.analysis.rules.call import (
    Call,
    labelled_self,
    only_tokens,
    refuse_tokens,
    rule,
)
from skipvit_fx.analysis.rules.pointwise import pointwise

aten = torch.ops.aten


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


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
def _along(call: Call) -> list[Axes | None] | Axes:
    """Operators that run along dimensions which are not the token axis, and may change their length."""
    axes = labelled_self(call)
    names = {aten.topk: (2, "dim"), aten.flip: (1, "dims"), aten.roll: (2, "dims")}
    dims = call.argument(*names.get(call.func.overloadpacket, (1, "dim")), -1)
    dims = _listed(dims)
    if not dims:
        raise MixesTokens(f"{call.func.overloadpacket} runs over all axes")
    normal = refuse_tokens(axes, dims, str(call.func.overloadpacket))
    outs = _listed(call.out)
    results: list[Axes | None] = [
        tuple(merge_ints((out.shape[d],)) if d in normal else dim for d, dim in enumerate(axes))
        for out in outs
    ]
    return results if isinstance(call.out, (tuple, list)) else results[0] or ()


@rule(aten._softmax, aten._safe_softmax)
def _softmax(call: Call) -> Axes:
    axes = list(labelled_self(call))
    d = call.argument(1, "dim") % len(axes)
    tokens = only_tokens(axes[d], "softmax")
    if tokens:
        axes[d] = (tokens._replace(weights=True),)
        call.softmax_over = tokens
    return tuple(axes)


_REDUCTION_DIM = {
    aten.linalg_vector_norm: 2,
    aten.norm: 2,
}


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
def _reduce(call: Call) -> list[Axes | None] | Axes:
    axes = labelled_self(call)
    outs = _listed(call.out)
    other = call.argument(1, "other")
    if isinstance(other, Tensor):  # max(x, y), min(x, y)
        return pointwise(call)
    dims = call.argument(_REDUCTION_DIM.get(call.func.overloadpacket, 1), "dim")
    if dims is None or dims == []:
        raise MixesTokens(f"{call.func.overloadpacket} runs over all axes")
    dims = _listed(dims)
    normal = [d % len(axes) for d in dims]
    if any(tokens_of(axes[d]) for d in normal):
        raise PoolsTokens(f"{call.func.overloadpacket} runs over the token axis")
    keeps = outs[0].ndim == len(axes)
    reduced = tuple(
        () if d in normal else dim for d, dim in enumerate(axes) if keeps or d not in normal
    )
    return [reduced] * len(outs) if isinstance(call.out, (tuple, list)) else reduced


@rule(aten.native_layer_norm, aten._fused_rms_norm)
def _layer_norm(call: Call) -> list[Axes | None]:
    axes = labelled_self(call)
    normalized = len(call.argument(1, "normalized_shape"))
    refuse_tokens(axes, range(-normalized, 0), "normalisation")
    return [axes, *[None] * (len(call.out) - 1)]


@rule(aten.embedding)
def _embedding(call: Call) -> Axes:
    axes = axes_of(call.argument(1, "indices"))
    if axes is None:
        raise MixesTokens("an embedding table made of tokens")
    return (*axes, merge_ints((call.out.shape[-1],)))
