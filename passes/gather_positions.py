"""Rotary tables, position biases, masks: each token meets the row of its own position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from skipvit_fx.analysis.rules import Position
from skipvit_fx.errors import UnsupportedModelError
from skipvit_fx.ir.places import module_path
from skipvit_fx.ops.positions import GatherPositions
from skipvit_fx.pipeline.rewriting import Rewriting, StageNodes


@dataclass(frozen=True)
class GatherPositionOperands:
    """Before (``cos`` has one row per position, ``q`` only the kept tokens)::

        q = q * cos

    After::

        near = stage_1.positions_1(cos, positions)
        q = q * near

    An operand that many layers share is gathered once a stage.
    """

    name: ClassVar[str] = "gather-positions"
    requires: ClassVar[frozenset[str]] = frozenset({"skips", "live-sizes"})
    provides: ClassVar[frozenset[str]] = frozenset({"positions"})
    invalidates: ClassVar[frozenset[str]] = frozenset()

    def run(self, rewriting: Rewriting) -> None:
        """Gather every operand of fixed token length under a drop.

        Raises:
            UnsupportedModelError: an operand cannot be gathered per sample.
        """
        gathered: dict[Any, fx.Node] = {}
        for node in rewriting.span_nodes():
            positions = rewriting.analysis[node].positions
            if not positions:
                continue
            stage = rewriting.active(node)[-1]
            for operand, meets in _by_operand(rewriting, node, positions).items():
                op = _gather(node, meets)
                key = (stage.index, operand, repr(sorted(vars_of(op).items())))
                if key not in gathered:
                    count = len(gathered) + 1
                    assert stage.positions is not None
                    assert stage.shorter is not None
                    gathered[key] = rewriting.editor.insert_module(
                        f"{stage.name}.gather_{count}",
                        op,
                        (operand, stage.positions),
                        after=stage.shorter,
                    )
                rewriting.editor.rewire(node, operand, gathered[key])
                for score in _scores_at(rewriting, node):
                    rewriting.editor.rewire(score, operand, gathered[key])


def vars_of(op: GatherPositions) -> dict[str, Any]:
    """What two gathers of one operand have to agree in to be the same."""
    return {
        "dims": op.dims,
        "rank": op.rank,
        "batch_dim": op.batch_dim,
        "per_sample": op.per_sample,
        "repeat": op.repeat,
    }


def _by_operand(
    rewriting: Rewriting, node: fx.Node, positions: list[Position]
) -> dict[fx.Node, list[Position]]:
    """The argument nodes that the operands come from."""
    found: dict[fx.Node, list[Position]] = {}
    for position in positions:
        for argument in node.all_input_nodes:
            if rewriting.analysis.value(argument) is position.operand:
                found.setdefault(argument, []).append(position)
                break
        else:
            raise UnsupportedModelError(
                "an operand of fixed token length is made inside a function",
                node=node.name,
                module_path=module_path(node),
                hint="compute the operand before calling the function",
            )
    return found


def _gather(node: fx.Node, meets: list[Position]) -> GatherPositions:
    first = meets[0]
    if first.batch_dim is None or any(p.per_sample and p.repeat > 1 for p in meets):
        raise UnsupportedModelError(
            "an operand of fixed token length cannot be gathered per sample here, for want of a batch axis",
            node=node.name,
            module_path=module_path(node),
            hint="keep the batch as an axis of its own where position-dependent values are added",
        )
    dims = {p.dim: (p.dim, p.tokens.lead, p.tokens.tail) for p in meets}
    return GatherPositions(
        tuple(dims[d] for d in sorted(dims)),
        first.rank,
        first.batch_dim,
        first.per_sample,
        first.repeat,
    )


def _scores_at(rewriting: Rewriting, node: fx.Node) -> list[fx.Node]:
    """Score nodes that read the same operands as the attention at ``node``."""
    stages: list[StageNodes] = rewriting.stages
    return [
        score
        for stage in stages
        for site, score in stage.scores.items()
        if site and site.node is node
    ]
