"""How long the layers of a rewritten model take: predicted from what they compute and move, and measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import fx, nn

from skipvit_fx.arguments import check_model
from skipvit_fx.capture.cloning import clone_structure
from skipvit_fx.capture.example import arguments_of, batch_size
from skipvit_fx.errors import SkipViTError
from skipvit_fx.graph.module import SkipViTModule
from skipvit_fx.graph.record import record_of
from skipvit_fx.reports.latency_model import LatencyModel
from skipvit_fx.reports.latency_report import LatencyReport, LayerLatency
from skipvit_fx.reports.layers import by_region, regions_of
from skipvit_fx.reports.macs import MacCount, count_macs, skip_as_planned
from skipvit_fx.torch_internals import tensor_leaves

WARM_UP = 2
"""Rounds that are not counted, before the others."""


@torch.no_grad()
def measure_latency(
    model: nn.Module,
    fast: nn.Module,
    example_inputs: Any,
    *,
    rounds: int = 10,
    progress: Callable[[int, int], None] | None = None,
) -> LatencyReport:
    """Time a rewritten model and its original alternately, layer by layer and as a whole, in eval mode.

    Args:
        model: the original.
        fast: its rewrite by :func:`skipvit_fx.rewrite`, timed with skipping on as its plan says, whatever its switch is
            now. Neither it nor the model changes.
        example_inputs: the inputs for both, on their device: a tensor, a tuple or a dict, as for
            :func:`skipvit_fx.rewrite`.
        rounds: the number of rounds; the table shows medians.
        progress: called after each round, warm-up included, with the number done and their total.

    Raises:
        NotRewrittenError: ``fast`` does not come from :func:`skipvit_fx.rewrite`.
        TypeError: ``model`` is not a module, or it cannot be called with ``example_inputs``.
        SkipViTError: there are no rounds or no images.
        TraceError: the model's work cannot be counted on these inputs.
    """
    record = record_of(fast)
    assert isinstance(fast, SkipViTModule)
    check_model(model)
    args, kwargs = arguments_of(example_inputs)
    batch = batch_size(args, kwargs)
    if not isinstance(rounds, int) or rounds < 1 or not batch:
        raise SkipViTError(
            f"{rounds!r} rounds of {batch or 0} images cannot be timed",
            hint="pass at least one round, and a batch of images as the input",
        )
    device = tensor_leaves((args, kwargs))[0].device
    wait = waiting_for(device)
    timers = [_NodeTimer(copy_to_run(fast, skipping), wait) for skipping in (False, True)]
    whole = [ModuleTimer(m, wait) for m in (clone_structure(model).eval(), timers[1].module)]
    for done in range(1, WARM_UP + rounds + 1):
        for timed in whole:
            timed.run(*args, **kwargs)
        for timer in timers:
            timer.run(*fast.own.inputs_of(fast.own.calls[0], args, kwargs))
        if progress is not None:
            progress(done, WARM_UP + rounds)
    counts = [count_macs(fast, args, kwargs, skipping=skipping) for skipping in (False, True)]
    seconds = [timer.medians() for timer in timers]
    law = _fitted(counts[0], seconds[0], batch)
    before, after = (
        _work_by_region(fast, count, times, law, batch)
        for count, times in zip(counts, seconds, strict=True)
    )
    names = ["embedding", *map(str, range(1, len(record.layers) + 1)), "head"]
    layers = tuple(
        LayerLatency(name, m, m0, b, b0, p, p0, t, t0)
        for name, (m, b, p, t), (m0, b0, p0, t0) in zip(names, after, before, strict=True)
    )
    baseline, rewritten = (tuple(timed.seconds[WARM_UP:]) for timed in whole)
    return LatencyReport(
        record.model, str(record.plan), str(device), batch, law, layers, rewritten, baseline
    )


def copy_to_run(fast: SkipViTModule, skipping: bool) -> SkipViTModule:
    """A copy of a rewritten model in eval mode that shares its tensors, with skipping as planned or off."""
    copy = clone_structure(fast).eval()
    skip_as_planned(copy, skipping)
    return copy


def _fitted(count: MacCount, seconds: Mapping[str, float], batch: int) -> LatencyModel:
    """The latency model fitted to the nodes' times and their work."""
    return LatencyModel.fitted(
        [batch * count.nodes[name] for name in seconds],
        [batch * count.bytes[name] for name in seconds],
        [*seconds.values()],
    )


def _work_by_region(
    fast: SkipViTModule,
    count: MacCount,
    seconds: Mapping[str, float],
    law: LatencyModel,
    batch: int,
) -> list[tuple[int, int, float, float]]:
    """Multiply-adds and bytes of one image, and seconds of the batch as predicted and as measured."""
    found = record_of(fast).layers
    depth, regions = len(found), regions_of((node.name for node in fast.graph.nodes), found)
    macs, bytes_ = (by_region(part, regions, depth) for part in (count.nodes, count.bytes))
    measured = by_region(seconds, regions, depth)
    return [
        (m, b, law.seconds(batch * m, batch * b), t)
        for m, b, t in zip(macs, bytes_, measured, strict=True)
    ]


def waiting_for(device: torch.device) -> Callable[[], None]:
    """A function that returns when all work started on a device is done."""
    if device.type == "cpu":
        return lambda: None
    synchronize: Callable[[], None] = torch.get_device_module(device).synchronize
    return synchronize


class ModuleTimer:
    """Notes the seconds of every call of a module."""

    def __init__(self, module: nn.Module, wait: Callable[[], None]) -> None:
        self.module, self.wait = module, wait
        self.seconds: list[float] = []

    def run(self, *args: Any, **kwargs: Any) -> None:
        start = perf_counter()
        self.module(*args, **kwargs)
        self.wait()
        self.seconds.append(perf_counter() - start)


class _NodeTimer(fx.Interpreter):
    """Notes the seconds of every node in every run."""

    def __init__(self, module: fx.GraphModule, wait: Callable[[], None]) -> None:
        super().__init__(module)
        self.wait = wait
        self.seconds: dict[str, list[float]] = {}

    def run_node(self, n: fx.Node) -> Any:
        start = perf_counter()
        value = super().run_node(n)
        self.wait()
        self.seconds.setdefault(n.name, []).append(perf_counter() - start)
        return value

    def medians(self) -> dict[str, float]:
        """The median for each node, without the warm-up."""
        return {name: median(times[WARM_UP:]) for name, times in self.seconds.items()}
