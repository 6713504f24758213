"""The order in which a rewrite happens."""

from __future__ import annotations

from skipvit_fx.passes.check_shapes import CheckShapes
from skipvit_fx.passes.check_span import CheckSpan
from skipvit_fx.passes.eliminate_dead_tokens import EliminateDeadTokens
from skipvit_fx.passes.erase_dead import EraseDead
from skipvit_fx.passes.fill_taps import FillTaps
from skipvit_fx.passes.free_token_sizes import FreeTokenSizes
from skipvit_fx.passes.gather_positions import GatherPositionOperands
from skipvit_fx.passes.insert_fused_token import InsertFusedToken
from skipvit_fx.passes.insert_merge import InsertMerge
from skipvit_fx.passes.insert_score import InsertScore
from skipvit_fx.passes.insert_select import InsertSelect
from skipvit_fx.passes.insert_skip import InsertSkip
from skipvit_fx.passes.locate_attention import LocateAttention
from skipvit_fx.pipeline.runner import Pass


def default_pipeline(*, eliminate_dead_tokens: bool) -> tuple[Pass, ...]:
    """The passes of :func:`skipvit_fx.rewrite`, in order."""
    skip: tuple[Pass, ...] = (
        LocateAttention(),
        CheckSpan(),
        FreeTokenSizes(),
        InsertScore(),
        InsertSelect(),
        InsertSkip(),
        InsertFusedToken(),
        FillTaps(),
        GatherPositionOperands(),
        InsertMerge(),
    )
    dead: tuple[Pass, ...] = (EliminateDeadTokens(),) if eliminate_dead_tokens else ()
    return (*skip, *dead, CheckShapes(), EraseDead())
