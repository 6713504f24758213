"""Layers of a Vision Transformer, found as the dominators of its output.

Everything that the output knows of the image passes through the residual stream. So the chain of nodes that dominate
the output contains, per layer, the layer's input and the sum after its attention. No module name is looked at.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch
from torch import Tensor, fx

from skipvit_fx.analysis.axes import Axes, Tokens, is_lost, token_dim, tokens_of
from skipvit_fx.analysis.rules import tensors_in
from skipvit_fx.analysis.tokens import SDPA, TokenAnalysis, stream_axes
from skipvit_fx.errors import UnsupportedModelError
from skipvit_fx.ir.capture import module_path

SOFTMAX = (
    torch.softmax,
    torch.nn.functional.softmax,
    torch.ops.aten.softmax.int,
    torch.ops.aten._softmax.default,
)


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
        end: the residual stream after the layer; the next layer's input.
        sites: its attentions (two in a layer of parallel blocks).
    """

    index: int
    input: fx.Node
    cut: fx.Node
    end: fx.Node
    sites: tuple[AttentionSite, ...]


@dataclass(frozen=True)
class Stream:
    """The residual stream of a model.

    Attributes:
        layers: from first to last.
        axes: the axes of the stream; the same at every layer.
        dim: which dimension of the stream carries the tokens.
        tokens: prefix, patch and trailing rows of it.
        has_class_token: whether row 0 is a class token rather than a patch or a register.
    """

    layers: tuple[Layer, ...]
    axes: Axes
    has_class_token: bool

    @property
    def dim(self) -> int:
        return token_dim(self.axes)

    @property
    def tokens(self) -> Tokens:
        tokens = tokens_of(self.axes[self.dim])
        assert tokens is not None
        return tokens


def find_stream(analysis: TokenAnalysis, prefix_tokens: int | None = None) -> Stream:
    """Find layers, token axis and prefix. Completes ``analysis`` where no constant prefix showed the axis.

    Raises:
        UnsupportedModelError: there is no stream of tokens that attention reads and a residual connection carries.
    """
    graph = analysis.module.graph
    order = {node: i for i, node in enumerate(graph.nodes)}
    chain = _chain(analysis)
    spans = _attention_spans(analysis, chain, order)
    if not spans:
        raise UnsupportedModelError(
            "no attention was found between two points of a residual stream",
            hint="skipvit_fx.find_attention(model) lists what was found, .explain(path) says why a place is none",
        )
    first = _first_layer(analysis, spans, prefix_tokens)
    axes = analysis.axes(first)
    assert axes is not None
    stream_nodes = set(chain[chain.index(first) :])
    spans = [span for span in spans if span[0] in stream_nodes]
    for start, _, _ in spans:
        _continue_stream(analysis, start, first, axes, prefix_tokens)
    layers = _layers(analysis, chain, spans)
    if not layers:
        raise UnsupportedModelError(
            "no attention reads the token axis with one query per token",
            hint="skipvit_fx.find_attention(model) lists what was found",
        )
    return Stream(layers, axes, _starts_with_class_token(analysis, first, axes))


# -- dominators ---------------------------------------------------------------------------------------------------


def _image(analysis: TokenAnalysis, graph: fx.Graph) -> fx.Node:
    """The node where the image enters: the floating-point input with most elements."""
    best: tuple[int, fx.Node] | None = None
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        value = analysis[node].value
        if not isinstance(value, Tensor):
            for user in node.users:
                best = _larger(best, analysis[user].value, user)
        best = _larger(best, value, node)
    if best is None:
        raise UnsupportedModelError("no floating-point tensor among the model's inputs")
    return best[1]


def _larger(best: tuple[int, fx.Node] | None, value: Any, node: fx.Node) -> tuple[int, fx.Node] | None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return best
    return (value.numel(), node) if best is None or value.numel() > best[0] else best


