"""Layers of a Vision Transformer, found as the dominators of its output.

All information from the image to the output passes through the residual stream. So the chain of nodes that dominate the
output contains, per layer, the layer's input, the sum after its attention, and its end.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, fx

from skipvit_fx.analysis.axes import (
    Axes,
    Tokens,
    batch_of,
    is_lost,
    tensors_in,
    token_dim,
    tokens_of,
)
from skipvit_fx.analysis.blocks import find_bounds
from skipvit_fx.analysis.class_token import ClassToken, find_class_token
from skipvit_fx.analysis.no_stream import ONE_SEQUENCE, no_stream, try_tokens
from skipvit_fx.analysis.residual import (
    Segment,
    attention_segments,
    keys_of,
    refuse_sequence,
    residual_chain,
)
from skipvit_fx.analysis.tokens import TokenAnalysis, stream_axes
from skipvit_fx.errors import UnsupportedModelError
from skipvit_fx.graph.attention_ops import SDPA
from skipvit_fx.graph.module_paths import module_path
from skipvit_fx.graph.nodes import leading_to


@dataclass(frozen=True)
class AttentionSite:
    """One attention in the graph.

    Attributes:
        node: the fused attention, or the softmax of one that is spelled out.
        fused: whether the node is a ``scaled_dot_product_attention``.
        keys: its key axis.
    """

    node: fx.Node
    fused: bool
    keys: Tokens

    @property
    def module_path(self) -> str:
        return module_path(self.node)


@dataclass(frozen=True)
class Layer:
    """One transformer layer.

    Attributes:
        index: counts from 1.
        input: the residual stream before the layer.
        cut: the residual stream after the layer's attention, before its feed-forward network.
        end: the residual stream after the layer, before anything that the model does between two blocks.
        attention: the fused attention, or the softmax of one that is spelled out; the first if there are several.
        sites: its attentions (two in a layer of parallel blocks).
        unclear: why none of them can score, if its attention also mixes tokens in some other way.
        unsure: why its end cannot be told; empty if it can.
    """

    index: int
    input: fx.Node
    cut: fx.Node
    end: fx.Node
    attention: fx.Node
    sites: tuple[AttentionSite, ...]
    unclear: str = ""
    unsure: str = ""


@dataclass(frozen=True)
class Stream:
    """The residual stream of a model.

    Attributes:
        layers: from first to last.
        axes: the axes of the stream, the same at every layer.
        dim: the dimension of the stream that carries the tokens.
        tokens: the token axis, with its prefix, patch and suffix rows.
        class_token: which row is the class token.
        on_path: the nodes on any path from the image to the output.
    """

    layers: tuple[Layer, ...]
    axes: Axes
    class_token: ClassToken
    on_path: frozenset[fx.Node]

    @property
    def dim(self) -> int:
        return token_dim(self.axes)

    @property
    def tokens(self) -> Tokens:
        tokens = tokens_of(self.axes[self.dim])
        assert tokens is not None
        return tokens

    @property
    def modules(self) -> frozenset[str]:
        """Paths of the modules that hold a layer's attention, except the model itself."""
        found: set[str] = set()
        for layer in self.layers:
            parts = module_path(layer.attention).split(".")
            found |= {".".join(parts[: i + 1]) for i in range(len(parts))}
        return frozenset(found - {""})


