"""What a rewrite did to a model, in numbers: layers, tokens, multiply-adds, and every node it inserted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import networkx as nx
from torch import fx, nn

from skipvit_fx.analysis.tokens import SDPA
from skipvit_fx.cost.macs import count_macs
from skipvit_fx.inspect.diff import graph_diff
from skipvit_fx.inspect.graph import to_networkx
from skipvit_fx.inspect.table import layer_table
from skipvit_fx.ir.editor import INSERTED_BY
from skipvit_fx.ir.sdpa import AttentionArguments
from skipvit_fx.ops.switch import Switchable
from skipvit_fx.pipeline.record import LayerRecord, graph_lines, record_of

NumberT = TypeVar("NumberT", int, float)


@dataclass(frozen=True)
class LayerReport:
    """One layer of the rewritten model, as it runs on one image.

    Attributes:
        index: counts from 1.
        module_path: of the layer's first attention, in the original model.
        attention_tokens: tokens that the attention runs over: its keys.
        queries: tokens that the attention computes; fewer than its keys where the others are never read.
        ffn_tokens: rows that come out of the feed-forward network.
        dropped: rows that leave in this layer.
        returned: rows that the sequence gains at this layer's input, where dropped patches return; a fused token that
            goes at the same time is subtracted. 0 where nobody reads those that would return.
        macs, baseline_macs: multiply-adds, now and with skipping off.
        bytes, baseline_bytes: read and written by operators that multiply no matrices, likewise.
    """

    index: int
    module_path: str
    attention_tokens: int
    queries: int
    ffn_tokens: int
    dropped: int
    returned: int
    macs: int
    baseline_macs: int
    bytes: int
    baseline_bytes: int


@dataclass(frozen=True)
class RestReport:
    """What is computed outside the layers: before the first (embedding) or after the last (head).

    Attributes:
        returned: rows that the sequence gains behind the last layer; see :class:`LayerReport`.
        macs, baseline_macs: multiply-adds per image, now and with skipping off.
        bytes, baseline_bytes: see :class:`LayerReport`.
    """

    returned: int
    macs: int
    baseline_macs: int
    bytes: int
    baseline_bytes: int


@dataclass(frozen=True)
class NodeReport:
    """One node of the rewritten graph.

    Attributes:
        name, op, target: as in ``torch.fx``; the target as text.
        inserted_by: name of the pass that inserted it; ``None`` for the author's own.
        layer: the layer that it runs in, from 1; ``None`` before the first and after the last.
        shape: of its value for a batch of one; ``None`` where the value is not one tensor.
        macs: multiply-adds per image.
        reads: names of the nodes that it reads.
    """

    name: str
    op: str
    target: str
    inserted_by: str | None
    layer: int | None
    shape: tuple[int, ...] | None
    macs: int
    reads: tuple[str, ...]


@dataclass(frozen=True)
class Inspection:
    """A rewritten model, looked at with skipping on. ``str()`` is a table of its layers.

    Attributes:
        model: class name of the original model.
        plan, cut, score, eliminate_dead_tokens: of the rewrite, as text and flag.
        skipping: whether skipping is on at the moment; the numbers are those of the plan in full in any case.
        prefix, patches, tail: class and other tokens in front, patches, and tokens behind, in the full sequence.
        layers: from first to last.
        embedding, head: what runs before and after them.
        macs, baseline_macs: multiply-adds per image of the whole model, now and with skipping off.
        nodes: the rewritten graph, in order.
    """

    model: str
    plan: str
    cut: str
    score: str
    eliminate_dead_tokens: bool
    skipping: bool
    prefix: int
    patches: int
    tail: int
    layers: tuple[LayerReport, ...]
    embedding: RestReport
    head: RestReport
    macs: int
    baseline_macs: int
    nodes: tuple[NodeReport, ...] = field(repr=False)
    _diff: tuple[str, ...] = field(repr=False)

    def __str__(self) -> str:
        return layer_table(self)

    @property
    def inserted(self) -> tuple[NodeReport, ...]:
        """The nodes that passes inserted, in graph order."""
        return tuple(node for node in self.nodes if node.inserted_by is not None)

    def diff(self) -> str:
        """The captured graph against the rewritten one, as a unified diff that names the pass behind every change.

        Empty if no node changed.
        """
        return "\n".join(self._diff)

    def to_networkx(self) -> nx.DiGraph:
        """The rewritten graph, from each node to those that read it.

        Nodes are named as in ``torch.fx`` and carry ``op``, ``target``, ``inserted_by``, ``layer``, ``shape`` and
        ``macs``, as in :class:`NodeReport`.
        """
        return to_networkx(self.nodes)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the author's nodes and the diff, as plain values for ``json.dumps``."""
        plain = asdict(self)
        del plain["nodes"], plain["_diff"]
        plain["layers"] = list(plain["layers"])
        plain["inserted"] = [
            {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(node).items()}
            for node in self.inserted
        ]
        return plain


