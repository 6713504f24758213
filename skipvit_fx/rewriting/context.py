"""What a pass works on: the graph, what the analysis knows about it, and what was inserted so far."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import fx

from skipvit_fx.analysis.layers import AttentionSite, Stream, find_stream
from skipvit_fx.analysis.soundness import mixing_leaves
from skipvit_fx.analysis.spans import Spans, StageSpan, lay_plan
from skipvit_fx.analysis.tokens import NodeFacts, TokenAnalysis
from skipvit_fx.capture.capture import Capture
from skipvit_fx.capture.opening import OpenModules
from skipvit_fx.graph.editor import GraphEditor
from skipvit_fx.ops.select import Amount
from skipvit_fx.options import Options
from skipvit_fx.plan import Plan


class Skip(NamedTuple):
    """The inserted nodes of one stage.

    Attributes:
        selector: the module that decides how many patches leave.
        kept, dropped: patch indices within this stage's sequence, ``[batch, k]`` and ``[batch, n - k]``.
        positions: positions of the kept patches in the full sequence.
        kept_tokens: the sequence without the dropped rows, with the fused token if the plan has one.
        bypassed: the dropped rows; ``None`` if they are not needed again.
        into: of merged tokens: the places of those that they are part of now.
        sizes: the number of patches in each token of the shorter sequence; ``None`` if it is one.
    """

    selector: Amount
    kept: fx.Node
    dropped: fx.Node
    positions: fx.Node
    kept_tokens: fx.Node
    bypassed: fx.Node | None = None
    into: fx.Node | None = None
    sizes: fx.Node | None = None


@dataclass
class Context:
    """One rewrite in progress.

    Attributes:
        capture: the model as a graph; passes edit it through ``editor``.
        options: what was asked for.
        analysis: what is known about the author's nodes. Passes do not change it.
        spans: the plan on the author's graph.
        scores: by stage, the score nodes, one per site; one that reads the stream has the key ``None``.
        beside: by attention, inserted nodes that compute a part of it again, and read its operands.
        skips: by stage, what was inserted where its tokens leave.
        narrow: the author's nodes that compute only the rows that are read, and how many these are.
    """

    capture: Capture
    options: Options
    analysis: TokenAnalysis
    spans: Spans
    scores: dict[int, dict[AttentionSite | None, fx.Node]] = field(default_factory=dict)
    beside: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    skips: dict[int, Skip] = field(default_factory=dict)
    narrow: dict[fx.Node, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.editor = GraphEditor(self.capture.module)

    @property
    def plan(self) -> Plan:
        return self.options.plan

    @property
    def stream(self) -> Stream:
        return self.spans.stream

    @property
    def place(self) -> tuple[int, int, int]:
        """Token dimension, prefix and suffix rows of the residual stream: arguments of inserted modules."""
        return self.stream.dim, self.stream.tokens.prefix, self.stream.tokens.suffix

    def stages(self) -> list[tuple[StageSpan, Skip]]:
        """Every stage with what was inserted for it, first to last."""
        return [(stage, self.skips[stage.index]) for stage in self.spans.stages]

    def full_stream_readers(self, cut: fx.Node) -> set[fx.Node]:
        """Nodes that read the whole stream at a cut, and continue to when its other readers do not."""
        scores = {score for of_stage in self.scores.values() for score in of_stage.values()}
        return scores | set(self.spans.taps.get(cut, ()))

    def knowing(self, facts: Mapping[fx.Node, NodeFacts]) -> Context:
        """The same rewrite, for a pass that also needs facts of inserted nodes."""
        other = copy.copy(self)
        other.analysis = copy.copy(self.analysis)
        other.analysis.facts = {**self.analysis.facts, **facts}
        # what is found on an edited graph is not kept for the next plan
        other.analysis.mixes = dict(self.analysis.mixes)
        return other

    def patches_at(self, node: fx.Node, patches: int) -> int:
        """How many patches and fused tokens are left at one of the author's nodes that had ``patches``."""
        for stage in self.spans.active(node):
            dropped = self.skips[stage.index].selector.dropped(patches)
            patches -= dropped
            if dropped and stage.returns.span.fused:
                patches += 1
        return patches

    def on_fewer_tokens(self) -> list[fx.Node]:
        """The author's nodes that see fewer rows than before: under a drop, or where unread rows are left out."""
        under = {*self.spans.nodes(), *self.narrow}
        return [n for n in self.editor.graph.nodes if n in under and n in self.analysis.facts]


def start_rewrite(capture: Capture, options: Options) -> Context:
    """Find the layers of a captured model, lay the plan over them, and refuse it if it would be wrong.

    Raises:
        OpenModules: leaf modules are not sound as a whole, and must be traced through.
        PlanError: the model has fewer layers than the plan names.
        UnsupportedModelError: there are no layers, or a node under a drop is not sound.
    """
    analysis = TokenAnalysis(capture)
    spans = lay_plan(analysis, find_stream(analysis, options.prefix_tokens), options)
    if leaves := mixing_leaves(spans, capture.opened):
        raise OpenModules(leaves)
    return Context(capture, options, analysis, spans)
