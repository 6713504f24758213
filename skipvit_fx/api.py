"""The public calls."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from skipvit_fx.ir.capture import Capture
from skipvit_fx.ir.example import example_of
from skipvit_fx.ir.module import SkipViTModule
from skipvit_fx.ir.opening import with_capture
from skipvit_fx.ops.switch import Switchable
from skipvit_fx.pipeline.default import default_pipeline
from skipvit_fx.pipeline.record import RECORD, graph_lines, make_record
from skipvit_fx.pipeline.rewriting import Cut, Rewriting, Score
from skipvit_fx.pipeline.runner import run_passes
from skipvit_fx.plan import Plan


def rewrite(
    model: nn.Module,
    plan: Plan | str,
    *,
    example_inputs: Any = None,
    frontend: Literal["auto", "symbolic"] = "auto",
    cut: Cut = "attention",
    score: Score = "auto",
    prefix_tokens: int | None = None,
    eliminate_dead_tokens: bool = True,
    verify: bool = False,
) -> SkipViTModule:
    plan = Plan.parse(plan) if isinstance(plan, str) else plan
    args, kwargs = example_of(model, example_inputs)
    drops = any(stage.ratio for stage in plan.stages) or not plan.stages
    elimination = eliminate_dead_tokens and drops

    def work(capture: Capture) -> SkipViTModule:
        before = graph_lines(capture.module.graph)
        rewriting = Rewriting(capture, plan, cut, score, prefix_tokens)
        records = run_passes(default_pipeline(eliminate_dead_tokens=elimination), rewriting)
        capture.module.meta[RECORD] = make_record(
            type(model).__name__, rewriting, records, before, eliminate_dead_tokens=elimination
        )
        return capture.module

    return with_capture(model, args, kwargs, work)


def set_skipping(fast: nn.Module, on: bool) -> None:
    for module in fast.modules():
        if isinstance(module, Switchable):
            module.enabled = on
