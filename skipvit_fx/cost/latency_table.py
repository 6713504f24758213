"""The table of predicted and measured times, in plain text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median
from typing import TYPE_CHECKING

from skipvit_fx.inspect.table import columns

if TYPE_CHECKING:
    from skipvit_fx.cost.latency import LatencyReport

_HEAD = (
    ("", "GMACs", "", "ms, original", "", "ms, rewritten", ""),
    ("layer", "before", "after", "predicted", "measured", "predicted", "measured"),
)


def latency_table(report: LatencyReport) -> str:
    """One line a layer, the totals, and the speed-up as measured, as predicted, and by multiply-adds."""
    parts = [
        f"{report.model} with plan {report.plan} on {report.device}, batch {report.batch}; "
        f"medians of {len(report.seconds)} rounds in turns; GMACs per image, ms per batch",
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
        f"predictions for the layers as rewritten are off by {median(report.errors):.0%} in the median, "
        f"{max(report.errors):.0%} at most"
    )


def _rate(seconds: float, unit: str) -> str:
    return f"{1e-9 / seconds:.1f} {unit}" if seconds else f"too many {unit} to tell"
