"""How long the layers of a rewritten model take: predicted from what they compute and move, and measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from skipvit_fx.cost.latency_table import latency_table
from skipvit_fx.cost.macs import batch_size, count_macs, placeholder_values, skip_as_planned
from skipvit_fx.errors import SkipViTError
from skipvit_fx.inspect.inspection import by_region, regions_of
from skipvit_fx.ir.cloning import clone_structure
from skipvit_fx.pipeline.record import record_of

WARM_UP = 2
"""Rounds before those that count."""


@dataclass(frozen=True)
class LatencyModel:
    """Time from work, by two constants of one machine.

    The roofline model (Williams, Waterman, Patterson 2009) with every operator on the side where it belongs in a
    transformer: matrix products are bound by arithmetic, all others by memory. What an operator costs just for being
    called is not in it, so small batches on fast devices take longer than it says.

    Attributes:
        seconds_per_mac: of matrix products, convolutions and attention products.
        seconds_per_byte: read or written by the other operators.
    """

    seconds_per_mac: float
    seconds_per_byte: float

    def seconds(self, macs: float, bytes_: float) -> float:
        """Predicted time of so many multiply-adds and bytes."""
        return macs * self.seconds_per_mac + bytes_ * self.seconds_per_byte

    @classmethod
    def fitted(
        cls, macs: Sequence[float], bytes_: Sequence[float], seconds: Sequence[float]
    ) -> LatencyModel:
        """The constants that come closest to measured times, by least squares; neither is negative."""
        work = torch.tensor([macs, bytes_], dtype=torch.float64).T
        time = torch.tensor(seconds, dtype=torch.float64)
        scale = work.amax(0).clamp(min=1)
        work = work / scale
        found = torch.linalg.lstsq(work, time[:, None]).solution[:, 0]
        if bool((found < 0).any()):  # then the best fit has one of them at zero
            alone = (work.T @ time) / work.square().sum(0).clamp(min=1e-300)
            found = min(torch.diag(alone), key=lambda c: float((work @ c - time).square().sum()))
        per_mac, per_byte = (found / scale).tolist()
        return cls(per_mac, per_byte)


@dataclass(frozen=True)
class LayerLatency:
    """One layer, or what runs before them (``embedding``) or behind them (``head``).

    Attributes:
        name: number of the layer, from 1, or one of these two words.
        macs, baseline_macs: multiply-adds per image, as rewritten and with skipping off.
        bytes, baseline_bytes: moved per image by operators that multiply no matrices.
        predicted, baseline_predicted, measured, baseline_measured: seconds per batch.
    """

    name: str
    macs: int
    baseline_macs: int
    bytes: int
    baseline_bytes: int
    predicted: float
    baseline_predicted: float
    measured: float
    baseline_measured: float


@dataclass(frozen=True)
class LatencyReport:
    """A rewritten model beside the original, in time. ``str()`` is a table of its layers.

    Attributes:
        model, plan: class name and plan.
        device, batch: what ran where.
        law: the constants, fitted on the nodes of the unmodified model in this very run.
        layers: embedding, layers, head. Their times are taken node by node, which costs a little itself.
        seconds, baseline_seconds: whole calls of the rewritten and of the original model, a pair a round.
    """

    model: str
    plan: str
    device: str
    batch: int
    law: LatencyModel
    layers: tuple[LayerLatency, ...]
    seconds: tuple[float, ...]
    baseline_seconds: tuple[float, ...]

    @property
    def speedups(self) -> tuple[float, ...]:
        """Original over rewritten, round by round."""
        return tuple(a / b for a, b in zip(self.baseline_seconds, self.seconds, strict=True))

    @property
    def speedup(self) -> float:
        """The median of ``speedups``."""
        return median(self.speedups)

    @property
    def predicted_speedup(self) -> float:
        """What the two constants say."""
        before = sum(layer.baseline_predicted for layer in self.layers)
        return before / sum(layer.predicted for layer in self.layers)

    @property
    def mac_limit(self) -> float:
        """What multiply-adds alone would allow."""
        before = sum(layer.baseline_macs for layer in self.layers)
        return before / sum(layer.macs for layer in self.layers)

    @property
    def errors(self) -> tuple[float, ...]:
        """Of every layer as rewritten, how far the prediction is off, relative to what was measured."""
        layers = self.layers[1:-1]
        return tuple(abs(layer.predicted - layer.measured) / layer.measured for layer in layers)

    def __str__(self) -> str:
        return latency_table(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``json.dumps``; times in seconds per batch."""
        plain = asdict(self)
        plain["layers"] = list(plain["layers"])
        for name in ("seconds", "baseline_seconds"):
            plain[name] = list(plain[name])
        return plain | {
            "speedup": self.speedup,
            "predicted_speedup": self.predicted_speedup,
            "mac_limit": self.mac_limit,
            "errors": list(self.errors),
        }


