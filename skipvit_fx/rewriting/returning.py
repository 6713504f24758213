"""Tokens that left are put back into the sequence."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from skipvit_fx.analysis.spans import StageSpan
from skipvit_fx.ops.merge import Unmerge
from skipvit_fx.ops.skip import OnStream, PutBack
from skipvit_fx.rewriting.context import Context


def insert_returns(
    context: Context, node: fx.Node, stages: Iterable[StageSpan], path: str, name: str
) -> fx.Node:
    """The stream at ``node`` with the tokens of these stages in it again, the last to leave first.

    Args:
        path, name: of the inserted module and of its node, within those of each stage.
    """
    for stage in reversed(tuple(stages)):
        skip = context.skips[stage.index]
        if stage.returns.span.merged:
            op: OnStream = Unmerge(*context.place)
            parts = [skip.kept, skip.dropped, skip.into]
        else:
            op = PutBack(*context.place, fused=stage.returns.span.fused)
            parts = [skip.bypassed, skip.kept, skip.dropped]
        node = context.editor.insert_module(
            f"{stage.name}.{path}",
            op,
            (node, *parts),
            after=node,
            name=f"{stage.name}_{name}",
        )
    return node
