"""One captured and analysed graph on which plan after plan is put, and taken off again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx, nn

from skipvit_fx.analysis.layers import Stream, find_stream
from skipvit_fx.analysis.soundness import mixing_leaves
from skipvit_fx.analysis.spans import lay_plan
from skipvit_fx.analysis.tokens import TokenAnalysis
from skipvit_fx.author.side_effects import contained
from skipvit_fx.capture.capture import Capture
from skipvit_fx.capture.opening import OpenModules, with_capture
from skipvit_fx.errors import UnsupportedModelError
from skipvit_fx.graph.editor import GraphEditor
from skipvit_fx.graph.module_paths import naming_parts
from skipvit_fx.names import INSERTED_BY
from skipvit_fx.options import Options
from skipvit_fx.passes import passes_for
from skipvit_fx.passes.erase_dead import EraseDead
from skipvit_fx.plan import Plan, Span, Stage
from skipvit_fx.rewriting.context import Context

KINDS = ("skip", "fused", "merged")
"""What becomes of the tokens that leave: they pass around, or one stands in for them, or they are merged."""


def span_of(stages: tuple[Stage, ...], return_layer: int | None, kind: str) -> Span:
    """A span of one of the :data:`KINDS`."""
    return Span(stages, return_layer, fused=kind == "fused", merged=kind == "merged")


@dataclass
class SharedGraph:
    """A model, captured and analysed once. :meth:`rewritten` puts a plan on its graph for a while.

    It computes what :func:`skipvit_fx.rewrite` would for that plan: the same checks and the same passes run, on the
    same captured graph. What is left out is capturing and validating it again.

    Attributes:
        model: as its author wrote it; not changed.
        capture: the model as a graph in eval mode, with the model's parameters.
        options: those of the rewrites; the plan in them is of no account.
        places: for every kind, the layers at which tokens may leave.
        refused: why no tokens may leave at a layer, by layer.
    """

    model: nn.Module
    capture: Capture
    analysis: TokenAnalysis
    stream: Stream
    options: Options
    places: dict[str, tuple[int, ...]] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._editor = GraphEditor(self.capture.module)
        self._authors = {node: (node.args, node.kwargs) for node in self.graph.nodes}

    @property
    def graph(self) -> fx.Graph:
        return self._editor.graph

    @property
    def depth(self) -> int:
        """The number of layers."""
        return len(self.stream.layers)

    @contextlib.contextmanager
    def rewritten(self, plan: Plan) -> Iterator[Context]:
        """A context in which the plan is on the graph; nodes that nothing reads are still there.

        The author's modules are judged once, when the places are found, and not run again.

        Raises:
            PlanError, UnsupportedModelError: as :func:`skipvit_fx.rewrite` does.
        """
        options = replace(self.options, plan=plan)
        try:
            with naming_parts(self.capture.opened):
                spans = lay_plan(self.analysis, self.stream, options)
                if leaves := mixing_leaves(spans, self.capture.opened):
                    raise _closed(leaves[0])
                context = Context(self.capture, options, self.analysis, spans)
                for step in passes_for(options):
                    if not isinstance(step, EraseDead):
                        step.run(context)
            yield context
        finally:
            self._take_off()

    def _take_off(self) -> None:
        """Undo all edits: no pass that ran erases a node of the author's."""
        for node, (args, kwargs) in self._authors.items():
            if node.args != args:
                node.args = args
            if node.kwargs != kwargs:
                node.kwargs = kwargs
        for node in reversed(self.graph.nodes):
            if INSERTED_BY in node.meta:
                self._editor.erase(node)

    def inputs(self, node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What a node of the author's reads in the captured graph, whatever is on it now, as fake tensors."""
        given: Any = fx.node.map_arg(self._authors[node], self.analysis.value)
        args, kwargs = given
        return args, kwargs

    def find_places(self) -> None:
        """Try a stage of every kind at every layer: one that returns at once, which is the least that it may do."""
        with contained(self.model):
            for kind in KINDS:
                layers = range(kind == "merged", self.depth + 1)
                self.places[kind] = tuple(layer for layer in layers if self._takes(layer, kind))
        found = {layer for layers in self.places.values() for layer in layers}
        self.refused = {
            layer: why for layer, why in self.refused.items() if layer and layer not in found
        }

    def _takes(self, layer: int, kind: str) -> bool:
        try:
            with self.rewritten(Plan((span_of((Stage(layer, 1),), layer + 1, kind),))):
                return True
        except UnsupportedModelError as error:
            self.refused.setdefault(layer, error.message)
            return False

    def leaves_to_open(self) -> set[str]:
        """Modules that must be traced through before a stage at some layer can be judged."""
        leaves: set[str] = set()
        for layer in range(1, self.depth + 1):
            for kind in ("skip", "merged"):
                for back in (layer + 1, None):
                    plan = Plan((span_of((Stage(layer, 1),), back, kind),))
                    with contextlib.suppress(UnsupportedModelError):
                        spans = lay_plan(
                            self.analysis, self.stream, replace(self.options, plan=plan)
                        )
                        leaves.update(mixing_leaves(spans, self.capture.opened))
        return leaves


def share_graph(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], options: Options
) -> SharedGraph:
    """Capture a model, find its layers, and find where a stage may be.

    Raises:
        TraceError, UnsupportedModelError: as :func:`skipvit_fx.rewrite` does, whatever the plan.
    """
    found: SharedGraph | None = None

    def work(capture: Capture) -> SharedGraph:
        nonlocal found
        analysis = TokenAnalysis(capture)
        stream = find_stream(analysis, options.prefix_tokens)
        found = SharedGraph(model, capture, analysis, stream, options)
        if leaves := found.leaves_to_open():
            raise OpenModules(leaves)
        return found

    try:
        shared = with_capture(model, args, kwargs, work, frontend=options.frontend)
    except (OpenModules, UnsupportedModelError):
        if found is None:
            raise
        shared = found  # a leaf cannot be opened: what lies above it is refused plan by plan
    shared.capture.module.eval()
    shared.find_places()
    return shared


def _closed(path: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        "this module may mix tokens, and what it computes cannot be followed",
        node=path.replace(".", "_"),
        module_path=path,
        hint="choose a plan that returns before this place or drops after it, or change the model there",
    )
