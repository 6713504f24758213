"""A plan applied to the layers of a model: which of the author's nodes see fewer tokens, and which nodes tap them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import fx

from skipvit_fx.analysis.axes import tensors_in
from skipvit_fx.analysis.layers import Layer, Stream
from skipvit_fx.analysis.operands import OPERANDS, Operands, find_operands
from skipvit_fx.analysis.tokens import TokenAnalysis, carries_tokens
from skipvit_fx.errors import UnsupportedModelError
from skipvit_fx.graph.module_paths import module_after, module_before, module_path
from skipvit_fx.options import Options
from skipvit_fx.plan import Span, Stage


@dataclass(frozen=True)
class Return:
    """Where the tokens of one span of the plan return.

    Attributes:
        span: the plan's span.
        node: the author's node after which they do: the input of layer R, or the last layer's end; ``None`` if they
            never do.
        before: the module before which they do; ``None`` if they never do.
    """

    span: Span
    node: fx.Node | None
    before: str | None


@dataclass(frozen=True)
class StageSpan:
    """Where the tokens of one stage of the plan are missing.

    Attributes:
        index: counts from 1.
        returns: where its tokens return, with those of the other stages of its span of the plan.
        stage: the plan's stage.
        layer: the layer that it scores in.
        cut: the author's node whose rows leave.
        nodes: the author's nodes that work on fewer tokens because of this stage.
        operands: of each attention of the layer, if tokens are merged by their keys, or a score reads them.
        leave_after, leave_before: paths of the modules before and after the cut.
    """

    index: int
    returns: Return
    stage: Stage
    layer: Layer
    cut: fx.Node
    nodes: frozenset[fx.Node]
    leave_after: str
    leave_before: str
    operands: tuple[Operands, ...] = ()

    @property
    def name(self) -> str:
        """The name under which its modules are inserted."""
        return f"stage_{self.index}"


@dataclass(frozen=True)
class Spans:
    """All stages of a plan on one model.

    ::

        x0 ── norm ─ attention ─ + ── norm ─ mlp ─ + ──   ...   ── + ── norm ── head
              layer 1            cut └─────────── span ────────────┘ return

    Attributes:
        returns: where the tokens of each span of the plan return.
        stages: those of all spans, in the order of their layers. A node is under the drops of one span only.
        taps: nodes under a drop, each with those of its readers that do not lead to where the dropped tokens return.
    """

    analysis: TokenAnalysis
    stream: Stream
    options: Options
    returns: tuple[Return, ...]
    stages: tuple[StageSpan, ...]
    taps: dict[fx.Node, list[fx.Node]]

    def nodes(self) -> Iterator[fx.Node]:
        """The author's nodes under any drop, in graph order."""
        under = frozenset[fx.Node]().union(*(stage.nodes for stage in self.stages))
        return (node for node in self.analysis.module.graph.nodes if node in under)

    def active(self, node: fx.Node) -> tuple[StageSpan, ...]:
        """The stages whose drop the author's node is under."""
        return tuple(stage for stage in self.stages if node in stage.nodes)

    def weighs(self, node: fx.Node) -> bool:
        """Whether an attention's keys may be merged tokens, whose sizes count."""
        attends = self.analysis[node].softmax_over is not None
        if not attends or not self.options.proportional_attention:
            return False
        return any(stage.returns.span.merged for stage in self.active(node))

    def is_after_the_layers(self, node: fx.Node) -> bool:
        """Whether the node belongs to the head, and dropped tokens never return."""
        return self.never_return and self.stream.layers[-1].end < node

    @property
    def never_return(self) -> bool:
        """Whether the tokens of the last span stay away."""
        return bool(self.returns) and self.returns[-1].node is None

    def stages_of(self, returns: Return) -> tuple[StageSpan, ...]:
        """The stages of one span of the plan."""
        return tuple(stage for stage in self.stages if stage.returns is returns)

    def returning(self, node: fx.Node) -> Return | None:
        """The span of the plan whose tokens return after the author's node."""
        return next((r for r in self.returns if r.node is node), None)


