"""What a plan costs and preserves, on batches that the unmodified model has seen already."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch

from skipvit_fx.capture.example import floating_like
from skipvit_fx.errors import GuardError, SearchError
from skipvit_fx.plan import Plan
from skipvit_fx.planner.costs import Costs
from skipvit_fx.planner.images import Batch
from skipvit_fx.planner.quality import Metric, Quality, doubts, quality_of
from skipvit_fx.planner.replay import Begun, Replay
from skipvit_fx.planner.shared_graph import SharedGraph

BATCHES_TO_DOUBT = 4
"""From the model's answers on so many batches it is told whether they mean anything."""


class Evaluator:
    """Evaluates plans on a set of batches.

    Attributes:
        doubts: why the model's answers on them are no measure; empty if nothing speaks against them.
    """

    def __init__(
        self, shared: SharedGraph, costs: Costs, metric: Metric, batches: list[Batch]
    ) -> None:
        """Run the model itself on every batch.

        Raises:
            SearchError: one of the batches is a call of another kind than the first.
        """
        self.shared, self.costs, self.metric = shared, costs, metric
        self._batches = batches
        self._device = floating_like(shared.model).device
        self._replay = Replay(shared)
        self._begun: list[Begun] = []
        outputs: list[Any] = []
        for i, batch in enumerate(batches, start=1):
            begun = self._begin(batch, i)
            outputs += [begun.outputs] if len(outputs) < BATCHES_TO_DOUBT else []
            begun.outputs = metric.reference(begun.outputs)
            self._begun.append(begun)
        self.doubts = doubts(outputs, metric)

    @torch.no_grad()
    def _begin(self, batch: Batch, number: int) -> Begun:
        moved = batch.to(self._device)
        try:
            return self._replay.begin(moved.args, moved.kwargs, len(self._batches))
        except GuardError as error:
            raise SearchError(
                f"batch {number} is a call of another kind than the first: {error.message}",
                hint="pass batches of one image size, and leave out a smaller last one if the model treats it "
                "differently",
            ) from error

    def evaluate(self, plan: Plan, most_macs: float = math.inf) -> tuple[int, Quality] | None:
        """Multiply-adds of one image with a plan, and how much of the model it preserves.

        Returns:
            ``None``, without running it, if it has more than ``most_macs``.

        Raises:
            PlanError, UnsupportedModelError: as :func:`skipvit_fx.rewrite` does.
            NotComparableError: its outputs cannot be compared with the model's.
            SearchError: the metric returns no number.
        """
        first = plan.stages[0].layer if plan.stages else self.shared.depth
        values = []
        with self.shared.rewritten(plan) as context, torch.no_grad(), self._seeded():
            macs = self.costs.macs(context)
            if macs > most_macs:
                return None
            for batch, begun in zip(self._batches, self._begun, strict=True):
                outputs = self._replay.run(begun, first)
                found = self.metric.values(outputs, begun.outputs, batch.given, batch.images)
                values.append((found, batch.images))
        return macs, quality_of(values)

    @contextlib.contextmanager
    def _seeded(self) -> Iterator[None]:
        """A context in which a score that draws draws the same for every plan, and leaves no trace."""
        kind = self._device.type
        devices = [] if kind == "cpu" else [self._device]
        # seeding an accelerator that is not there queues a call each time, and is slow
        seed = torch.manual_seed if devices else torch.default_generator.manual_seed
        with torch.random.fork_rng(devices, device_type=kind if devices else "cuda"):
            seed(0)
            yield
