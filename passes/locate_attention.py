"""Find attention, layers and the token axis; lay the plan over them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from skipvit_fx.analysis.axes import tensors_in
from skipvit_fx.analysis.layers import find_stream
from skipvit_fx.analysis.tokens import TokenAnalysis, carries_tokens
from skipvit_fx.errors import UnsupportedModelError
from skipvit_fx.ir.places import module_after, module_before, module_path
from skipvit_fx.pipeline.rewriting import Rewriting, StageNodes


@dataclass(frozen=True)
class LocateAttention:
    """Changes nothing. Afterwards the layers are known, for every stage its cut and its span, and who taps it.

    ::

        x0 ── norm ─ attention ─ + ── norm ─ mlp ─ + ──   ...   ── + ── norm ── head
              layer 1            cut               layer 2         end
    """

    name: ClassVar[str] = "locate-attention"
    requires: ClassVar[frozenset[str]] = frozenset()
    provides: ClassVar[frozenset[str]] = frozenset({"stream", "spans"})
    invalidates: ClassVar[frozenset[str]] = frozenset()

    def run(self, rewriting: Rewriting) -> None:
        """Fill in ``rewriting.stream``, ``rewriting.stages`` and ``rewriting.taps``.

        Raises:
            UnsupportedModelError: there are no layers, or the plan needs a place that the model does not tell.
        """
        analysis = TokenAnalysis(rewriting.capture)
        rewriting.locate(analysis, find_stream(analysis, rewriting.prefix_tokens))
        rewriting.plan.check(len(rewriting.stream.layers))
        _refuse_unsure_end(rewriting)
        lay_plan(rewriting)


def lay_plan(rewriting: Rewriting) -> None:
    """Fill in ``rewriting.stages`` and ``rewriting.taps`` where the stream is known; the graph must be unchanged."""
    layers, way = rewriting.stream.layers, rewriting.stream.way
    returns = rewriting.return_node
    beyond = _descendants(returns) if returns is not None else set()
    if returns is not None:
        rewriting.return_before = module_after(returns, way)
    for index, stage in enumerate(rewriting.plan.stages, start=1):
        layer = layers[stage.layer - 1]
        cut = layer.cut if rewriting.cut == "attention" else layer.end
        span = _descendants(cut) - beyond if cut is not returns else set()
        sites = [site.node for site in layer.sites] if cut is layer.cut else []
        around = module_before(cut, way, layer.input, sites), module_after(cut, way)
        rewriting.stages.append(StageNodes(index, stage, layer, cut, span, *around))
    _note_taps(rewriting)


def _refuse_unsure_end(rewriting: Rewriting) -> None:
    """Refuse a plan that needs the end of the last layer where it cannot be told."""
    last, plan = rewriting.stream.layers[-1], rewriting.plan
    cuts = rewriting.cut == "block" and any(s.layer == last.index for s in plan.stages)
    if last.unsure and (cuts or plan.return_layer == last.index + 1):
        raise UnsupportedModelError(
            last.unsure,
            node=last.end.name,
            module_path=module_path(last.end),
            hint="put each layer in a module of its own, or return at a layer's input and cut after the attention",
        )


def _note_taps(rewriting: Rewriting) -> None:
    """Note who reads tokens under a drop without being on the way to where they return (or to the last layer's end).

    With ``fill_taps``, such a reader, and all that is computed from it, will see every token again.
    """
    goal = rewriting.return_node or rewriting.stream.layers[-1].end
    way = _ancestors(goal)
    under: set[fx.Node] = set().union(*(stage.span | {stage.cut} for stage in rewriting.stages))
    for node in rewriting.editor.graph.nodes:
        if node not in way or node not in under or not carries_tokens(rewriting.analysis[node]):
            continue
        readers = [u for u in node.users if u not in way and u is not goal]
        taps = [u for u in readers if not _takes_prefix(rewriting, u)]
        if taps:
            rewriting.taps[node] = taps
    if rewriting.fill_taps:
        for readers in rewriting.taps.values():
            for reader in readers:
                beyond = {reader} | _descendants(reader)
                for stage in rewriting.stages:
                    stage.span -= beyond


def _takes_prefix(rewriting: Rewriting, node: fx.Node) -> bool:
    """Whether a node takes nothing but prefix rows, or sizes, from the tokens that it reads."""
    facts = rewriting.analysis[node]
    if not tensors_in(facts.value):
        return node.op != "output"
    return facts.reads is not None and not facts.mixing and not carries_tokens(facts)


def _ancestors(node: fx.Node) -> set[fx.Node]:
    return _reached(node, lambda n: n.all_input_nodes)


def _descendants(node: fx.Node) -> set[fx.Node]:
    return _reached(node, lambda n: n.users)


def _reached(node: fx.Node, step: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        for neighbour in step(waiting.pop()):
            if neighbour not in found:
                found.add(neighbour)
                waiting.append(neighbour)
    return found