def lay_plan(analysis: TokenAnalysis, stream: Stream, options: Options) -> Spans:
    """The spans of a plan; the graph must be as it was captured.

    Raises:
        PlanError: the model has fewer layers than the plan names.
        UnsupportedModelError: the plan needs a place that cannot be told in the model.
    """
    plan, layers = options.plan, stream.layers
    plan.check(len(layers))
    _refuse_unsure_end(stream, options)
    scored_by = not set(OPERANDS).isdisjoint(options.score_asks)
    returns: list[Return] = []
    stages: list[StageSpan] = []
    for span in plan.spans:
        back = _return(stream, span)
        returns.append(back)
        beyond = analysis.below(back.node) if back.node else frozenset()
        for stage in span.stages:
            layer = layers[stage.layer - 1] if stage.layer else _embedding(layers[0])
            cut = layer.cut if options.cut == "attention" else layer.end
            under = analysis.below(cut) - beyond if cut is not back.node else frozenset()
            sites = [site.node for site in layer.sites] if cut is layer.cut else []
            leave_after = module_before(cut, stream.on_path, layer.input, sites)
            leave_before = module_after(cut, stream.on_path)
            operands = _operands(analysis, layer) if span.merged or scored_by else ()
            stages.append(
                StageSpan(
                    index=len(stages) + 1,
                    returns=back,
                    stage=stage,
                    layer=layer,
                    cut=cut,
                    nodes=under,
                    leave_after=leave_after,
                    leave_before=leave_before,
                    operands=operands,
                )
            )
    spans = Spans(analysis, stream, options, tuple(returns), tuple(stages), {})
    taps = _taps(spans)
    if options.fill_taps:  # these readers, and what is computed from them, will see every token
        full = frozenset(reader for readers in taps.values() for reader in readers)
        full = full.union(*map(analysis.below, full))
        stages = [replace(stage, nodes=stage.nodes - full) for stage in stages]
    return replace(spans, stages=tuple(stages), taps=taps)


def _embedding(first: Layer) -> Layer:
    """What is in front of the first layer, as a layer that has no attention."""
    return replace(
        first, index=0, cut=first.input, end=first.input, sites=(), unclear="", unsure=""
    )


def _operands(analysis: TokenAnalysis, layer: Layer) -> tuple[Operands, ...]:
    """What each attention of a layer multiplies.

    Raises:
        UnsupportedModelError: it cannot be told.
    """
    if layer.unclear:
        raise UnsupportedModelError(
            f"queries, keys and values of the attention of layer {layer.index} cannot be told: {layer.unclear}",
            node=layer.cut.name,
            module_path=module_path(layer.cut),
            hint="choose another layer, or drop tokens by score='random' or by a function of the tokens alone",
        )
    return tuple(find_operands(analysis, site) for site in layer.sites)


def _return(stream: Stream, span: Span) -> Return:
    """Where the tokens of a span return."""
    layers, at = stream.layers, span.return_layer
    if at is None:
        return Return(span, None, None)
    node = layers[at - 1].input if at <= len(layers) else layers[-1].end
    return Return(span, node, module_after(node, stream.on_path))


def _refuse_unsure_end(stream: Stream, options: Options) -> None:
    """Refuse a plan that needs the end of the last layer where it cannot be told."""
    last, plan = stream.layers[-1], options.plan
    cuts = options.cut == "block" and any(s.layer == last.index for s in plan.stages)
    returns = any(span.return_layer == last.index + 1 for span in plan.spans)
    if last.unsure and (cuts or returns):
        raise UnsupportedModelError(
            last.unsure,
            node=last.end.name,
            module_path=module_path(last.end),
            hint="put each layer in a module of its own, or return at a layer's input and cut after the attention",
        )


def _taps(spans: Spans) -> dict[fx.Node, list[fx.Node]]:
    """The nodes that read tokens under a drop and are not on a path to their return, or to the last layer's end."""
    taps = {}
    for returns in spans.returns:
        goal = returns.node or spans.stream.layers[-1].end
        way = spans.analysis.above(goal)
        stages = spans.stages_of(returns)
        under = set().union(*(stage.nodes | {stage.cut} for stage in stages))
        for node in spans.analysis.module.graph.nodes:
            if node not in way or node not in under or not carries_tokens(spans.analysis[node]):
                continue
            readers = [u for u in node.users if u not in way and u is not goal]
            if readers := [u for u in readers if not _takes_prefix(spans.analysis, u)]:
                taps[node] = readers
    return taps


def _takes_prefix(analysis: TokenAnalysis, node: fx.Node) -> bool:
    """Whether a node takes only prefix rows, or sizes, from the tokens that it reads."""
    facts = analysis[node]
    if not tensors_in(facts.value):
        return node.op != "output"
    return facts.reads is not None and not facts.mixing and not carries_tokens(facts)
