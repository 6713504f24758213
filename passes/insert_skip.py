"""The least important patches leave the sequence: the token-level skip connection opens."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from skipvit_fx.analysis.spans import StageSpan
from skipvit_fx.ops.select import Select, Survivors
from skipvit_fx.ops.skip import Fuse, Keep, PassAround
from skipvit_fx.rewriting.conditions import SCORED, SKIPPING
from skipvit_fx.rewriting.context import Context, Skip
from skipvit_fx.rewriting.passes import Condition


@dataclass(frozen=True)
class InsertSkip:
    """Choose the patches that stay, and let the others pass around.

    Before::

        score = stage_1.score(q, k)
        x = x + attention        # the cut
        x = x + mlp(norm(x))

    After::

        score = stage_1.score(q, k)
        x = x + attention
        kept, dropped = stage_1.select(score)
        y = stage_1.keep(x, kept)
        around = stage_1.around(x, dropped)
        y = y + mlp(norm(y))

    A later stage also gets the positions of its survivors in the full sequence. With a fused token ("EViT: Expediting
    Vision Transformers via Token Reorganizations", section 3.2), ``stage_1.fuse(y, around, dropped, score)`` is ``y``
    with one row more.
    """

    name: ClassVar[str] = "insert-skip"
    requires: ClassVar[tuple[Condition, ...]] = (SCORED,)
    ensures: ClassVar[tuple[Condition, ...]] = (SKIPPING,)

    def run(self, context: Context) -> None:
        """Insert the selection of every stage after its cut, and what takes tokens out."""
        before = None
        for stage in context.spans.stages:
            full = context.full_stream_readers(stage.cut)
            readers = [user for user in stage.cut.users if user not in full]
            skip = context.skips[stage.index] = _skip(context, stage, before)
            context.editor.rewire_all(readers, stage.cut, skip.kept_tokens)
            before = skip.positions


def _skip(context: Context, stage: StageSpan, before: fx.Node | None) -> Skip:
    """Insert one stage; ``before`` are the positions of those that the stage before it kept."""
    editor, plan, tokens = context.editor, context.plan, context.stream.tokens
    others = tokens.lead + tokens.tail + int(plan.fused)
    selector = Select(stage.stage.ratio, context.options.multiple_of, others)
    scores = tuple(context.scores[stage.index].values())
    choice = editor.insert_module(f"{stage.name}.select", selector, scores, after=stage.cut)
    kept = editor.insert_call(operator.getitem, (choice, 0), before=choice.next)
    dropped = editor.insert_call(operator.getitem, (choice, 1), before=kept.next)
    positions = kept
    if before is not None and not plan.fused:
        name = f"{stage.name}.positions"
        positions = editor.insert_module(name, Survivors(), (before, kept), after=dropped)
    place = context.place
    shorter = editor.insert_module(
        f"{stage.name}.keep", Keep(*place), (stage.cut, kept), after=dropped
    )
    around = None
    if context.spans.return_node is not None or plan.fused or context.spans.taps:
        around = editor.insert_module(
            f"{stage.name}.around", PassAround(*place), (stage.cut, dropped), after=shorter
        )
    if plan.fused:
        shorter = editor.insert_module(
            f"{stage.name}.fuse",
            Fuse(*place),
            (shorter, around, dropped, *scores),
            after=around or shorter,
        )
    return Skip(selector, kept, dropped, positions, shorter, around)
