"""Similar patches are merged, and their sizes count in attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from skipvit_fx.analysis.spans import Return, StageSpan
from skipvit_fx.ops.merge import Match, Merge
from skipvit_fx.ops.select import Survivors
from skipvit_fx.rewriting.conditions import MERGING, SIZES_FOLLOW
from skipvit_fx.rewriting.context import Context, Skip
from skipvit_fx.rewriting.operands import layouts_of
from skipvit_fx.rewriting.passes import Condition


@dataclass(frozen=True)
class InsertMerge:
    """In a span with ``+merged``, every patch that leaves becomes part of the most similar one of those that stay.

    Before::

        add = cat + squeeze                                     # the cut
        blocks_0_norm2 = blocks.0.norm2(add)
        blocks_0_mlp = blocks.0.mlp(blocks_0_norm2)
        add_1 = add + blocks_0_mlp

    After::

        add = cat + squeeze
        stage_1_choice = skipvit.stage_1.select(getitem_2)
        stage_1_kept = stage_1_choice[0]
        stage_1_dropped = stage_1_choice[1]
        stage_1_into = stage_1_choice[2]
        stage_1_merged = skipvit.stage_1.merge(add, stage_1_kept, stage_1_dropped, stage_1_into)
        stage_1_kept_tokens = stage_1_merged[0]
        stage_1_sizes = stage_1_merged[1]
        blocks_0_norm2 = blocks.0.norm2(stage_1_kept_tokens)
        blocks_0_mlp = blocks.0.mlp(blocks_0_norm2)
        add_1 = stage_1_kept_tokens + blocks_0_mlp

    A later stage also gets the positions of its tokens in the full sequence, and their sizes.
    """

    name: ClassVar[str] = "insert-merge"
    requires: ClassVar[tuple[Condition, ...]] = (SIZES_FOLLOW,)
    ensures: ClassVar[tuple[Condition, ...]] = (MERGING,)

    def run(self, context: Context) -> None:
        """Insert the matching and the merge of every stage after its cut.

        Raises:
            UnsupportedModelError: the keys of parallel attentions cannot be compared together, or a batch is not the
                first axis of the keys.
        """
        before: dict[Return, Skip] = {}
        for stage in context.spans.stages:
            if not stage.returns.span.merged:
                continue
            full = context.full_stream_readers(stage.cut)
            readers = [user for user in stage.cut.users if user not in full]
            skip = _merge(context, stage, before.get(stage.returns))
            context.skips[stage.index] = before[stage.returns] = skip
            context.editor.rewire_all(readers, stage.cut, skip.kept_tokens)


def _merge(context: Context, stage: StageSpan, before: Skip | None) -> Skip:
    """Insert one stage; ``before`` is the previous one of its span."""
    editor, tokens = context.editor, context.stream.tokens
    matcher = Match(
        stage.stage.amount,
        context.options.multiple_of,
        tokens.prefix + tokens.suffix,
        layouts_of(context, stage, "keys", [operands.key for operands in stage.operands]),
    )
    keys = [operands.key.node for operands in stage.operands]
    choice = editor.insert_module(
        f"{stage.name}.select", matcher, keys, after=stage.cut, name=f"{stage.name}_choice"
    )
    kept, dropped, into = chosen = [
        editor.insert_item(choice, i, f"{stage.name}_{name}")
        for i, name in enumerate(("kept", "dropped", "into"))
    ]
    sizes = [before.sizes] if before else []
    merged = editor.insert_module(
        f"{stage.name}.merge",
        Merge(*context.place),
        [stage.cut, *chosen, *sizes],
        after=into,
        name=f"{stage.name}_merged",
    )
    kept_tokens = editor.insert_item(merged, 0, f"{stage.name}_kept_tokens")
    sizes_now = editor.insert_item(merged, 1, f"{stage.name}_sizes")
    positions = kept
    if before is not None:
        positions = editor.insert_module(
            f"{stage.name}.positions",
            Survivors(),
            (before.positions, kept),
            after=sizes_now,
            name=f"{stage.name}_positions",
        )
    return Skip(matcher, kept, dropped, positions, kept_tokens, into=into, sizes=sizes_now)
