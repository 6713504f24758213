"""Where everything lies in the picture of a front, in percent of its width and height."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from skipvit_fx.errors import ReportError
from skipvit_fx.optional import need
from skipvit_fx.planner.result import Candidate, SearchResult

STEPS = (1, 2, 2.5, 5, 10)
"""Distances between ticks, times a power of ten."""

Placed = tuple[Candidate, float]
"""A plan and its cost."""


@dataclass(frozen=True)
class Tick:
    """A line across the picture, and what is written at its end."""

    place: float
    text: str


@dataclass(frozen=True)
class Mark:
    """A plan in the picture.

    Attributes:
        x, y: its place, from the left and from the top.
        method: the method that it was published as; empty for the others.
        plan: in its notation.
    """

    x: float
    y: float
    method: str
    plan: str


@dataclass(frozen=True)
class Plot:
    """Quality over one kind of cost.

    Attributes:
        kind: ``macs`` or ``time``.
        label: what the cost is.
        xs, ys: ticks of both axes.
        points: the plans of the front.
        model: where the cost of the model itself is, from the left; ``None`` if it is all of the cost.
        published: plans that were published and are not on it.
        line, spread, held, held_spread, others: SVG paths: through the front, over multiply-adds; its standard errors;
            its quality on images held out, and their standard errors; and a dot for every other plan.
        outside: how many other plans lie outside the picture.
    """

    kind: str
    label: str
    xs: tuple[Tick, ...]
    ys: tuple[Tick, ...]
    points: tuple[Mark, ...]
    model: float | None
    published: tuple[Mark, ...]
    line: str
    spread: str
    held: str
    held_spread: str
    others: str
    outside: int


def plots_of(result: SearchResult) -> list[Plot]:
    """Over multiply-adds, and over time if it was measured."""
    whole, before = result.baseline_macs, result.baseline_milliseconds
    on_it = {str(one.plan) for one in result.front}
    rest = [one for one in result.candidates if str(one.plan) not in on_it]
    front = [(one, one.macs / whole) for one in result.front]
    share = "multiply-adds, as a share of the model's"
    plots = [_plot("macs", share, front, [(one, one.macs / whole) for one in rest], _percent)]
    if before is not None:
        images = f"{result.batch} image{'s' if result.batch > 1 else ''}"
        time = f"milliseconds for {images} on {result.device}"
        timed = [(one, one.milliseconds or 0.0) for one in result.front]
        plots.append(_plot("time", time, timed, [], _number, before))
    return plots


class _Scale:
    """From a value to its place in percent."""

    def __init__(self, values: Iterable[float], text: Callable[[float], str]) -> None:
        known = list(values)
        low, high = min(known), max(known)
        margin = 0.06 * (high - low) or 0.05 * (abs(high) or 1)
        self.low, self.high = low - margin, high + margin
        ticker = need("matplotlib.ticker", "report", ReportError)
        found = ticker.MaxNLocator(nbins=5, steps=STEPS).tick_values(self.low, self.high).tolist()
        inside = [value for value in found if self.low <= value <= self.high]
        self.ticks = tuple(Tick(self(value), text(value)) for value in inside)

    def __call__(self, value: float) -> float:
        return round(100 * (value - self.low) / (self.high - self.low), 2)


def _plot(
    kind: str,
    label: str,
    front: list[Placed],
    rest: list[Placed],
    text: Callable[[float], str],
    model: float | None = None,
) -> Plot:
    """The plans of the front and all others, each with its cost, and the cost of the model itself, if it is shown."""
    named = [(one, cost) for one, cost in rest if one.method]
    across = _Scale(
        [*(cost for _, cost in front + named), *([] if model is None else [model])], text
    )
    up = _Scale([*(one.quality for one, _ in named), *_heights(front)], _number)

    def down(value: float) -> float:
        return round(100 - up(value), 2)

    def mark(one: Candidate, cost: float) -> Mark:
        return Mark(across(cost), down(one.quality), one.method, str(one.plan))

    def bar(cost: float, value: float | None, spread: float | None) -> str:
        if value is None or spread is None:
            return ""
        return f"M{across(cost)} {down(value - spread)}V{down(value + spread)}"

    held = [(one, cost, one.held_out) for one, cost in front if one.held_out is not None]
    points = tuple(mark(*one) for one in front)
    others = [mark(one, cost) for one, cost in rest if not one.method]
    inside = [one for one in others if 0 <= one.x <= 100 and 0 <= one.y <= 100]
    return Plot(
        kind=kind,
        label=label,
        xs=across.ticks,
        ys=tuple(Tick(round(100 - tick.place, 2), tick.text) for tick in up.ticks),
        points=points,
        model=None if model is None else across(model),
        published=tuple(mark(*one) for one in named),
        line="M" + "L".join(f"{one.x} {one.y}" for one in points) if kind == "macs" else "",
        spread="".join(bar(cost, one.quality, one.spread) for one, cost in front),
        held="".join(f"M{across(cost)} {down(value)}h0" for _, cost, value in held),
        held_spread="".join(bar(cost, value, one.held_out_spread) for one, cost, value in held),
        others="".join(f"M{one.x} {one.y}h0" for one in inside),
        outside=len(others) - len(inside),
    )


def _heights(front: list[Placed]) -> Iterator[float]:
    """Every height to which something of the front is drawn."""
    for one, _ in front:
        known = ((one.quality, one.spread), (one.held_out, one.held_out_spread))
        for value, spread in known:
            if value is not None:
                yield from (value - (spread or 0.0), value + (spread or 0.0))


def _percent(value: float) -> str:
    return f"{100 * value:.4g} %"


def _number(value: float) -> str:
    return f"{value:.6g}"
