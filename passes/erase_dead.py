"""What nobody reads any more goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from skipvit_fx.ir.editor import INSERTED_BY
from skipvit_fx.pipeline.rewriting import Rewriting


@dataclass(frozen=True)
class EraseDead:
    """Remove inserted nodes, and pure ones of the author's, that nobody reads.

    Before::

        n = x.size(1)                  # read by nobody: the reshape follows its input
        y = x.reshape(b, x.size(1), -1)

    After::

        y = x.reshape(b, x.size(1), -1)

    The author's modules stay, read or not: they may draw random numbers.
    """

    name: ClassVar[str] = "erase-dead"
    requires: ClassVar[frozenset[str]] = frozenset()
    provides: ClassVar[frozenset[str]] = frozenset()
    invalidates: ClassVar[frozenset[str]] = frozenset()

    def run(self, rewriting: Rewriting) -> None:
        """Erase from the last node to the first."""
        editor = rewriting.editor
        for node in reversed(list(editor.graph.nodes)):
            pure = node.op in ("call_function", "call_method", "get_attr") and not node.is_impure()
            if not node.users and (pure or INSERTED_BY in node.meta):
                editor.erase(node)
