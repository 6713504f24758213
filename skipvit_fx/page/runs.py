"""What is measured for a report: the same images through a rewritten model, with skipping on and off."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from skipvit_fx.errors import ReportError
from skipvit_fx.graph.calls import kinds_of, signature_of
from skipvit_fx.graph.inputs import places_of
from skipvit_fx.graph.module import SkipViTModule
from skipvit_fx.graph.more_graphs import author_of
from skipvit_fx.page.answers import Answer, answers
from skipvit_fx.page.inputs import Inputs
from skipvit_fx.reports.grid import Grid, find_grid
from skipvit_fx.reports.latency import copy_to_run, measure_latency
from skipvit_fx.reports.latency_report import LatencyReport
from skipvit_fx.reports.token_report import TokenTrace
from skipvit_fx.reports.tokens import selections_noted, traces_of


@dataclass(frozen=True)
class Runs:
    """What was seen.

    Attributes:
        traces: what each stage kept, in the run that gave the answers.
        answers: one per image.
        grid: where the patches are; ``None`` if that is not known.
        latency: times; ``None`` if none were measured.
    """

    traces: tuple[TokenTrace, ...]
    answers: tuple[Answer, ...]
    grid: Grid | None
    latency: LatencyReport | None

    @property
    def time_saved(self) -> float | None:
        """The share of the time of whole calls; negative if it takes longer. ``None`` if nothing was measured."""
        return None if self.latency is None else 1 - 1 / self.latency.speedup

    @property
    def milliseconds(self) -> tuple[float, float] | None:
        """Of a call, before and after: medians."""
        if self.latency is None:
            return None
        return 1e3 * median(self.latency.baseline_seconds), 1e3 * median(self.latency.seconds)


def run(
    fast: SkipViTModule,
    inputs: Inputs,
    rounds: int,
    progress: Callable[[int, int], None] | None = None,
) -> Runs:
    """Run copies of a rewritten model in eval mode, with skipping as planned and off; neither changes the model.

    Args:
        fast: what :func:`skipvit_fx.rewrite` returned.
        inputs: the call.
        rounds: of time measurements; 0 for none.
        progress: called after each round of the measurements with the number done and their total.

    Raises:
        ReportError: this call is of another kind than the example that the model was rewritten for.
        SkipViTError: the model does not run on these inputs.
    """
    args, kwargs = inputs.args, inputs.kwargs
    on, off = copy_to_run(fast, skipping=True), copy_to_run(fast, skipping=False)
    first = on.own.calls[0]
    signature = signature_of(on.own.method("forward"))
    if kinds_of(signature, places_of(signature, args, kwargs), args, kwargs) != first.kinds:
        raise _other_kind()
    with torch.set_grad_enabled(first.recorded.told):
        with selections_noted(on) as noted:
            after = on.graph_forward(*args, **kwargs)
        before = off(*args, **kwargs)
    if noted.record is not first.record:
        raise _other_kind()
    latency = None
    if rounds:
        latency = measure_latency(
            author_of(fast), fast, inputs.call, rounds=rounds, progress=progress
        )
    return Runs(
        tuple(traces_of(noted)),
        answers(fast, before, after, len(inputs.names)),
        find_grid(fast, args, kwargs),
        latency,
    )


def _other_kind() -> ReportError:
    return ReportError(
        "these images are of another size or kind than the example that the model was rewritten for, and the numbers "
        "of the report hold for that",
        hint="rewrite with example_inputs like these images",
    )