def find_stream(analysis: TokenAnalysis, prefix_tokens: int | None = None) -> Stream:
    """Find layers, token axis and prefix. Completes ``analysis`` if no constant prefix showed the axis.

    Raises:
        UnsupportedModelError: there is no stream of tokens that attention reads and a residual connection carries.
    """
    chain = residual_chain(analysis)
    segments = attention_segments(analysis, chain)
    if not segments:
        raise UnsupportedModelError(
            "no attention was found between two points of a residual stream",
            hint="skipvit_fx.find_attention(model) lists what was found; .explain(path) says why a place is not one",
        )
    first = _first_layer(analysis, segments, prefix_tokens)
    axes = analysis.axes(first)
    assert axes is not None
    segments = segments[_first_of_stream(analysis, segments, first, axes) :]
    for segment in segments:
        _continue_stream(analysis, segment.start, segments[0].start, axes, prefix_tokens)
    found = _attentions(analysis, segments)
    bounds = find_bounds(analysis, chain, [segment for segment, _ in found])
    starts = [(chain.nodes[places.input], found[i][0].start) for i, places in enumerate(bounds)]
    if prefix_tokens is not None and starts[0][0] is not first:
        analysis.seed(starts[0][0], axes)
    for node in itertools.chain.from_iterable(starts):
        _continue_stream(analysis, node, first, axes, prefix_tokens)
    layers = tuple(
        Layer(
            i,
            input=chain.nodes[places.input],
            cut=chain.nodes[places.cut],
            end=chain.nodes[places.end],
            attention=attention.first,
            sites=attention.sites,
            unclear=attention.unclear,
            unsure=places.unsure,
        )
        for i, ((_, attention), places) in enumerate(zip(found, bounds, strict=True), start=1)
    )
    _refuse_other_sequences(analysis, layers, axes)
    dim = token_dim(axes)
    tokens = tokens_of(axes[dim])
    assert tokens is not None
    token = find_class_token(analysis, layers[0].input, layers[-1].end, dim, tokens)
    return Stream(layers, axes, token, chain.on_path)


def _attentions(
    analysis: TokenAnalysis, segments: list[Segment]
) -> list[tuple[Segment, _Attended]]:
    """The segments whose softmax is an attention over the tokens, with what it attends to."""
    attended = [(segment, _attended(analysis, segment)) for segment in segments]
    found = [(segment, attention) for segment, attention in attended if attention is not None]
    if not found:
        softmax = segments[0].softmaxes[0]
        raise UnsupportedModelError(
            "a softmax over tokens whose weights are not summed with values, so it is not an attention known here",
            node=softmax.name,
            module_path=module_path(softmax),
            hint="skipvit_fx.find_attention(model) lists what was found",
        )
    return found


def _refuse_other_sequences(analysis: TokenAnalysis, layers: tuple[Layer, ...], axes: Axes) -> None:
    for layer in layers:
        if analysis.axes(layer.input) != axes:
            raise UnsupportedModelError(
                _other_sequence(analysis, layers[0], layer),
                node=layer.input.name,
                module_path=module_path(layer.input),
                hint=ONE_SEQUENCE,
            )


def _other_sequence(analysis: TokenAnalysis, first: Layer, layer: Layer) -> str:
    reason = f"layer {layer.index} has a different sequence of tokens from layer 1"
    shapes = [tuple(analysis[x.input].value.shape[1:]) for x in (first, layer)]
    if shapes[0] == shapes[1]:
        return reason
    old, new = (" x ".join(map(str, shape)) for shape in shapes)
    return f"{reason}: it is {new}, and was {old}"


# -- the token axis -----------------------------------------------------------------------------------------------


def _first_layer(
    analysis: TokenAnalysis, segments: list[Segment], prefix_tokens: int | None
) -> fx.Node:
    """The input of the first layer; its axes are known afterwards."""
    tried = None
    others: list[torch.Size] = []  # samples and tokens of sequences that no attention runs over
    lost = {segment.start for segment in segments if _was_lost(analysis, segment.start)}
    for segment in segments:
        start = segment.start
        stream = analysis[start].value
        if not isinstance(stream, Tensor) or stream.ndim != 3:
            continue
        if any(shape != stream.shape[:2] for shape in others):
            break
        known = analysis.axes(start)
        if known is not None and prefix_tokens is None:
            if _reads_any(analysis, segment):
                return start
            tried = try_tokens(analysis, segment) if segment is segments[0] else tried
            continue
        batch = analysis.batch_dim(start)
        candidates = [token_dim(known)] if known is not None else [d for d in (1, 0) if d != batch]
        for dim in candidates:
            if _runs_over(analysis, segment, dim, prefix_tokens or 0):
                if start in lost and prefix_tokens is None:
                    raise _lost_prefix(start)
                return start
            if segment is segments[0] and dim == 1:
                tried = try_tokens(analysis, segment)
        others.append(stream.shape[:2])
    raise no_stream(analysis, segments, tried)


