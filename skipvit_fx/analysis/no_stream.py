"""Why a model has no single sequence of tokens that its attention runs over, told from what the attention sees."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, fx

from skipvit_fx.analysis.residual import Segment, keys_of
from skipvit_fx.analysis.tokens import TokenAnalysis
from skipvit_fx.errors import UnsupportedModelError
from skipvit_fx.graph.attention_ops import SDPA, AttentionArguments
from skipvit_fx.graph.module_paths import module_path

SUMS_TOKENS = "a sum over the token axis"
ONE_SEQUENCE = (
    "only models with one sequence of tokens, the same from the first layer to the last, can be rewritten; "
    "skipvit_fx.find_attention(model) lists the attention that was found"
)


class Tried(NamedTuple):
    """The result of taking the second axis of a stream for the tokens.

    Attributes:
        mixing: the first reason why tokens do not stay apart up to its attention; empty if they do.
        over_tokens: whether the softmax runs over the tokens.
    """

    mixing: str
    over_tokens: bool


def try_tokens(analysis: TokenAnalysis, segment: Segment) -> Tried:
    """Examine a segment whose start has just been given a token axis."""
    softmax = segment.softmaxes[0]
    node, mixing = segment.start.next, ""
    while not mixing and node is not softmax.next:
        mixing = analysis[node].mixing
        node = node.next
    return Tried(mixing, analysis[softmax].softmax_over is not None)


SEVERAL = (
    "before its first attention there is no place that everything passes: it has several sequences of tokens, or "
    "reads its input again later"
)


def no_stream(
    analysis: TokenAnalysis, segments: Sequence[Segment], tried: Tried | None
) -> UnsupportedModelError:
    """The refusal of a model whose attention does not run over one axis of a residual stream.

    Args:
        tried: the result for the first segment; ``None`` if it does not start with a tensor
            ``[batch, tokens, channels]``.
    """
    first, shrinks = segments[0], _shrinks(analysis, segments)
    several = _has_several_sequences(analysis, first)
    if tried is not None:
        reason = _on_a_sequence(analysis, first, tried)
    else:
        reason = SEVERAL if several else _on_a_grid(analysis, first)
    return UnsupportedModelError(
        f"{reason}; {shrinks}" if shrinks else reason,
        node=first.softmaxes[0].name,
        module_path=module_path(first.softmaxes[0]),
        hint=ONE_SEQUENCE,
        in_every_part=tried is not None or not several,
    )


def _on_a_sequence(analysis: TokenAnalysis, segment: Segment, tried: Tried) -> str:
    _, tokens, channels = analysis[segment.start].value.shape
    keys, rows = _matrix(analysis, segment.softmaxes[0])
    if _runs_over_samples(analysis, segment.softmaxes[0]):
        return "its first attention runs over the samples of a batch, not over tokens"
    if SUMS_TOKENS in tried.mixing or (keys < tokens and rows == channels):
        return "its first attention weighs channels, not tokens"
    if keys < tokens:
        return (
            f"each query of its first attention sees {keys} keys, and there are {tokens} tokens: it runs in windows, "
            "or over tokens that were pooled"
        )
    if tried.mixing:
        return (
            f"its first attention is not a plain one over the tokens of a sequence: {tried.mixing}"
        )
    if tried.over_tokens:
        return "its first softmax over tokens has no query for each token"
    return "its first attention does not run over the tokens of a residual stream"


def _on_a_grid(analysis: TokenAnalysis, segment: Segment) -> str:
    shape = analysis[segment.start].value.shape[1:]
    keys, rows = _matrix(analysis, segment.softmaxes[0])
    reason = f"its layers work on [{', '.join(map(str, shape))}], which is not a sequence [tokens, channels]"
    if keys in (math.prod(shape[1:]), math.prod(shape[:-1])):
        return reason
    if rows in shape:
        return f"{reason}, and its first attention weighs channels"
    return f"{reason}, and its attention runs in windows: each query sees {keys} keys"


def _has_several_sequences(analysis: TokenAnalysis, segment: Segment) -> bool:
    """Whether nothing but the input lies before the first attention."""
    start = segment.start
    from_input = all(a.op == "placeholder" for a in start.all_input_nodes)
    return from_input or not isinstance(analysis[start].value, Tensor)


def _runs_over_samples(analysis: TokenAnalysis, softmax: fx.Node) -> bool:
    """Whether it has as many keys as there are samples, however many these are."""
    if softmax.target in SDPA:
        key = AttentionArguments(*softmax.args, **softmax.kwargs).key
        return analysis.batch_dim(key) == analysis.rank(key) - 2
    value: Tensor = analysis[softmax].value
    return analysis.batch_dim(softmax) == value.ndim - 1


def _matrix(analysis: TokenAnalysis, softmax: fx.Node) -> tuple[int, int]:
    """The number of keys of an attention, and of rows of all its matrices for one sample."""
    value: Tensor = analysis[softmax].value
    keys = keys_of(analysis, softmax)
    return keys, value[0].numel() // (value.shape[-1] if softmax.target in SDPA else keys)


def _shrinks(analysis: TokenAnalysis, segments: Sequence[Segment]) -> str:
    """Where the sequence before an attention is smaller than that before the previous one; empty if nowhere."""
    values = [(segment, analysis[segment.start].value) for segment in segments]
    values = [(segment, value) for segment, value in values if isinstance(value, Tensor)]
    for (_, before), (segment, after) in itertools.pairwise(values):
        if before.ndim == after.ndim and min(before.shape[1:-1]) > min(after.shape[1:-1]):
            old, new = (" x ".join(map(str, t.shape[1:])) for t in (before, after))
            place = module_path(segment.softmaxes[0]) or segment.softmaxes[0].name
            return f"the sequence shrinks from {old} to {new} before {place!r}"
    return ""
