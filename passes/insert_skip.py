"""Take the dropped patches out of the sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from skipvit_fx.ops.skip import Keep, PassAround
from skipvit_fx.pipeline.rewriting import Rewriting


@dataclass(frozen=True)
class InsertSkip:
    """The token-level skip connection opens.

    Before::

        x = x + attention        # the cut
        x = x + mlp(norm(x))

    After::

        x = x + attention
        y = stage_1.keep(x, kept)
        around = stage_1.around(x, dropped)
        y = y + mlp(norm(y))
    """

    name: ClassVar[str] = "insert-skip"
    requires: ClassVar[frozenset[str]] = frozenset({"selection"})
    provides: ClassVar[frozenset[str]] = frozenset({"skips"})
    invalidates: ClassVar[frozenset[str]] = frozenset()

    def run(self, rewriting: Rewriting) -> None:
        """Insert keep and, where dropped rows are needed again, around."""
        editor, stream = rewriting.editor, rewriting.stream
        place = (stream.dim, stream.tokens.lead, stream.tokens.tail)
        for stage in rewriting.stages:
            cut, kept, dropped = stage.cut, stage.kept, stage.dropped
            assert kept is not None
            assert dropped is not None
            own = rewriting.own_readers(cut)
            readers = [user for user in cut.users if user not in own]
            stage.shorter = editor.insert_module(
                f"{stage.name}.keep", Keep(*place), (cut, kept), after=dropped
            )
            if rewriting.return_node is not None or rewriting.plan.fused or rewriting.taps:
                stage.around = editor.insert_module(
                    f"{stage.name}.around", PassAround(*place), (cut, dropped), after=stage.shorter
                )
            for user in readers:
                editor.rewire(user, cut, stage.shorter)
