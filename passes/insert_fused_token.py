"""One token stands in for the dropped ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from skipvit_fx.ops.skip import Fuse
from skipvit_fx.pipeline.rewriting import Rewriting


@dataclass(frozen=True)
class InsertFusedToken:
    """EViT's fused token ("EViT: Expediting Vision Transformers via Token Reorganizations", section 3.2).

    Before::

        y = stage_1.keep(x, kept)

    After::

        y = stage_1.keep(x, kept)
        z = stage_1.fuse(y, around, dropped, score)      # y and one row more
    """

    name: ClassVar[str] = "insert-fused-token"
    requires: ClassVar[frozenset[str]] = frozenset({"skips", "scores"})
    provides: ClassVar[frozenset[str]] = frozenset()
    invalidates: ClassVar[frozenset[str]] = frozenset()

    def run(self, rewriting: Rewriting) -> None:
        """Append the fused token of every stage, if the plan asks for it."""
        if not rewriting.plan.fused:
            return
        editor, stream = rewriting.editor, rewriting.stream
        place = (stream.dim, stream.tokens.lead, stream.tokens.tail)
        for stage in rewriting.stages:
            assert stage.shorter is not None
            assert stage.around is not None
            readers = list(stage.shorter.users)
            fused = editor.insert_module(
                f"{stage.name}.fuse",
                Fuse(*place),
                (stage.shorter, stage.around, stage.dropped, *stage.scores.values()),
                after=stage.around,
            )
            for user in readers:
                editor.rewire(user, stage.shorter, fused)
            stage.shorter = fused