def inspect(fast: nn.Module) -> Inspection:
    """Look at a rewritten model: tokens and multiply-adds per layer, and where each inserted node went.

    ``fast`` is neither run nor changed. The numbers hold for one image of the shape that the model was rewritten for.

    Raises:
        NotRewrittenError: ``fast`` does not come from :func:`skipvit_fx.rewrite`.
    """
    record = record_of(fast)
    assert isinstance(fast, fx.GraphModule)
    now = count_macs(fast, record.args, record.kwargs, skipping=True)
    baseline = count_macs(fast, record.args, record.kwargs, skipping=False)
    regions = regions_of(fast.graph, record.layers)
    places = {node.name: node for node in fast.graph.nodes}
    depth = len(record.layers)

    macs, baseline_macs = (by_region(count.nodes, regions, depth) for count in (now, baseline))
    bytes_, baseline_bytes = (by_region(count.bytes, regions, depth) for count in (now, baseline))
    dropped = {
        stage.layer: -_gained(fast.graph, f"{stage.path}.keep", now.shapes, record.token_dim)
        for stage in record.stages
    }
    returned = sum(
        _gained(fast.graph, f"{stage.path}.merge", now.shapes, record.token_dim)
        for stage in record.stages
    )

    def layer_report(layer: LayerRecord) -> LayerReport:
        rows = [now.shapes[name][record.token_dim] for name in (layer.cut, layer.end)]
        return LayerReport(
            index=layer.index,
            module_path=layer.module_path,
            attention_tokens=_keys(places[layer.sites[0]], now.shapes, fast),
            queries=rows[0],
            ffn_tokens=rows[1],
            dropped=dropped.get(layer.index, 0),
            returned=returned if layer.index == record.plan.return_layer else 0,
            macs=macs[layer.index],
            baseline_macs=baseline_macs[layer.index],
            bytes=bytes_[layer.index],
            baseline_bytes=baseline_bytes[layer.index],
        )

    def rest_report(region: int) -> RestReport:
        gained = returned if region == record.plan.return_layer else 0
        return RestReport(
            gained, macs[region], baseline_macs[region], bytes_[region], baseline_bytes[region]
        )

    switches = [m.active for m in fast.modules() if isinstance(m, Switchable)]
    return Inspection(
        model=record.model,
        plan=str(record.plan),
        cut=record.cut,
        score=record.score,
        eliminate_dead_tokens=record.eliminate_dead_tokens,
        skipping=all(switches),
        prefix=record.prefix,
        patches=record.patches,
        tail=record.tail,
        layers=tuple(layer_report(layer) for layer in record.layers),
        embedding=rest_report(0),
        head=rest_report(depth + 1),
        macs=now.total,
        baseline_macs=baseline.total,
        nodes=tuple(
            NodeReport(
                name=node.name,
                op=node.op,
                target=str(node._pretty_print_target(node.target)),
                inserted_by=node.meta.get(INSERTED_BY),
                layer=region if 0 < (region := regions[node.name]) <= depth else None,
                shape=now.shapes.get(node.name),
                macs=now.nodes[node.name],
                reads=tuple(read.name for read in node.all_input_nodes),
            )
            for node in fast.graph.nodes
        ),
        _diff=graph_diff(record, graph_lines(fast.graph)),
    )


def regions_of(graph: fx.Graph, layers: tuple[LayerRecord, ...]) -> dict[str, int]:
    """For every node the layer that it runs in; 0 before the first, one more than there are after the last."""
    starts = {layer.input: layer.index for layer in layers}
    regions = {}
    region = 0
    for node in graph.nodes:
        regions[node.name] = region
        region = starts.get(node.name, region)
        if node.name == layers[-1].end:
            region = len(layers) + 1
    return regions


def by_region(
    values: Mapping[str, NumberT], regions: Mapping[str, int], depth: int
) -> list[NumberT]:
    """Sums over the nodes of each region: embedding, ``depth`` layers, head."""
    sums: list[Any] = [0] * (depth + 2)
    for name, value in values.items():
        sums[regions[name]] += value
    return sums


def _gained(graph: fx.Graph, target: str, shapes: Mapping[str, tuple[int, ...]], dim: int) -> int:
    """Rows that the one node which calls the module ``target`` adds to its first argument; 0 if there is none."""
    for node in graph.find_nodes(op="call_module", target=target):
        stream = node.all_input_nodes[0]
        return shapes[node.name][dim] - shapes[stream.name][dim]
    return 0


def _keys(site: fx.Node, shapes: Mapping[str, tuple[int, ...]], owner: nn.Module) -> int:
    """Length of the axis that an attention's softmax runs over."""
    if site.target in SDPA:
        key: fx.Node = AttentionArguments(*site.args, **site.kwargs).key
        return shapes[key.name][-2]
    dim: Any
    if site.op == "call_module":
        dim = owner.get_submodule(str(site.target)).dim
    else:
        dim = site.args[1] if len(site.args) > 1 else site.kwargs["dim"]
    length: int = shapes[site.name][dim]
    return length
