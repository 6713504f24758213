"""Choose the patches that stay."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

from skipvit_fx.ops.select import Select, Survivors
from skipvit_fx.pipeline.rewriting import Rewriting


@dataclass(frozen=True)
class InsertSelect:
    """Before::

        score = stage_1.score(q, k)

    After::

        score = stage_1.score(q, k)
        kept, dropped = stage_1.select(score)

    A later stage also gets the positions of its survivors in the full sequence.
    """

    name: ClassVar[str] = "insert-select"
    requires: ClassVar[frozenset[str]] = frozenset({"scores"})
    provides: ClassVar[frozenset[str]] = frozenset({"selection"})
    invalidates: ClassVar[frozenset[str]] = frozenset()

    def run(self, rewriting: Rewriting) -> None:
        """Insert the selection of every stage behind its cut."""
        editor, tokens = rewriting.editor, rewriting.stream.tokens
        before = None
        for stage in rewriting.stages:
            scores = tuple(stage.scores.values())
            others = tokens.lead + tokens.tail + int(rewriting.plan.fused)
            stage.choice = Select(stage.stage.ratio, rewriting.multiple_of, others)
            select = editor.insert_module(
                f"{stage.name}.select", stage.choice, scores, after=stage.cut
            )
            stage.kept = editor.insert_call(operator.getitem, (select, 0), before=select.next)
            stage.dropped = editor.insert_call(
                operator.getitem, (select, 1), before=stage.kept.next
            )
            stage.positions = stage.kept
            if before is not None and not rewriting.plan.fused:
                stage.positions = editor.insert_module(
                    f"{stage.name}.positions",
                    Survivors(),
                    (before, stage.kept),
                    after=stage.dropped,
                )
            before = stage.positions
