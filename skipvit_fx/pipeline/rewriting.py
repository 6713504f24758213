"""The state of one rewrite: the graph, what is known of it, and what was inserted so far."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, fx

from skipvit_fx.analysis.layers import AttentionSite, Layer, Stream
from skipvit_fx.analysis.tokens import TokenAnalysis
from skipvit_fx.ir.capture import Capture
from skipvit_fx.ir.editor import GraphEditor
from skipvit_fx.ops.select import Select
from skipvit_fx.plan import Plan, Stage

Cut = Literal["attention", "block"]
Score = Literal["auto", "cls", "mean", "random"] | Callable[[Tensor], Tensor]


@dataclass
class StageNodes:
    """What stands in the graph for one stage of the plan.

    Attributes:
        index: counts from 1.
        stage: the plan's stage.
        layer: the layer that it scores in.
        cut: the author's node whose rows leave.
        leave_after, leave_before: paths of the modules that the cut lies between.
        span: the author's nodes that work on fewer tokens because of this stage.
        scores: the score nodes, one a site; under ``None`` one that reads the stream.
        choice: the inserted module that says how many patches leave.
        kept, dropped: patch indices within this stage's sequence; ``positions``: of the kept ones in the full one.
        shorter: the sequence without the dropped rows (with the fused token, if the plan has one).
        around: the dropped rows.
    """

    index: int
    stage: Stage
    layer: Layer
    cut: fx.Node
    span: set[fx.Node] = field(default_factory=set)
    leave_after: str = ""
    leave_before: str = ""
    scores: dict[AttentionSite | None, fx.Node] = field(default_factory=dict)
    choice: Select | None = None
    kept: fx.Node | None = None
    dropped: fx.Node | None = None
    positions: fx.Node | None = None
    shorter: fx.Node | None = None
    around: fx.Node | None = None

    @property
    def name(self) -> str:
        return f"stage_{self.index}"


@dataclass
class Rewriting:
    """One rewrite under way.

    Attributes:
        return_before: the module in front of which the dropped tokens return; ``None`` if they never do.
        taps: nodes under a drop, each with those of its readers that do not lead to where the dropped tokens return.
    """

    capture: Capture
    plan: Plan
    cut: Cut = "attention"
    score: Score = "auto"
    prefix_tokens: int | None = None
    fill_taps: bool = False
    multiple_of: int = 1
    facts: set[str] = field(default_factory=set)
    stages: list[StageNodes] = field(default_factory=list)
    return_before: str | None = None
    taps: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    narrow: set[fx.Node] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.editor = GraphEditor(self.capture.module)
        self._analysis: TokenAnalysis | None = None
        self._stream: Stream | None = None

    @property
    def analysis(self) -> TokenAnalysis:
        assert self._analysis is not None, "locate-attention has not run"
        return self._analysis

    @property
    def stream(self) -> Stream:
        assert self._stream is not None, "locate-attention has not run"
        return self._stream

    def locate(self, analysis: TokenAnalysis, stream: Stream) -> None:
        self._analysis, self._stream = analysis, stream

    @property
    def return_node(self) -> fx.Node | None:
        """The author's node behind which dropped rows return: the input of layer R, or the last layer's end."""
        at = self.plan.return_layer
        if at is None:
            return None
        layers = self.stream.layers
        return layers[at - 1].input if at <= len(layers) else layers[-1].end

    def span_nodes(self) -> list[fx.Node]:
        """The author's nodes under any drop, in graph order."""
        under = set().union(*(stage.span for stage in self.stages)) if self.stages else set()
        return [node for node in self.editor.graph.nodes if node in under]

    def on_fewer_tokens(self) -> list[fx.Node]:
        """The author's nodes that see fewer rows than they did: under a drop, or where unread rows are left out."""
        under = {*self.span_nodes(), *self.narrow}
        return [
            node
            for node in self.editor.graph.nodes
            if node in under and node in self.analysis.facts
        ]

    def own_readers(self, cut: fx.Node) -> set[fx.Node]:
        """Nodes that read the whole stream at a cut, and go on doing so when its other readers do not."""
        scores = {score for stage in self.stages for score in stage.scores.values()}
        return scores | set(self.taps.get(cut, ()))

    def rank(self, node: fx.Node) -> int:
        """Number of dimensions of a tensor node."""
        value = self.analysis[node].value
        assert isinstance(value, Tensor)
        return value.ndim

    def active(self, node: fx.Node) -> tuple[StageNodes, ...]:
        """The stages whose drop the author's node is under."""
        return tuple(stage for stage in self.stages if node in stage.span)
