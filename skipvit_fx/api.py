"""The public calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from skipvit_fx.errors import TraceError, UnsupportedModelError
from skipvit_fx.ir.capture import capture_symbolic
from skipvit_fx.ir.example import example_from_config
from skipvit_fx.ir.module import SkipViTModule
from skipvit_fx.ops.switch import Switchable
from skipvit_fx.passes.check_span import OpenModules
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
    args, kwargs = (example_from_config(model), {}) if example_inputs is None else _split(example_inputs)
    also_open: frozenset[str] = frozenset()
    while True:
        capture = capture_symbolic(model, args, kwargs, also_open)
        before = graph_lines(capture.module.graph)
        rewriting = Rewriting(capture, plan, cut, score, prefix_tokens)
        drops = any(stage.ratio for stage in plan.stages) or not plan.stages
        elimination = eliminate_dead_tokens and drops
        passes = default_pipeline(eliminate_dead_tokens=elimination)
        try:
            records = run_passes(passes, rewriting)
        except OpenModules as leaves:
            also_open |= leaves.paths
            continue
        break
    capture.module.meta[RECORD] = make_record(
        type(model).__name__, rewriting, records, before, eliminate_dead_tokens=elimination
    )
    return capture.module


def _split(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, Tensor):
        return (example,), {}
    return tuple(example), {}


def set_skipping(fast: nn.Module, on: bool) -> None:
    for module in fast.modules():
        if isinstance(module, Switchable):
            module.enabled = on