def _chain(analysis: TokenAnalysis) -> list[fx.Node]:
    """The nodes that every path from the image to the output passes, first to last."""
    graph = analysis.module.graph
    source = _image(analysis, graph)
    flow = nx.DiGraph()
    flow.add_node(source)
    for node in graph.nodes:
        if node.op == "output" or tensors_in(analysis[node].value):
            for argument in node.all_input_nodes:
                if argument in flow:
                    flow.add_edge(argument, node)
    output = next(reversed(graph.nodes))
    if output not in flow:
        raise UnsupportedModelError("the model's output does not depend on its image input")
    parents = nx.immediate_dominators(flow, source)
    chain = [output]
    while chain[-1] is not source:
        chain.append(parents[chain[-1]])
    return chain[:0:-1]


def _attention_spans(
    analysis: TokenAnalysis, chain: list[fx.Node], order: dict[fx.Node, int]
) -> list[tuple[fx.Node, fx.Node, list[fx.Node]]]:
    """Consecutive chain nodes with attention (or any softmax) between them, and these attentions."""
    positions = [order[node] for node in chain]
    spans: list[tuple[fx.Node, fx.Node, list[fx.Node]]] = []
    on_chain = set(chain)
    ahead = 0
    for node in analysis.module.graph.nodes:
        if not is_softmax(analysis, node) or node in on_chain:
            continue
        while ahead < len(chain) and positions[ahead] < order[node]:
            ahead += 1
        if ahead in (0, len(chain)):
            continue
        start, end = chain[ahead - 1], chain[ahead]
        if spans and spans[-1][0] is start:
            spans[-1][2].append(node)
        else:
            spans.append((start, end, [node]))
    return spans


def is_softmax(analysis: TokenAnalysis, node: fx.Node) -> bool:
    """Whether the node is a fused attention or some softmax."""
    if node.op == "call_module":
        return isinstance(analysis.module.get_submodule(str(node.target)), torch.nn.Softmax)
    if node.op == "call_method":
        return node.target == "softmax"
    return node.target in SDPA or node.target in SOFTMAX


# -- the token axis -----------------------------------------------------------------------------------------------


def _first_layer(
    analysis: TokenAnalysis,
    spans: list[tuple[fx.Node, fx.Node, list[fx.Node]]],
    prefix_tokens: int | None,
) -> fx.Node:
    """The input of the first layer; afterwards its axes are known."""
    reasons = []
    for start, end, nodes in spans:
        stream = analysis[start].value
        if not isinstance(stream, Tensor) or stream.ndim != 3:
            reasons.append(f"{start.name} is not a [batch, tokens, channels] tensor")
            continue
        known = analysis.axes(start)
        if known is not None and prefix_tokens is None:
            if any(_reads_tokens(analysis, node) for node in nodes):
                return start
            reasons.append(f"the attention after {start.name} does not read its tokens")
            continue
        if is_lost(stream) and prefix_tokens is None:
            raise UnsupportedModelError(
                "prefix tokens were joined to the sequence, but an unknown operator came after, so where they "
                "are now cannot be told",
                node=start.name,
                module_path=module_path(start),
                hint="pass prefix_tokens=N, the number of leading tokens that are not patches",
            )
        lead = prefix_tokens or 0
        candidates = [token_dim(known)] if known is not None else [1, 0]
        for dim in candidates:
            count = stream.shape[dim] - lead
            if count < 1:
                raise UnsupportedModelError(
                    f"prefix_tokens={lead} leaves no patch token of {stream.shape[dim]}",
                    node=start.name,
                    module_path=module_path(start),
                    hint="prefix_tokens counts class, distillation and register tokens only",
                )
            analysis.seed(start, stream_axes(stream, dim, Tokens(lead, count, 0)))
            if any(_reads_tokens(analysis, node) for node in nodes):
                return start
        reasons.append(f"the attention after {start.name} does not run over an axis of it")
    start, _, nodes = spans[0]
    mixing = next((analysis[n].mixing for n in _between(start, nodes[0]) if analysis[n].mixing), "")
    raise UnsupportedModelError(
        f"the model's attention does not run over one axis of a residual stream: {mixing or reasons[0]}",
        node=nodes[0].name,
        module_path=module_path(nodes[0]),
        hint="only isotropic models, with one sequence of tokens from the first layer to the last, can be rewritten",
    )


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
    """Give the stream its axes again behind an operator that mixed tokens; the span check will find that one."""
    stream, known = analysis[node].value, analysis.axes(node)
    if known == axes or not isinstance(stream, Tensor):
        return
    if known is None and stream.shape == analysis[first].value.shape:
        prefix = next(t for dim in axes if (t := tokens_of(dim)))
        if prefix_tokens is None and prefix.lead + prefix.tail:
            culprit = next(n for n in _between(first, node) if analysis[n].mixing)
            raise UnsupportedModelError(
                f"{analysis[culprit].mixing}; where the prefix tokens are behind it cannot be told",
                node=culprit.name,
                module_path=module_path(culprit),
                hint="if the prefix tokens stay in front, pass prefix_tokens=N",
            )
        analysis.seed(node, axes)


