"""The dropped patches return to where they were."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from skipvit_fx.ops.skip import Merge
from skipvit_fx.rewriting.conditions import RETURNED, SKIPPING
from skipvit_fx.rewriting.context import Context
from skipvit_fx.rewriting.passes import Condition


@dataclass(frozen=True)
class InsertMerge:
    """Close the token-level skip connection, last stage first.

    Before::

        add_3 = add_2 + blocks_1_mlp                            # the stream in front of layer R
        blocks_2_norm1 = blocks.2.norm1(add_3)
        add_4 = add_3 + squeeze_2

    After::

        add_3 = add_2 + blocks_1_mlp
        stage_1_returned = skipvit.stage_1.merge(add_3, stage_1_bypassed, stage_1_kept, stage_1_dropped)
        blocks_2_norm1 = blocks.2.norm1(stage_1_returned)
        add_4 = stage_1_returned + squeeze_2
    """

    name: ClassVar[str] = "insert-merge"
    requires: ClassVar[tuple[Condition, ...]] = (SKIPPING,)
    ensures: ClassVar[tuple[Condition, ...]] = (RETURNED,)

    def run(self, context: Context) -> None:
        """Insert one merge per stage after the return node, if the plan returns."""
        returns, stages = context.spans.return_node, context.stages()
        if returns is None or not stages:
            return
        last, skip = stages[-1]
        # cut and return may be the same node: then the sequence was shortened right there
        current = start = skip.kept_tokens if last.cut is returns else returns
        readers = list(start.users)
        for stage, skip in reversed(stages):
            current = context.editor.insert_module(
                f"{stage.name}.merge",
                Merge(*context.place, fused=context.plan.fused),
                (current, skip.bypassed, skip.kept, skip.dropped),
                after=current,
                name=f"{stage.name}_returned",
            )
        context.editor.rewire_all(readers, start, current)
