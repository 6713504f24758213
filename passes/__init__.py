"""The graph passes, one per file, and the order in which they run.

They live in passes/ and are imported as skipvit_fx.passes.
"""

if __name__ != "skipvit_fx.passes":
    raise ImportError(f"import the graph passes as skipvit_fx.passes, not as {__name__}")

from skipvit_fx.options import Options
from skipvit_fx.passes.eliminate_dead_tokens import EliminateDeadTokens
from skipvit_fx.passes.erase_dead import EraseDead
from skipvit_fx.passes.fill_taps import FillTaps
from skipvit_fx.passes.follow_token_sizes import FollowTokenSizes
from skipvit_fx.passes.gather_positions import GatherPositionOperands
from skipvit_fx.passes.insert_merge import InsertMerge
from skipvit_fx.passes.insert_return import InsertReturn
from skipvit_fx.passes.insert_score import InsertScore
from skipvit_fx.passes.insert_skip import InsertSkip
from skipvit_fx.passes.weigh_keys import WeighKeys
from skipvit_fx.rewriting.passes import Pass


def passes_for(options: Options) -> tuple[Pass, ...]:
    """The passes of :func:`skipvit_fx.rewrite`, in the order in which they run."""
    dead: tuple[Pass, ...] = (EliminateDeadTokens(),) if options.eliminates else ()
    return (
        FollowTokenSizes(),
        InsertScore(),
        InsertSkip(),
        InsertMerge(),
        FillTaps(),
        GatherPositionOperands(),
        WeighKeys(),
        InsertReturn(),
        *dead,
        EraseDead(),
    )