def _runs_over(analysis: TokenAnalysis, segment: Segment, dim: int, prefix: int) -> bool:
    """Set the tokens of the segment's input to lie along ``dim``, and return whether attention then reads tokens.

    Raises:
        UnsupportedModelError: the prefix leaves no patch.
    """
    start = segment.start
    stream = analysis[start].value
    count = stream.shape[dim] - prefix
    if count < 1:
        raise UnsupportedModelError(
            f"prefix_tokens={prefix} leaves no patch token of {stream.shape[dim]}",
            node=start.name,
            module_path=module_path(start),
            hint="prefix_tokens counts class, distillation and register tokens only",
        )
    analysis.seed(start, stream_axes(stream, dim, Tokens(prefix, count, 0)))
    return _reads_any(analysis, segment)


def _lost_prefix(start: fx.Node) -> UnsupportedModelError:
    return UnsupportedModelError(
        "prefix tokens were joined to the sequence, but an unknown operator came after, so where they are now cannot "
        "be told",
        node=start.name,
        module_path=module_path(start),
        hint="pass prefix_tokens=N, the number of leading tokens that are not patches",
    )


def _was_lost(analysis: TokenAnalysis, node: fx.Node) -> bool:
    value = analysis[node].value
    return isinstance(value, Tensor) and is_lost(value)


def _reads_any(analysis: TokenAnalysis, segment: Segment) -> bool:
    return any(_reads_tokens(analysis, node) for node in segment.softmaxes)


def _first_of_stream(
    analysis: TokenAnalysis, segments: list[Segment], first: fx.Node, axes: Axes
) -> int:
    """Index of the first segment on the stream; it counts even if its attention mixes tokens beyond recognition."""
    shape = analysis[first].value.shape
    for i, segment in enumerate(segments):
        if segment.start is first:
            return i
        value, known = analysis[segment.start].value, analysis.axes(segment.start)
        if isinstance(value, Tensor) and value.shape == shape and known in (axes, None):
            if known is None:
                analysis.seed(segment.start, axes)
            if any(_why_opaque(analysis, segment, node) for node in segment.softmaxes):
                return i
    raise AssertionError("the first layer is not among the segments")


def _between(start: fx.Node, stop: fx.Node) -> Iterable[fx.Node]:
    node = start.next
    while node is not stop and node.op != "output":
        yield node
        node = node.next


def _reads_tokens(analysis: TokenAnalysis, node: fx.Node) -> bool:
    """Whether the attention has one query per token and one key per token."""
    facts = analysis[node]
    axes = facts.axes
    if facts.softmax_over is None or axes is None:
        return False
    return any((tokens := tokens_of(dim)) is not None and not tokens.weights for dim in axes)


def _continue_stream(
    analysis: TokenAnalysis, node: fx.Node, first: fx.Node, axes: Axes, prefix_tokens: int | None
) -> None:
    """Give the stream its axes again after an operator that mixed tokens; the segment check will find that operator."""
    stream, known = analysis[node].value, analysis.axes(node)
    if known == axes or not isinstance(stream, Tensor):
        return
    if known is None and stream.shape == analysis[first].value.shape:
        prefix = next(t for dim in axes if (t := tokens_of(dim)))
        if prefix_tokens is None and prefix.prefix + prefix.suffix:
            culprit = next((n for n in _between(first, node.next) if analysis[n].mixing), node)
            raise UnsupportedModelError(
                f"{analysis[culprit].mixing or 'the token axis was lost'}; "
                "where the prefix tokens are after it cannot be told",
                node=culprit.name,
                module_path=module_path(culprit),
                hint="if the prefix tokens stay at the front, pass prefix_tokens=N",
            )
        analysis.seed(node, axes)


