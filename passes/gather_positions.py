"""Rotary tables, position biases, masks: each token gets the row of its own position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from skipvit_fx.analysis.rules import Position
from skipvit_fx.errors import UnsupportedModelError
from skipvit_fx.graph.module_paths import module_path
from skipvit_fx.ops.positions import GatherPositions
from skipvit_fx.rewriting.conditions import MERGING, POSITIONS_GATHERED, SIZES_FOLLOW, SKIPPING
from skipvit_fx.rewriting.context import Context
from skipvit_fx.rewriting.passes import Condition


@dataclass(frozen=True)
class GatherPositionOperands:
    """Each token gets the row of its own position.

    Before::

        blocks_1_table = blocks.1.table                         # one row per position
        mul_1 = blocks_1_q * blocks_1_table                     # the query of the kept tokens

    After::

        blocks_1_table = blocks.1.table
        stage_1_blocks_1_table = skipvit.stage_1.gather_1(blocks_1_table, stage_1_kept)
        mul_1 = blocks_1_q * stage_1_blocks_1_table

    An operand that many layers share is gathered once per stage.
    """

    name: ClassVar[str] = "gather-positions"
    requires: ClassVar[tuple[Condition, ...]] = (SIZES_FOLLOW, MERGING, SKIPPING)
    ensures: ClassVar[tuple[Condition, ...]] = (POSITIONS_GATHERED,)

    def run(self, context: Context) -> None:
        """Gather every operand of fixed token length under a drop.

        Raises:
            UnsupportedModelError: an operand cannot be gathered per sample.
        """
        gathered: dict[Any, fx.Node] = {}
        last: dict[int, fx.Node] = {}  # by stage, so that they are numbered in graph order
        for node in context.spans.nodes():
            positions = context.analysis[node].positions
            if not positions:
                continue
            stage = context.spans.active(node)[-1]
            skip = context.skips[stage.index]
            for operand, meets in _by_operand(context, node, positions).items():
                op = _gather(node, meets)
                key = (stage.index, operand, op.place)
                if key not in gathered:
                    gathered[key] = last[stage.index] = context.editor.insert_module(
                        f"{stage.name}.gather_{len(gathered) + 1}",
                        op,
                        (operand, skip.positions),
                        after=last.get(stage.index, skip.kept_tokens),
                        name=f"{stage.name}_{operand.name}",
                    )
                readers = [node, *context.beside.get(node, ())]
                context.editor.rewire_all(readers, operand, gathered[key])


def _by_operand(
    context: Context, node: fx.Node, positions: list[Position]
) -> dict[fx.Node, list[Position]]:
    """The argument nodes that the operands come from."""
    found: dict[fx.Node, list[Position]] = {}
    for position in positions:
        for argument in node.all_input_nodes:
            if context.analysis.value(argument) is position.operand:
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
            "an operand of fixed token length cannot be gathered per sample here, as there is no batch axis",
            node=node.name,
            module_path=module_path(node),
            hint="keep the batch as an axis of its own where position-dependent values are added",
        )
    dims = {p.dim: (p.dim, p.tokens.prefix, p.tokens.suffix) for p in meets}
    return GatherPositions(
        tuple(dims[d] for d in sorted(dims)),
        first.rank,
        first.batch_dim,
        first.per_sample,
        first.repeat,
    )
