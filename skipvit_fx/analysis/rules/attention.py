"""Fused attention, which is looked at in one piece."""

from __future__ import annotations

from torch import Tensor

from skipvit_fx.analysis.axes import (
    Axes,
    MixesTokens,
    axes_of,
    tokens_of,
)
from skipvit_fx.analysis.rules.call import (
    Call,
    axes_or_plain,
    only_tokens,
    refuse_tokens,
)
from skipvit_fx.analysis.rules.pointwise import align


def attend(
    call: Call, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, causal: bool
) -> Axes:
    """``scaled_dot_product_attention``: ``[..., queries, channels]`` from keys and values ``[..., keys, channels]``."""
    q, k, v = axes_or_plain(query), axes_or_plain(key), axes_or_plain(value)
    for name, axes in (("queries", q), ("keys", k), ("values", v)):
        refuse_tokens(axes, [-1], f"attention over the channels of its {name}")
        if any(tokens_of(dim) for dim in axes[:-2]):
            raise MixesTokens("attention among the heads or channels of each token")
    keys = only_tokens(k[-2], "attention")
    only_tokens(q[-2], "attention")
    if keys != only_tokens(v[-2], "attention"):
        raise MixesTokens("keys and values of an attention are out of step")
    if causal:
        raise MixesTokens("causal attention depends on the order of all tokens")
    leading = tuple(next((d for d in dims if d), ()) for dims in zip(q[:-2], k[:-2], strict=False))
    if mask is not None:
        logits = query.new_empty((*query.shape[:-1], key.shape[-2]))
        its_axes = (*leading, q[-2], k[-2])
        align(call, [(logits, its_axes), (mask, axes_of(mask))], logits.shape)
    if keys:
        call.softmax_over = keys
        call.sums_weights = True
    return (*leading, q[-2], v[-1])
