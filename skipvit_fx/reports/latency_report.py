"""Predicted and measured times, layer by layer, as a table and as plain values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from skipvit_fx.reports.latency_model import LatencyModel
from skipvit_fx.reports.table import columns


@dataclass(frozen=True)
class LayerLatency:
    """One layer, or what runs before the layers (``embedding``) or after them (``head``).

    Attributes:
        name: number of the layer, from 1, or one of these two words.
        macs, baseline_macs: multiply-adds per image, as rewritten and with skipping off.
        bytes, baseline_bytes: bytes moved per image by operators other than matrix products.
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


@dataclass(frozen=True, repr=False)
class LatencyReport:
    """The times of a rewritten model and the original. ``str()`` is a table of the layers.

    Attributes:
        model, plan: class name and plan.
        device, batch: the device, and the batch size.
        law: the constants, fitted to the nodes of the unmodified model in the same run.
        layers: embedding, layers, head. Their times are taken node by node, which itself costs a little.
        seconds, baseline_seconds: whole calls of the rewritten and of the original model, one pair per round.
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
        """The speed-up predicted by the two constants."""
        before = sum(layer.baseline_predicted for layer in self.layers)
        return before / sum(layer.predicted for layer in self.layers)

    @property
    def mac_limit(self) -> float:
        """The speed-up that multiply-adds alone would allow."""
        before = sum(layer.baseline_macs for layer in self.layers)
        return before / sum(layer.macs for layer in self.layers)

    @property
    def errors(self) -> tuple[float, ...]:
        """For every rewritten layer, the error of the prediction relative to the measured time."""
        layers = self.layers[1:-1]
        return tuple(abs(layer.predicted - layer.measured) / layer.measured for layer in layers)

    def __str__(self) -> str:
        return _latency_table(self)

    __repr__ = __str__

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


# -- table ------------------------------------------------------------------------------------------------------------

_HEAD = (
    ("", "GMACs", "", "ms, original", "", "ms, rewritten", ""),
    ("layer", "before", "after", "predicted", "measured", "predicted", "measured"),
)


def _latency_table(report: LatencyReport) -> str:
    """One line per layer, the totals, and the speed-up as measured, as predicted, and by multiply-adds."""
    parts = [
        f"{report.model} with plan {report.plan} on {report.device}, batch {report.batch}; "
        f"medians of {len(report.seconds)} alternating rounds; GMACs per image, ms per batch",
        "\n".join(columns(_rows(report), to_the_left=(0,))),
        "\n".join(_summary(report)),
    ]
    return "\n\n".join(parts)


def _rows(report: LatencyReport) -> Iterator[Sequence[str]]:
    yield from _HEAD
    lines = [
        (
            (layer.baseline_macs / 1e9, layer.macs / 1e9),
            (layer.baseline_predicted, layer.baseline_measured, layer.predicted, layer.measured),
        )
        for layer in report.layers
    ]
    for layer, (macs, seconds) in zip(report.layers, lines, strict=True):
        yield _row(layer.name, macs, seconds)
    totals = [
        [sum(values) for values in zip(*part, strict=True)] for part in zip(*lines, strict=True)
    ]
    yield _row("total", *totals)


def _row(name: str, macs: Sequence[float], seconds: Sequence[float]) -> Sequence[str]:
    return (name, *(f"{m:.4f}" for m in macs), *(f"{1e3 * s:.2f}" for s in seconds))


def _summary(report: LatencyReport) -> Iterator[str]:
    low, high = min(report.speedups), max(report.speedups)
    yield (
        f"speed-up of whole calls {report.speedup:.3f} measured ({low:.3f} to {high:.3f}), "
        f"{report.predicted_speedup:.3f} predicted, {report.mac_limit:.3f} by multiply-adds alone"
    )
    yield f"{report.speedup / report.mac_limit:.3f} of what the multiply-adds allow"
    law = report.law
    yield (
        "predicted from two constants, fitted on the original in this run: "
        f"{_rate(law.seconds_per_mac, 'GMAC/s')} in matrix products, {_rate(law.seconds_per_byte, 'GB/s')} elsewhere"
    )
    yield (
        f"predictions for the rewritten layers are off by {median(report.errors):.0%} in the median, "
        f"{max(report.errors):.0%} at most"
    )


def _rate(seconds: float, unit: str) -> str:
    return f"{1e-9 / seconds:.1f} {unit}" if seconds else f"too many {unit} to tell"
