"""The dropped patches return to where they were."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from skipvit_fx.ops.skip import Merge
from skipvit_fx.pipeline.rewriting import Rewriting


@dataclass(frozen=True)
class InsertMerge:
    """The token-level skip connection closes, last stage first.

    Before::

        y = y + mlp(norm(y))     # the stream in front of layer R

    After::

        y = y + mlp(norm(y))
        x = stage_1.merge(y, around, kept, dropped)
    """

    name: ClassVar[str] = "insert-merge"
    requires: ClassVar[frozenset[str]] = frozenset({"skips"})
    provides: ClassVar[frozenset[str]] = frozenset({"merges"})
    invalidates: ClassVar[frozenset[str]] = frozenset()

    def run(self, rewriting: Rewriting) -> None:
        """Insert one merge a stage behind the return node, if the plan returns."""
        returns = rewriting.return_node
        if returns is None:
            return
        editor, stream = rewriting.editor, rewriting.stream
        place = (stream.dim, stream.tokens.lead, stream.tokens.tail)
        if not rewriting.stages:
            return
        last = rewriting.stages[-1]
        # cut and return may be one node: then the sequence was shortened right there
        start = last.shorter if last.cut is returns else returns
        assert start is not None
        readers = list(start.users)
        current = start
        for stage in reversed(rewriting.stages):
            current = editor.insert_module(
                f"{stage.name}.merge",
                Merge(*place, fused=rewriting.plan.fused),
                (current, stage.around, stage.kept, stage.dropped),
                after=current,
            )
        for user in readers:
            editor.rewire(user, start, current)