@torch.no_grad()
def measure_latency(
    model: nn.Module,
    fast: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    rounds: int = 10,
) -> LatencyReport:
    """Time a rewritten model and its original in turns, layer by layer and as a whole, in eval mode.

    Args:
        model: the original.
        fast: what :func:`skipvit_fx.rewrite` made of it; timed with skipping on as its plan says, whatever it is now.
            Neither it nor the model changes.
        args, kwargs: what both are called with, on their device.
        rounds: of every measurement; the table shows medians.

    Raises:
        NotRewrittenError: ``fast`` does not come from :func:`skipvit_fx.rewrite`.
        SkipViTError: there are no rounds or no images.
        TraceError: the model's work cannot be counted on these inputs.
    """
    record = record_of(fast)
    kwargs = dict(kwargs or {})
    batch = batch_size(args, kwargs)
    if rounds < 1 or not batch:
        raise SkipViTError(
            f"{rounds} rounds of {batch or 0} images cannot be timed",
            hint="at least one round, and a batch of images as the input",
        )
    device = next(t.device for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor))
    wait = _waiting_for(device)
    original = clone_structure(model).eval()
    timers = []
    for skipping in (False, True):
        copy = clone_structure(fast).eval()
        skip_as_planned(copy, skipping)
        assert isinstance(copy, fx.GraphModule)
        timers.append(_NodeTimer(copy, wait))
    whole: list[list[float]] = [[], []]
    for _ in range(WARM_UP + rounds):
        for times, module in zip(whole, (original, timers[1].module), strict=True):
            start = perf_counter()
            module(*args, **kwargs)
            wait()
            times.append(perf_counter() - start)
        for timer in timers:
            timer.run(*placeholder_values(fast.graph, args, kwargs))  # type: ignore[arg-type]

    counts = [count_macs(fast, args, kwargs, skipping=skipping) for skipping in (False, True)]
    seconds = [timer.medians() for timer in timers]
    nodes = list(seconds[0])
    law = LatencyModel.fitted(
        [batch * counts[0].nodes[name] for name in nodes],
        [batch * counts[0].bytes[name] for name in nodes],
        [seconds[0][name] for name in nodes],
    )
    regions, depth = regions_of(fast.graph, record.layers), len(record.layers)  # type: ignore[arg-type]
    columns = []
    for count, measured in zip(counts, seconds, strict=True):
        macs, bytes_ = (by_region(part, regions, depth) for part in (count.nodes, count.bytes))
        predicted = [law.seconds(batch * m, batch * b) for m, b in zip(macs, bytes_, strict=True)]
        columns.append((macs, bytes_, predicted, by_region(measured, regions, depth)))
    names = ["embedding", *map(str, range(1, depth + 1)), "head"]
    before, after = (list(zip(*column, strict=True)) for column in columns)
    layers = tuple(
        LayerLatency(name, m, m0, b, b0, p, p0, t, t0)
        for name, (m0, b0, p0, t0), (m, b, p, t) in zip(names, before, after, strict=True)
    )
    baseline, rewritten = (tuple(times[WARM_UP:]) for times in whole)
    return LatencyReport(
        record.model, str(record.plan), str(device), batch, law, layers, rewritten, baseline
    )


def _waiting_for(device: torch.device) -> Callable[[], None]:
    """What returns when everything that was started on a device is done."""
    if device.type == "cpu":
        return lambda: None
    synchronize: Callable[[], None] = torch.get_device_module(device).synchronize
    return synchronize


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
        """Of each node, without the warm-up."""
        return {name: median(times[WARM_UP:]) for name, times in self.seconds.items()}
