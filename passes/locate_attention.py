"""Find attention, layers and the token axis; lay the plan over them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from skipvit_fx.analysis.layers import find_stream
from skipvit_fx.analysis.tokens import TokenAnalysis
from skipvit_fx.pipeline.rewriting import Rewriting, StageNodes


@dataclass(frozen=True)
class LocateAttention:
    """Changes nothing. Afterwards the layers are known, and for every stage its cut and its span.

    ::

        x0 ── norm ─ attention ─ + ── norm ─ mlp ─ + ──   ...   ── + ── norm ── head
              layer 1            cut               layer 2         end
    """

    name: ClassVar[str] = "locate-attention"
    requires: ClassVar[frozenset[str]] = frozenset()
    provides: ClassVar[frozenset[str]] = frozenset({"stream", "spans"})
    invalidates: ClassVar[frozenset[str]] = frozenset()

    def run(self, rewriting: Rewriting) -> None:
        """Fill in ``rewriting.stream`` and ``rewriting.stages``."""
        analysis = TokenAnalysis(rewriting.capture)
        rewriting.locate(analysis, find_stream(analysis, rewriting.prefix_tokens))
        layers = rewriting.stream.layers
        rewriting.plan.check(len(layers))
        returns = rewriting.return_node
        beyond = _descendants(returns) if returns is not None else set()
        for index, stage in enumerate(rewriting.plan.stages, start=1):
            layer = layers[stage.layer - 1]
            cut = layer.cut if rewriting.cut == "attention" else layer.end
            span = _descendants(cut) - beyond if cut is not returns else set()
            rewriting.stages.append(StageNodes(index, stage, layer, cut, span))


def _descendants(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        for user in waiting.pop().users:
            if user not in found:
                found.add(user)
                waiting.append(user)
    return found
