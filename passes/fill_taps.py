"""Features that are read between a drop and its return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from skipvit_fx.ops.skip import Merge
from skipvit_fx.rewriting.conditions import SKIPPING, TAPS_FILLED
from skipvit_fx.rewriting.context import Context
from skipvit_fx.rewriting.passes import Condition


@dataclass(frozen=True)
class FillTaps:
    """A reader that is not on the way to the return sees all tokens: the dropped ones as they were when they left.

    Before (``y`` has fewer tokens)::

        feature = y.transpose(1, 2).reshape(b, c, h, w)      # returned by the model
        y = y + mlp(norm(y))

    After::

        full = stage_1.tap_1(y, around, kept, dropped)
        feature = full.transpose(1, 2).reshape(b, c, h, w)
        y = y + mlp(norm(y))
    """

    name: ClassVar[str] = "fill-taps"
    requires: ClassVar[tuple[Condition, ...]] = (SKIPPING,)
    ensures: ClassVar[tuple[Condition, ...]] = (TAPS_FILLED,)

    def run(self, context: Context) -> None:
        """Insert one merge for every drop that a tapped node is under."""
        for count, (node, readers) in enumerate(context.spans.taps.items(), start=1):
            current = node
            for stage in reversed(context.spans.active(node)):
                skip = context.skips[stage.index]
                current = context.editor.insert_module(
                    f"{stage.name}.tap_{count}",
                    Merge(*context.place, fused=context.plan.fused),
                    (current, skip.bypassed, skip.kept, skip.dropped),
                    after=current,
                )
            if current is not node:
                context.editor.rewire_all(readers, node, current)
