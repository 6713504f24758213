"""Measured time of plans beside the unmodified model."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median
from typing import Any

import torch
from torch import nn

from skipvit_fx.api import rewrite
from skipvit_fx.capture.cloning import clone_structure
from skipvit_fx.capture.example import floating_like
from skipvit_fx.plan import Plan
from skipvit_fx.planner.images import Batch
from skipvit_fx.reports.latency import WARM_UP, ModuleTimer, waiting_for

ROUNDS = 5


@torch.no_grad()
def milliseconds(
    model: nn.Module, plans: Iterable[Plan], batch: Batch, options: dict[str, Any]
) -> list[float]:
    """The time of a call with a batch, in eval mode: of the model, then of each plan; medians of alternating rounds.

    Every plan is really rewritten, and validated.

    Raises:
        SkipViTError: as :func:`skipvit_fx.rewrite` does.
    """
    device = floating_like(model).device
    moved, wait = batch.to(device), waiting_for(device)
    example = moved.kwargs or moved.args
    rewritten = [rewrite(model, plan, example_inputs=example, **options) for plan in plans]
    timers = [ModuleTimer(module.eval(), wait) for module in (clone_structure(model), *rewritten)]
    for _ in range(WARM_UP + ROUNDS):
        for timer in timers:
            timer.run(*moved.args, **moved.kwargs)
    return [1e3 * median(timer.seconds[WARM_UP:]) for timer in timers]
