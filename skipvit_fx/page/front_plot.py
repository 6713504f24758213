"""Where everything lies in the picture of a front, in percent of its width and height."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from skipvit_fx.errors import ReportError
from skipvit_fx.optional import need
from skipvit_fx.planner.result import Candidate, SearchResult

STEPS = (1, 2, 2.5, 5, 10)
"""Distances between ticks, times a power of ten."""


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
        published: plans that were published and are not on it.
        line, spread, held, held_spread, others: SVG paths: through the front; its standard errors; its quality on
            images held out, and their standard errors; and a dot for every other plan.
        outside: how many other plans lie outside the picture.
    """

    kind: str
    label: str
    xs: tuple[Tick, ...]
    ys: tuple[Tick, ...]
    points: tuple[Mark, ...]
    published: tuple[Mark, ...]
    line: str
    spread: str
    held: str
    held_spread: str
    others: str
    outside: int


def plots_of(result: SearchResult) -> list[Plot]:
    """Over multiply-adds, and over time if it was measured."""
    share = "multiply-adds, as a share of the model's"
    plots = [_plot(result, "macs", share, lambda one: one.macs / result.baseline_macs, _percent)]
    if result.baseline_milliseconds is not None:
        images = f"{result.batch} image{'s' if result.batch > 1 else ''}"
        what = f"milliseconds for {images} on {result.device}; the model itself: {result.baseline_milliseconds:.3g}"
        plots.append(_plot(result, "time", what, lambda one: one.milliseconds, _number))
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
    result: SearchResult,
    kind: str,
    label: str,
    cost_of: Callable[[Candidate], float | None],
    text: Callable[[float], str],
) -> Plot:
    front = [(one, cost) for one in result.front if (cost := cost_of(one)) is not None]
    on_it = {str(one.plan) for one in result.front}
    known = [(one, cost) for one in result.candidates if (cost := cost_of(one)) is not None]
    rest = [(one, cost) for one, cost in known if str(one.plan) not in on_it]
    named = [(one, cost) for one, cost in rest if one.method]
    across = _Scale([cost for _, cost in front + named], text)
    quality = [one.quality for one, _ in front + named]
    ends = [end for one, _ in front for end in _ends(one.quality, one.spread)]
    held = [(one, x) for one, x in front if one.held_out is not None]
    held_ends = [end for one, _ in held for end in _ends(one.held_out, one.held_out_spread)]
    up = _Scale(quality + ends + held_ends, _number)

    def mark(one: Candidate, cost: float) -> Mark:
        return Mark(across(cost), round(100 - up(one.quality), 2), one.method, str(one.plan))

    def bar(cost: float, ends: list[float]) -> str:
        low, high = (round(100 - up(end), 2) for end in ends) if ends else (0, 0)
        return f"M{across(cost)} {low}V{high}" if ends else ""

    points = tuple(mark(*one) for one in front)
    others = [mark(*one) for one in rest if not one[0].method]
    inside = [one for one in others if 0 <= one.x <= 100 and 0 <= one.y <= 100]
    return Plot(
        kind=kind,
        label=label,
        xs=across.ticks,
        ys=tuple(Tick(round(100 - tick.place, 2), tick.text) for tick in up.ticks),
        points=points,
        published=tuple(mark(*one) for one in named),
        line="M" + "L".join(f"{one.x} {one.y}" for one in sorted(points, key=lambda one: one.x)),
        spread="".join(bar(cost, _ends(one.quality, one.spread)) for one, cost in front),
        held="".join(
            f"M{across(cost)} {round(100 - up(one.held_out or 0.0), 2)}h0" for one, cost in held
        ),
        held_spread="".join(
            bar(cost, _ends(one.held_out, one.held_out_spread)) for one, cost in held
        ),
        others="".join(f"M{one.x} {one.y}h0" for one in inside),
        outside=len(others) - len(inside),
    )


def _ends(value: float | None, spread: float | None) -> list[float]:
    """The ends of the bar of a standard error; none if it is not known."""
    return [] if value is None or spread is None else [value - spread, value + spread]


def _percent(value: float) -> str:
    return f"{100 * value:.4g} %"


def _number(value: float) -> str:
    return f"{value:.6g}"
