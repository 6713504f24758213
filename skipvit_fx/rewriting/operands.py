"""How the operands of a layer's attentions lie, for inserted modules that read them."""

from __future__ import annotations

from collections.abc import Sequence

from skipvit_fx.analysis.axes import tokens_of
from skipvit_fx.analysis.operands import Operand, heads_of
from skipvit_fx.analysis.spans import StageSpan
from skipvit_fx.errors import UnsupportedModelError
from skipvit_fx.graph.module_paths import module_path
from skipvit_fx.ops.operands import OperandLayout
from skipvit_fx.rewriting.context import Context


def layouts_of(
    context: Context, stage: StageSpan, what: str, operands: Sequence[Operand]
) -> tuple[OperandLayout, ...]:
    """Where one kind of operand lies in each attention of a stage's layer.

    Args:
        what: their name, for messages: ``"keys"``.
        operands: one per attention.

    Raises:
        UnsupportedModelError: those of parallel attentions cannot be joined, or the batch is not the first axis.
    """
    layouts, channels = [], set()
    for site, operand in zip(stage.layer.sites, operands, strict=True):
        axes = context.analysis.axes(operand.node)
        assert axes is not None
        others = (operand.tokens % len(axes), operand.channels % len(axes))
        heads = heads_of(site, tuple(dim for d, dim in enumerate(axes) if d not in others))
        tokens = tokens_of(axes[operand.tokens])
        assert tokens is not None
        layouts.append(
            OperandLayout(operand.tokens, operand.channels, heads, tokens.prefix, tokens.suffix)
        )
        channels.add(context.analysis[operand.node].value.shape[operand.channels])
    if len(channels) > 1:
        raise UnsupportedModelError(
            f"the {what} of its parallel attentions have different numbers of channels, {sorted(channels)}",
            node=stage.cut.name,
            module_path=module_path(stage.cut),
            hint="choose another layer, or drop tokens by a score that does not read them",
        )
    return tuple(layouts)
