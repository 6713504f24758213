"""What a rewrite did to a model, in numbers."""

from __future__ import annotations

from torch import fx, nn

from skipvit_fx.graph.attention_ops import key_count
from skipvit_fx.graph.record import (
    LayerRecord,
    RewriteRecord,
    authors_module,
    graph_lines,
    record_of,
)
from skipvit_fx.graph.source import source_of
from skipvit_fx.names import INSERTED_BY, SEARCH
from skipvit_fx.ops.skip import OnStream, PassAround
from skipvit_fx.ops.switch import switches
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
    """Inspect a rewritten model: tokens and multiply-adds per layer, and where each inserted node is.

    ``fast`` is neither run nor changed. The numbers hold for one image of the shape that the model was rewritten for.

    Raises:
        NotRewrittenError: ``fast`` does not come from :func:`skipvit_fx.rewrite`.
    """
    record = record_of(fast)
    assert isinstance(fast, fx.GraphModule)
    looked = _Looked(fast, record)
    return Inspection(
        model=record.model,
        plan=str(record.plan),
        cut=record.options.cut,
        score=record.options.score_name,
        frontend=record.frontend,
        frontend_reason=record.frontend_reason,
        eliminate_dead_tokens=record.options.eliminates,
        skipping=all(switch.active for switch in switches(fast)),
        validated=record.validated,
        prefix=record.prefix,
        patches=record.patches,
        tail=record.suffix,
        class_token=record.class_token,
        stages=tuple(
            StageReport(stage.layer, stage.leave_after, stage.leave_before, stage.return_before)
            for stage in record.stages
        ),
        layers=tuple(map(looked.layer, record.layers)),
        embedding=looked.rest(0),
        head=looked.rest(len(record.layers) + 1),
        macs=looked.now.total,
        baseline_macs=looked.baseline.total,
        search=fast.meta.get(SEARCH),
        nodes=tuple(map(looked.node, fast.graph.nodes)),
        _diff=graph_diff(record, graph_lines(fast.graph)),
    )


class _Looked:
    """A rewritten model, counted with skipping on and off, region by region."""

    def __init__(self, fast: fx.GraphModule, record: RewriteRecord) -> None:
        self.fast, self.record = fast, record
        self.now = count_macs(fast, record.args, record.kwargs, skipping=True)
        self.baseline = count_macs(fast, record.args, record.kwargs, skipping=False)
        self.nodes = {node.name: node for node in fast.graph.nodes}
        self.regions = regions_of(self.nodes, record.layers)
        depth = len(record.layers)
        counts = self.now.nodes, self.baseline.nodes, self.now.bytes, self.baseline.bytes
        self.work = [*zip(*(by_region(c, self.regions, depth) for c in counts), strict=True)]

    def layer(self, layer: LayerRecord) -> LayerReport:
        shapes = self.now.shapes
        rows = [shapes[name][self.record.token_dim] for name in (layer.cut, layer.end)]
        attention = self.nodes[layer.attention]
        return LayerReport(
            layer.index,
            layer.module_path,
            attention_tokens=key_count(attention, self.fast, lambda node: shapes[node.name]),
            queries=rows[0],
            ffn_tokens=rows[1],
            dropped=self._dropped_in(layer.index),
            returned=self._returned_in(layer.index),
            **self._work(layer.index),
        )

    def rest(self, region: int) -> RestReport:
        return RestReport(
            dropped=self._dropped_in(region) if region == 0 else 0,
            returned=self._returned_in(region),
            **self._work(region),
        )

    def node(self, node: fx.Node) -> NodeReport:
        region = self.regions[node.name]
        source = source_of(node)
        return NodeReport(
            name=node.name,
            op=node.op,
            target=printed_target(node),
            inserted_by=node.meta.get(INSERTED_BY),
            layer=region if 0 < region <= len(self.record.layers) else None,
            shape=self.now.shapes[node.name],
            macs=self.now.nodes[node.name],
            reads=tuple(read.name for read in node.all_input_nodes),
            baseline_shape=self.baseline.shapes[node.name],
            token_dims=self._token_dims(node),
            module_path=authors_module(node),
            source=source.place if source else None,
            code=source.code if source else "",
        )

    def _token_dims(self, node: fx.Node) -> tuple[int, ...]:
        """As the analysis found them; of an inserted node, as its module says, or where skipping changes its length."""
        if INSERTED_BY not in node.meta:
            return self.record.token_dims.get(node.name, ())
        op = self.fast.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(op, OnStream):
            return (1,) if isinstance(op, PassAround) else (op.dim,)
        now, full = self.now.shapes[node.name], self.baseline.shapes[node.name]
        if len(now) != len(full):
            return ()
        return tuple(d for d, (a, b) in enumerate(zip(now, full, strict=True)) if a != b)

    def _work(self, region: int) -> dict[str, int]:
        names = ("macs", "baseline_macs", "bytes", "baseline_bytes")
        return dict(zip(names, self.work[region], strict=True))

    def _dropped_in(self, layer: int) -> int:
        leaving = [stage for stage in self.record.stages if stage.layer == layer]
        ways = (f"{stage.path}.{way}" for stage in leaving for way in ("keep", "merge"))
        return -sum(map(self._gained, ways))

    def _returned_in(self, region: int) -> int:
        spans, stages = self.record.plan.spans, self.record.stages
        back = [stage for stage in stages if spans[stage.span].return_layer == region]
        return sum(self._gained(f"{stage.path}.put_back") for stage in back)

    def _gained(self, target: str) -> int:
        """Rows that the only node calling this module adds to its first argument; 0 if there is no such node."""
        shapes, dim = self.now.shapes, self.record.token_dim
        for node in self.fast.graph.find_nodes(op="call_module", target=target):
            now, before = (shapes[n.name] for n in (node, node.all_input_nodes[0]))
            return int((now if isinstance(now[0], int) else now[0])[dim] - before[dim])
        return 0
