"""The residual stream: the chain of nodes through which all information from the image to the output passes."""

from __future__ import annotations

from dataclasses import dataclass

import networkx as nx
import torch
from torch import Tensor, fx

from skipvit_fx.analysis.axes import is_data, tensors_in
from skipvit_fx.analysis.tokens import TokenAnalysis
from skipvit_fx.errors import UnsupportedModelError
from skipvit_fx.graph.attention_ops import SDPA, SOFTMAX, key_count
from skipvit_fx.graph.module_paths import module_calls, module_path


@dataclass(frozen=True)
class Segment:
    """Two neighbours on the chain with attention (or any softmax) between them.

    Attributes:
        start, end: the chain nodes.
        softmaxes: fused attentions and softmaxes between them, in graph order; none feeds another.
    """

    start: fx.Node
    end: fx.Node
    softmaxes: tuple[fx.Node, ...]


def _image(analysis: TokenAnalysis, graph: fx.Graph) -> fx.Node:
    """The node where the image enters: the floating-point input with the most elements."""
    inputs: list[fx.Node] = []
    waiting = [node for node in reversed(graph.nodes) if node.op == "placeholder"]
    while waiting:
        node = waiting.pop()
        value = analysis[node].value
        if not isinstance(value, Tensor):  # a list of inputs: take its parts
            waiting += reversed(node.users)
        elif value.is_floating_point():
            inputs.append(node)
    if not inputs:
        raise UnsupportedModelError(
            "no floating-point tensor among the model's inputs",
            hint="pass example_inputs=(images,), as the model is called",
        )
    return max(inputs, key=lambda node: analysis[node].value.numel())


@dataclass(frozen=True)
class Chain:
    """The residual stream from the image to the last thing that the model computes.

    Attributes:
        nodes: the nodes on every path between the two, first to last.
        on_path: all nodes on any of these paths. Nodes off these paths only read the stream.
    """

    nodes: list[fx.Node]
    on_path: frozenset[fx.Node]


def residual_chain(analysis: TokenAnalysis) -> Chain:
    """The chain that leads to the outputs after the most attentions; outputs after fewer are taps on the way.

    Raises:
        UnsupportedModelError: no output depends on the image.
    """
    graph = analysis.module.graph
    source = _image(analysis, graph)
    flow = nx.DiGraph()
    flow.add_node(source)
    for node in graph.nodes:
        if any(is_data(t) for t in tensors_in(analysis[node].value)):
            for argument in node.all_input_nodes:
                if argument in flow:
                    flow.add_edge(argument, node)
    output = graph.output_node()
    last = _last_computed(analysis, flow, output)
    if not last:
        raise UnsupportedModelError(
            "the model's output does not depend on its image input",
            hint="pass example_inputs as the model is called; its image is the largest floating-point tensor",
        )
    flow.remove_edges_from(list(flow.in_edges(output)) if output in flow else [])
    flow.add_edges_from((node, output) for node in last)
    chain = _chain(graph, flow, source, output)
    for segment in attention_segments(analysis, chain):
        attentions = [node for node in segment.softmaxes if _is_square(analysis, node)]
        taps = _features(flow, segment.start, attentions)
        if not taps:
            continue
        inner = flow.copy()
        inner.remove_edges_from(taps)
        without = _chain(graph, inner, source, output)
        if without.on_path.issuperset(attentions):  # no second sequence depends on them
            flow, chain = inner, without
    return chain


def _chain(graph: fx.Graph, flow: nx.DiGraph, source: fx.Node, output: fx.Node) -> Chain:
    way = nx.ancestors(flow, output) & {source, *nx.descendants(flow, source)}
    flow = nx.DiGraph(
        flow.subgraph([node for node in graph.nodes if node in way or node is output])
    )
    parents = nx.immediate_dominators(flow, source)
    chain = [output]
    while chain[-1] is not source:
        chain.append(parents[chain[-1]])
    return Chain(chain[:0:-1], frozenset(way))


