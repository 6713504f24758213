"""Features that are read between a drop and its return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from skipvit_fx.rewriting.conditions import MERGING, SKIPPING, TAPS_FILLED
from skipvit_fx.rewriting.context import Context
from skipvit_fx.rewriting.passes import Condition
from skipvit_fx.rewriting.returning import insert_returns


@dataclass(frozen=True)
class FillTaps:
    """A reader that is not on the path to the return sees all tokens, the dropped ones as they were when they left.

    Before::

        add_1 = stage_1_kept_tokens + blocks_0_mlp              # fewer tokens, and returned by the model
        blocks_1_norm1 = blocks.1.norm1(add_1)
        return [head, add_1]

    After::

        add_1 = stage_1_kept_tokens + blocks_0_mlp
        stage_1_tap_1 = skipvit.stage_1.tap_1(add_1, stage_1_bypassed, stage_1_kept, stage_1_dropped)
        blocks_1_norm1 = blocks.1.norm1(add_1)
        return [head, stage_1_tap_1]
    """

    name: ClassVar[str] = "fill-taps"
    requires: ClassVar[tuple[Condition, ...]] = (
        MERGING,
        SKIPPING,
    )
    ensures: ClassVar[tuple[Condition, ...]] = (TAPS_FILLED,)

    def run(self, context: Context) -> None:
        """Put back the tokens of every drop that a tapped node is under."""
        for count, (node, readers) in enumerate(context.spans.taps.items(), start=1):
            tap = f"tap_{count}"
            filled = insert_returns(context, node, context.spans.active(node), tap, tap)
            if filled is not node:
                context.editor.rewire_all(readers, node, filled)