# -- layers -------------------------------------------------------------------------------------------------------


class _Attended(NamedTuple):
    """The attentions of a segment: the first, those with a query and a key per token, and why they cannot score."""

    first: fx.Node
    sites: tuple[AttentionSite, ...]
    unclear: str


def _attended(analysis: TokenAnalysis, segment: Segment) -> _Attended | None:
    """What a segment attends to; ``None`` if it holds no attention over the tokens of the stream."""
    sites: list[AttentionSite] = []
    unclear = ""
    counted = []
    for node in segment.softmaxes:
        if _reads_tokens(analysis, node):
            keys = analysis[node].softmax_over
            assert keys is not None
            fused = node.target in SDPA
            weights_meet_values, mixing = (
                (True, "") if fused else _values_of(analysis, segment, node)
            )
            if weights_meet_values:
                counted.append(node)
                unclear = unclear or mixing
                sites.append(AttentionSite(node, fused, keys))
        elif mixing := _why_opaque(analysis, segment, node):
            counted.append(node)
            unclear = unclear or mixing
    if len(counted) > 1:
        refuse_sequence(segment, counted)
    return _Attended(counted[0], () if unclear else tuple(sites), unclear) if counted else None


def _why_opaque(analysis: TokenAnalysis, segment: Segment, node: fx.Node) -> str:
    """What mixed tokens in or before an attention, from the start of its segment, and so hid what it attends to.

    Empty if nothing did, or if it does not have the shape of an attention (as many queries as keys), or if nothing is
    left of its weights at the end of the segment.
    """
    value: Tensor = analysis[node].value
    keys = keys_of(analysis, node)
    square = value.ndim > 2 and list(value.shape).count(keys) > 1
    if node.target not in SDPA:
        reached = _reached(analysis, segment, node, value.numel() // keys) if square else set()
        if segment.end not in reached and not any(analysis[n].sums_weights for n in reached):
            return ""
    leads = leading_to([node], lambda argument: segment.start < argument)
    lost = any(is_lost(t) for a in node.all_input_nodes for t in tensors_in(analysis[a].value))
    return next(
        (mixing for n in sorted(leads) if (mixing := analysis[n].mixing)),
        "an operator before the attention mixes tokens" if lost else "",
    )


def _reached(
    analysis: TokenAnalysis, segment: Segment, softmax: fx.Node, least: int
) -> set[fx.Node]:
    """The nodes that weights reach in a segment, up to where they are summed with values.

    Nodes with fewer than ``least`` numbers do not count: these are no longer weights.
    """
    reached = {softmax}
    node = softmax
    while node is not segment.end:
        if node in reached and not analysis[node].sums_weights:
            if any(t.numel() >= least for t in tensors_in(analysis[node].value)):
                reached.update(node.users)
            else:
                reached.discard(node)
        node = node.next
    return reached


def _values_of(analysis: TokenAnalysis, segment: Segment, softmax: fx.Node) -> tuple[bool, str]:
    """Whether a softmax's weights are summed with values before the segment ends, and what mixes tokens before that.

    If something mixes them, a sum after it cannot be told from other operators: the attention cannot be scored. This
    does not hold if fewer numbers are left than there are tokens: these are no longer weights.
    """
    axes = analysis.axes(softmax)
    assert axes is not None
    samples = next((batch.samples for dim in axes if (batch := batch_of(dim))), 1)
    reached = _reached(analysis, segment, softmax, samples * keys_of(analysis, softmax))
    ends = [node for node in sorted(reached) if analysis[node].sums_weights]
    weights = (n for end in ends for n in end.all_input_nodes if n in reached)
    before_values = leading_to(weights, reached.__contains__)
    suspects = before_values if ends else {n for n in reached if n < segment.end}
    mixing = next((m for n in sorted(suspects) if (m := analysis[n].mixing)), "")
    return bool(ends or mixing), mixing
