"""What a rewrite did to a model, in numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from skipvit_fx.graph.attention_ops import SDPA, AttentionArguments
from skipvit_fx.graph.editor import INSERTED_BY
from skipvit_fx.graph.record import LayerRecord, graph_lines, record_of
from skipvit_fx.ops.switch import Switchable
from skipvit_fx.reports.diff import graph_diff
from skipvit_fx.reports.inspection_report import (
    Inspection,
    LayerReport,
    NodeReport,
    RestReport,
    StageReport,
)
from skipvit_fx.reports.layers import by_region, regions_of
from skipvit_fx.reports.macs import count_macs
from skipvit_fx.torch_internals import printed_target


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
            attention_tokens=_keys(places[layer.attention], now.shapes, fast),
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
        cut=record.options.cut,
        score=record.options.score_name,
        frontend=record.frontend,
        frontend_reason=record.frontend_reason,
        eliminate_dead_tokens=record.options.eliminates,
        skipping=all(switches),
        validated=record.validated,
        prefix=record.prefix,
        patches=record.patches,
        tail=record.tail,
        class_token=record.class_token,
        stages=tuple(
            StageReport(stage.layer, stage.leave_after, stage.leave_before, stage.return_before)
            for stage in record.stages
        ),
        layers=tuple(layer_report(layer) for layer in record.layers),
        embedding=rest_report(0),
        head=rest_report(depth + 1),
        macs=now.total,
        baseline_macs=baseline.total,
        nodes=tuple(
            NodeReport(
                name=node.name,
                op=node.op,
                target=str(printed_target(node)),
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
