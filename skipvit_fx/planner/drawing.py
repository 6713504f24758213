"""Pictures of a front and of a profile."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from skipvit_fx.errors import SearchError
from skipvit_fx.optional import need

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from skipvit_fx.planner.profile import Profile
    from skipvit_fx.planner.result import SearchResult

_MARKS = {"SkipViT": "s", "EViT": "^", "ToMe": "D"}


def _figure(width: float) -> Any:
    kind = need("matplotlib.figure", "search", SearchError).Figure
    return kind(figsize=(width, 4.5), dpi=120, layout="constrained")


def draw_front(result: SearchResult) -> Figure:
    """Quality over multiply-adds, and over time if it was measured. A bar is one standard error."""
    timed = result.baseline_milliseconds
    figure = _figure(11 if timed else 7)
    places = figure.subplots(1, 2 if timed else 1, squeeze=False)[0]
    _draw_macs(places[0], result)
    if timed:
        axes = places[1]
        xs = [one.milliseconds for one in result.front]
        _draw_points(axes, xs, result)
        axes.axvline(timed, color="grey", linewidth=0.8, linestyle=":", label="the model itself")
        axes.set_xlabel(f"ms for {result.batch} images, {result.device}")
        axes.legend(fontsize="small")
    figure.suptitle(f"Plans for {result.model}")
    return figure  # type: ignore[no-any-return]


def _draw_macs(axes: Any, result: SearchResult) -> None:
    share = [one.macs / result.baseline_macs for one in result.candidates]
    axes.scatter(share, [one.quality for one in result.candidates], s=10, color="lightgrey")
    _draw_points(axes, [one.macs / result.baseline_macs for one in result.front], result)
    for method, mark in _MARKS.items():
        theirs = [one for one in result.candidates if one.method == method]
        if theirs:
            axes.scatter(
                [one.macs / result.baseline_macs for one in theirs],
                [one.quality for one in theirs],
                marker=mark,
                label=method,
                zorder=3,
            )
    axes.set_xlabel("multiply-adds, as a share of the model's")
    axes.legend(fontsize="small")


def _draw_points(axes: Any, xs: list[Any], result: SearchResult) -> None:
    ys, bars = [one.quality for one in result.front], [one.spread or 0.0 for one in result.front]
    axes.errorbar(xs, ys, bars, marker=".", capsize=2, label="front")
    if result.held_out_images:
        held = [one.held_out for one in result.front]
        axes.plot(xs, held, marker=".", linestyle="--", label="front, held out")
    axes.set_ylabel(result.metric)
    axes.grid(visible=True, linewidth=0.3)


def draw_profile(profile: Profile) -> Figure:
    """Quality over layers, a line for every amount."""
    figure = _figure(7)
    axes = figure.subplots()
    for percent in profile.percents:
        ours = [one for one in profile.entries if one.percent == percent]
        layers = [one.layer for one in ours]
        bars = [one.spread or 0.0 for one in ours]
        axes.errorbar(
            layers, [one.quality for one in ours], bars, marker=".", capsize=2, label=f"{percent} %"
        )
    axes.set_xticks(profile.layers)
    axes.set_xlabel("layer of the only stage")
    axes.set_ylabel(profile.metric)
    axes.grid(visible=True, linewidth=0.3)
    axes.legend(title="patches that leave", fontsize="small")
    return figure  # type: ignore[no-any-return]
