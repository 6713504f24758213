"""The dropped patches return to where they were."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from skipvit_fx.analysis.spans import Return
from skipvit_fx.rewriting.conditions import MERGING, RETURNED, SKIPPING
from skipvit_fx.rewriting.context import Context
from skipvit_fx.rewriting.passes import Condition
from skipvit_fx.rewriting.returning import insert_returns


@dataclass(frozen=True)
class InsertReturn:
    """Close the token-level skip connection, last stage first.

    Before::

        add_3 = add_2 + blocks_1_mlp                            # the stream in front of layer R
        blocks_2_norm1 = blocks.2.norm1(add_3)
        add_4 = add_3 + squeeze_2

    After::

        add_3 = add_2 + blocks_1_mlp
        stage_1_returned = skipvit.stage_1.put_back(add_3, stage_1_bypassed, stage_1_kept, stage_1_dropped)
        blocks_2_norm1 = blocks.2.norm1(stage_1_returned)
        add_4 = stage_1_returned + squeeze_2
    """

    name: ClassVar[str] = "insert-return"
    requires: ClassVar[tuple[Condition, ...]] = (
        MERGING,
        SKIPPING,
    )
    ensures: ClassVar[tuple[Condition, ...]] = (RETURNED,)

    def run(self, context: Context) -> None:
        """Put the tokens of each stage back after the node where its span returns."""
        for returns in context.spans.returns:
            if returns.node is not None:
                _close(context, returns, returns.node)


def _close(context: Context, returns: Return, node: fx.Node) -> None:
    stages = context.spans.stages_of(returns)
    last = stages[-1]
    # cut and return may be the same node: then the sequence was shortened right there
    start = context.skips[last.index].kept_tokens if last.cut is node else node
    readers = list(start.users)
    context.editor.rewire_all(
        readers, start, insert_returns(context, start, stages, "put_back", "returned")
    )
