"""What a pass requires and ensures is checked on the graph, and every edit is on record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from skipvit_fx.capture.opening import with_capture
from skipvit_fx.options import Options
from skipvit_fx.passes import passes_for
from skipvit_fx.passes.follow_token_sizes import FollowTokenSizes
from skipvit_fx.passes.insert_return import InsertReturn
from skipvit_fx.passes.insert_score import InsertScore
from skipvit_fx.passes.insert_skip import InsertSkip
from skipvit_fx.plan import Plan
from skipvit_fx.rewriting import conditions
from skipvit_fx.rewriting.conditions import SKIPPING
from skipvit_fx.rewriting.context import Context, start_rewrite
from skipvit_fx.rewriting.passes import Condition, Pass, PassError, run_passes
from support.tiny import Tiny

BOTH = Options(Plan.parse("1(50%)+3"))


def run(*steps: Pass, model: Any = None, options: Options = BOTH) -> Any:
    import torch

    def work(capture: Any) -> Any:
        context = start_rewrite(capture, options)
        return context, run_passes(steps, context)

    return with_capture(model or Tiny().eval(), (torch.zeros(2, 3, 16, 16),), {}, work)


@dataclass(frozen=True)
class Undo:
    """Puts the reader of the whole stream back that a skip took away."""

    name: ClassVar[str] = "undo"
    requires: ClassVar[tuple[Condition, ...]] = (SKIPPING,)
    ensures: ClassVar[tuple[Condition, ...]] = ()

    def run(self, context: Context) -> None:
        (stage,), (skip,) = context.spans.stages, context.skips.values()
        norm = next(iter(n for n in skip.kept_tokens.users if n.op == "call_module"))
        context.editor.rewire(norm, skip.kept_tokens, stage.cut)


@dataclass(frozen=True)
class Idle:
    """Promises what it does not do."""

    ensures: tuple[Condition, ...]
    name: ClassVar[str] = "idle"
    requires: ClassVar[tuple[Condition, ...]] = ()

    def run(self, context: Context) -> None:
        pass


def test_what_is_required_must_hold_before() -> None:
    with pytest.raises(
        PassError, match="'insert-return' requires 'skipping', but stage_1 takes no"
    ):
        run(FollowTokenSizes(), InsertScore(), InsertReturn())


def test_what_another_pass_broke_is_seen() -> None:
    """It is read off the graph, not remembered."""
    steps = [FollowTokenSizes(), InsertScore(), InsertSkip()]
    run(*steps, InsertReturn())
    with pytest.raises(
        PassError, match=r"'insert-return' requires .* blocks_0_norm2 reads add, with all"
    ):
        run(*steps, Undo(), InsertReturn())


@pytest.mark.parametrize(
    ("condition", "up_to", "fault"),
    [
        (
            conditions.SIZES_FOLLOW,
            0,
            "reshape_1 has the number 17 for a length that a drop changes",
        ),
        (conditions.SCORED, 1, "stage_1 has no score node"),
        (conditions.SKIPPING, 2, "stage_1 takes no tokens out of the sequence"),
        (conditions.TAPS_FILLED, 4, "output reads add_1, where tokens are gone"),
        (
            conditions.POSITIONS_GATHERED,
            5,
            "mul_2 reads blocks_1_table, which has a row for every position",
        ),
        (conditions.RETURNED, 7, "blocks_2_norm1 reads add_3, where tokens have not returned"),
        (conditions.NOTHING_DEAD, 9, "nothing reads "),
    ],
)
def test_what_is_ensured_must_hold_after(condition: Condition, up_to: int, fault: str) -> None:
    """Each condition fails on the graph as it is before the pass that ensures it, and holds after that."""
    model = Tiny(hidden=1, positions=True, sizes="literal").eval()
    options = Options(BOTH.plan, fill_taps=True)
    steps = passes_for(options)
    assert condition in steps[up_to].ensures
    with pytest.raises(PassError, match=f"'idle' ensures '{condition.name}', but {fault}"):
        run(*steps[:up_to], Idle((condition,)), model=model, options=options)
    run(*steps, Idle((condition,)), model=model, options=options)


@pytest.mark.parametrize(
    ("condition", "up_to", "fault"),
    [
        (conditions.MERGING, 3, "stage_1 takes no tokens out of the sequence"),
        (
            conditions.KEYS_WEIGHED,
            6,
            "scaled_dot_product_attention_1 does not know the sizes of its keys",
        ),
    ],
)
def test_the_same_where_tokens_are_merged(condition: Condition, up_to: int, fault: str) -> None:
    options = Options(Plan.parse("1(50%)+3+merged"))
    steps = passes_for(options)
    assert condition in steps[up_to].ensures
    with pytest.raises(PassError, match=f"'idle' ensures '{condition.name}', but {fault}"):
        run(*steps[:up_to], Idle((condition,)), options=options)
    run(*steps, Idle((condition,)), options=options)


def test_every_edit_is_on_record() -> None:
    context, records = run(*passes_for(BOTH))
    assert [record.name for record in records] == [step.name for step in passes_for(BOTH)]
    inserted = [e.node for record in records for e in record.events if e.kind == "insert"]
    erased = {e.node for record in records for e in record.events if e.kind == "erase"}
    there = {node.name for node in context.editor.graph.nodes if "skipvit_pass" in node.meta}
    assert there == set(inserted) - erased
    assert len(inserted) == len(set(inserted))
