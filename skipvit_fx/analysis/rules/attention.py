"""Fused attention, which is judged as a whole."""

from __future__ import annotations

import itertools

from torch import Tensor

from skipvit_fx.analysis.axes import (
    Axes,
    Dim,
    MixesTokens,
    axes_of,
    batch_of,
    tokens_of,
)
from skipvit_fx.analysis.rules.call import (
    Call,
    axes_or_plain,
    only_tokens,
    refuse_moving,
    refuse_samples,
)
from skipvit_fx.analysis.rules.pointwise import align


def attend(
    call: Call, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, causal: bool
) -> Axes:
    """``scaled_dot_product_attention``: ``[..., queries, channels]`` from keys and values ``[..., keys, channels]``."""
    q, k, v = axes_or_plain(query), axes_or_plain(key), axes_or_plain(value)
    for name, axes in (("queries", q), ("keys", k), ("values", v)):
        refuse_moving(axes, [-1], f"attention over the channels of its {name}")
        refuse_samples(axes[-2], "attention")
        if any(tokens_of(dim) for dim in axes[:-2]):
            raise MixesTokens("attention among the heads or channels of each token")
    keys = only_tokens(k[-2], "attention")
    only_tokens(q[-2], "attention")
    if keys != only_tokens(v[-2], "attention"):
        raise MixesTokens("keys and values of an attention are out of step")
    if causal:
        raise MixesTokens("causal attention depends on the order of all tokens")
    leading = tuple(map(_leading_dim, itertools.zip_longest(q[-3::-1], k[-3::-1], v[-3::-1])))[::-1]
    if mask is not None:
        logits = query.new_empty((*query.shape[:-1], key.shape[-2]))
        its_axes = (*leading, q[-2], k[-2])
        align(call, [(logits, its_axes), (mask, axes_of(mask))], logits.shape)
    if keys:
        call.softmax_over = keys
        call.sums_weights = True
    return (*leading, q[-2], v[-1])


def _leading_dim(dims: tuple[Dim | None, ...]) -> Dim:
    """The dimension of the result, given those of queries, keys and values; a batch dimension wins, then the first."""
    given = [dim for dim in dims if dim]
    if len({dim for dim in given if batch_of(dim)}) > 1:
        raise MixesTokens("the samples of queries, keys and values of an attention are out of step")
    return next((dim for dim in given if batch_of(dim)), given[0] if given else ())