# -- layers -------------------------------------------------------------------------------------------------------


def _layers(
    analysis: TokenAnalysis,
    chain: list[fx.Node],
    spans: list[tuple[fx.Node, fx.Node, list[fx.Node]]],
) -> tuple[Layer, ...]:
    """Turn the spans whose attention has a query per token into layers."""
    kept = []
    for start, end, nodes in spans:
        sites = tuple(
            AttentionSite(node, node.target in SDPA, keys)
            for node in nodes
            if _reads_tokens(analysis, node) and (keys := analysis[node].softmax_over)
        )
        if sites:
            kept.append((start, end, sites))
    places = {node: i for i, node in enumerate(chain)}
    # A stream node forks: the sum behind it adds it to what a branch made of it. Nodes that do not fork, such as the
    # norm of a post-norm layer, still belong to the layer before.
    forks = [len([u for u in node.users if tensors_in(analysis[u].value)]) > 1 for node in chain]
    starts = [places[start] for start, _, _ in kept]
    layers: list[Layer] = []
    to_cut = to_end = 0
    for i, (start, after_attention, sites) in enumerate(kept):
        joined = places[after_attention]
        if i + 1 < len(kept):
            end = starts[i + 1]
            cut = next((c for c in range(joined, end) if forks[c]), end)
            to_cut, to_end = cut - joined, end - cut
        elif len(kept) == 1:
            cut = next((c for c in range(joined, len(chain) - 1) if forks[c]), joined)
            end = min(cut + 1, len(chain) - 1)
        else:  # nothing follows that would end the last layer: it ends as the one before it did
            cut = min(joined + to_cut, len(chain) - 1)
            end = min(cut + to_end, len(chain) - 1)
        layers.append(Layer(i + 1, start, chain[cut], chain[end], sites))
    return tuple(layers)


def _starts_with_class_token(analysis: TokenAnalysis, first: fx.Node, axes: Axes) -> bool:
    """Whether row 0 is a class token: a prefix row that does not come from a parameter named after registers."""
    tokens = next(t for dim in axes if (t := tokens_of(dim)))
    if not tokens.lead:
        return False
    names = _prefix_sources(analysis, first)
    return not (names and "reg" in names[0].rsplit(".", 1)[-1])


def _prefix_sources(analysis: TokenAnalysis, first: fx.Node) -> list[str]:
    """Names of the parameters that may be prefix tokens: ``[1, rows, channels]`` with few rows, in graph order."""
    channels = analysis[first].value.shape[-1]
    tokens = next(t for dim in (analysis.axes(first) or ()) if (t := tokens_of(dim)))
    names = []
    for name, parameter in analysis.module.named_parameters():
        shape = parameter.shape
        rows = parameter.numel() // channels
        if len(shape) > 1 and shape[-1] == channels and 0 < rows <= tokens.lead:
            names.append(name)
    return names