def _features(
    flow: nx.DiGraph, start: fx.Node, attentions: list[fx.Node]
) -> list[tuple[fx.Node, fx.Node]]:
    """Where a head that reads several layers taps the stream: edges from before the last attention past its layer.

    Without these edges, the layers of an encoder are one stream, whatever a head computes from what it reads. None are
    found if the last layer is not a module of its own, which would tell a tap from a part of the layer.
    """
    if not attentions:
        return []
    last = attentions[-1]
    before = nx.ancestors(flow, last)
    if before.isdisjoint(attentions):
        return []
    others = {call for node in attentions if node is not last for call in module_calls(node)}
    block = next((call for call in module_calls(last) if call not in others), None)
    if block is None:
        return []
    return [
        (node, reader)
        for node in sorted(before & nx.descendants(flow, start) | {start})
        for reader in flow.successors(node)
        if reader is not last and reader not in before and block not in module_calls(reader)
    ]


def _is_square(analysis: TokenAnalysis, node: fx.Node) -> bool:
    """Whether a node is an attention with as many queries as keys, by its shape."""
    shape: torch.Size = analysis[node].value.shape
    return node.target in SDPA or list(shape).count(keys_of(analysis, node)) > 1


def _last_computed(analysis: TokenAnalysis, flow: nx.DiGraph, output: fx.Node) -> list[fx.Node]:
    """The tensors returned by the model that come after the most consecutive attentions."""
    depth: dict[fx.Node, int] = {}
    for node in analysis.module.graph.nodes:
        before = max((depth[a] for a in node.all_input_nodes if a in depth), default=0)
        depth[node] = before + is_softmax(analysis, node)
    returned: dict[fx.Node, None] = {}
    waiting = list(output.all_input_nodes)
    while waiting:
        node = waiting.pop()
        if isinstance(analysis[node].value, Tensor) or isinstance(node.target, str):
            returned[node] = None
        else:  # an output class of the author's
            waiting += node.all_input_nodes
    for node in returned:
        if (
            depth[node]
            and node not in flow
            and any(is_data(t) for t in tensors_in(analysis[node].value))
        ):
            raise UnsupportedModelError(
                "the model returns attention results of another input, so there is more than one sequence of tokens",
                node=node.name,
                module_path=module_path(node),
                hint="rewrite the part that takes one batch of images, and call it for each",
            )
    deepest = max((depth[node] for node in returned if node in flow), default=0)
    return [node for node in returned if node in flow and depth[node] == deepest]


def attention_segments(analysis: TokenAnalysis, chain: Chain) -> list[Segment]:
    """The segments of the chain, first to last."""
    nodes = chain.nodes
    order = {node: i for i, node in enumerate(analysis.module.graph.nodes)}
    found: dict[int, list[fx.Node]] = {}
    on_chain = set(nodes)
    ahead = 0
    for node in analysis.module.graph.nodes:
        if node not in chain.on_path or not is_softmax(analysis, node) or node in on_chain:
            continue
        while ahead < len(nodes) and order[nodes[ahead]] < order[node]:
            ahead += 1
        if 0 < ahead < len(nodes):
            found.setdefault(ahead, []).append(node)
    return [Segment(nodes[i - 1], nodes[i], tuple(own)) for i, own in found.items()]


def refuse_sequence(segment: Segment, nodes: list[fx.Node]) -> None:
    """Refuse a segment in which one attention feeds another: the layers between them are not on the chain.

    Raises:
        UnsupportedModelError: something bypasses the stream, so that the layers could not even be counted.
    """
    reached: set[fx.Node] = set()
    node = nodes[0]
    while node is not segment.end:
        if node in nodes and node in reached:
            raise UnsupportedModelError(
                f"an attention feeds another one between {segment.start.name} and {segment.end.name}, bypassed by a "
                "connection, so the layers are not one residual stream",
                node=node.name,
                module_path=module_path(node),
                hint="long skip connections between layers cannot be rewritten",
            )
        if node in nodes or node in reached:
            reached.update(node.users)
        node = node.next


def is_softmax(analysis: TokenAnalysis, node: fx.Node) -> bool:
    """Whether the node is a fused attention or some softmax."""
    if node.op == "call_module":
        return isinstance(analysis.module.get_submodule(str(node.target)), torch.nn.Softmax)
    if node.op == "call_method":
        return node.target == "softmax"
    return node.target in SDPA or node.target in SOFTMAX


def keys_of(analysis: TokenAnalysis, node: fx.Node) -> int:
    """The number of keys of an attention, or of values that a softmax runs over."""
    return key_count(node, analysis.module, lambda read: analysis[read].value.shape)
