"""Nodes that nothing reads any more are erased."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from skipvit_fx.graph.editor import is_erasable
from skipvit_fx.rewriting.conditions import NOTHING_DEAD
from skipvit_fx.rewriting.context import Context
from skipvit_fx.rewriting.passes import Condition


@dataclass(frozen=True)
class EraseDead:
    """Remove inserted nodes, and the author's pure nodes, that nothing reads.

    Before::

        blocks_2_v = blocks.2.v(blocks_2_norm1)
        getattr_6 = blocks_2_q.shape                            # the reshape follows its input now
        getitem_11 = getattr_6[1]
        getattr_7 = blocks_2_q.shape

    After::

        blocks_2_v = blocks.2.v(blocks_2_norm1)
        getattr_7 = blocks_2_q.shape
    """

    name: ClassVar[str] = "erase-dead"
    requires: ClassVar[tuple[Condition, ...]] = ()
    ensures: ClassVar[tuple[Condition, ...]] = (NOTHING_DEAD,)

    def run(self, context: Context) -> None:
        """Erase from the last node to the first."""
        for node in reversed(list(context.editor.graph.nodes)):
            if not node.users and is_erasable(node):
                context.editor.erase(node)
