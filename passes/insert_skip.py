"""The least important patches leave the sequence: the token-level skip connection opens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from skipvit_fx.analysis.spans import Return, StageSpan
from skipvit_fx.ops.select import Select, Survivors
from skipvit_fx.ops.skip import Fuse, Keep, PassAround
from skipvit_fx.rewriting.conditions import SCORED, SKIPPING
from skipvit_fx.rewriting.context import Context, Skip
from skipvit_fx.rewriting.passes import Condition


@dataclass(frozen=True)
class InsertSkip:
    """Choose the patches that stay, and pass the others around.

    Before::

        add = cat + squeeze                                     # the cut
        blocks_0_norm2 = blocks.0.norm2(add)
        blocks_0_mlp = blocks.0.mlp(blocks_0_norm2)
        add_1 = add + blocks_0_mlp

    After::

        add = cat + squeeze
        stage_1_choice = skipvit.stage_1.select(stage_1_scores)
        stage_1_kept = stage_1_choice[0]
        stage_1_dropped = stage_1_choice[1]
        stage_1_kept_tokens = skipvit.stage_1.keep(add, stage_1_kept)
        stage_1_bypassed = skipvit.stage_1.around(add, stage_1_dropped)
        blocks_0_norm2 = blocks.0.norm2(stage_1_kept_tokens)
        blocks_0_mlp = blocks.0.mlp(blocks_0_norm2)
        add_1 = stage_1_kept_tokens + blocks_0_mlp

    A later stage also gets the positions of its survivors in the full sequence. With a fused token ("EViT: Expediting
    Vision Transformers via Token Reorganizations", section 3.2), the kept tokens get one more row, made from the
    dropped ones and their scores.
    """

    name: ClassVar[str] = "insert-skip"
    requires: ClassVar[tuple[Condition, ...]] = (SCORED,)
    ensures: ClassVar[tuple[Condition, ...]] = (SKIPPING,)

    def run(self, context: Context) -> None:
        """Insert the selection of every stage after its cut, and what takes tokens out."""
        before: dict[Return, fx.Node] = {}
        for stage in context.spans.stages:
            if stage.returns.span.merged:
                continue
            full = context.full_stream_readers(stage.cut)
            readers = [user for user in stage.cut.users if user not in full]
            skip = context.skips[stage.index] = _skip(context, stage, before.get(stage.returns))
            context.editor.rewire_all(readers, stage.cut, skip.kept_tokens)
            before[stage.returns] = skip.positions


def _skip(context: Context, stage: StageSpan, before: fx.Node | None) -> Skip:
    """Insert one stage; ``before`` is the positions of the patches that the previous stage of its span kept."""
    editor, span, tokens = context.editor, stage.returns.span, context.stream.tokens
    others = tokens.prefix + tokens.suffix + int(span.fused)
    selector = Select(stage.stage.amount, context.options.multiple_of, others)
    scores = tuple(context.scores[stage.index].values())
    choice = editor.insert_module(
        f"{stage.name}.select", selector, scores, after=stage.cut, name=f"{stage.name}_choice"
    )
    kept = editor.insert_item(choice, 0, f"{stage.name}_kept")
    dropped = editor.insert_item(choice, 1, f"{stage.name}_dropped")
    positions = kept
    if before is not None and not span.fused:
        positions = editor.insert_module(
            f"{stage.name}.positions",
            Survivors(),
            (before, kept),
            after=dropped,
            name=f"{stage.name}_positions",
        )
    kept_tokens = editor.insert_module(
        f"{stage.name}.keep",
        Keep(*context.place),
        (stage.cut, kept),
        after=dropped,
        name=f"{stage.name}_kept_tokens",
    )
    if stage.returns.node is None and not span.fused and not context.spans.taps:
        return Skip(selector, kept, dropped, positions, kept_tokens)
    bypassed = editor.insert_module(
        f"{stage.name}.around",
        PassAround(*context.place),
        (stage.cut, dropped),
        after=kept_tokens,
        name=f"{stage.name}_bypassed",
    )
    if span.fused:
        kept_tokens = editor.insert_module(
            f"{stage.name}.fuse",
            Fuse(*context.place),
            (kept_tokens, bypassed, dropped, *scores),
            after=bypassed,
            name=f"{stage.name}_with_fused",
        )
    return Skip(selector, kept, dropped, positions, kept_tokens, bypassed)
