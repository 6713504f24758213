"""The numbers of a search and of its plans, in words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from skipvit_fx.page.runs import Runs
from skipvit_fx.page.summary import (
    Figure,
    agreement_figure,
    change,
    macs_figure,
    short,
    tokens_figure,
    unit_of,
    validation_figure,
)
from skipvit_fx.planner.result import Candidate, SearchResult
from skipvit_fx.reports.inspection_report import Inspection

MEANINGS = {
    "agreement": "for how many of the images the model's own class stays the best",
    "accuracy": "for how many of the images the class of the label is the best",
    "cosine": "between the outputs and those of the model",
}


def validated_by(result: SearchResult) -> bool:
    """Whether the search validated every plan of the front: those that it timed were rewritten as a user's are."""
    return result.baseline_milliseconds is not None and result.options.get("validate", True)


def search_figures(result: SearchResult) -> tuple[Figure, ...]:
    """What was searched."""
    evaluated = len(result.candidates)
    front = f"{len(result.front)} on the front"
    if result.interrupted:
        front += "; it was interrupted, so this is the front so far"
    held = result.held_out_images
    return (
        Figure("Plans evaluated", str(evaluated), front),
        Figure("Quality", result.metric, MEANINGS.get(result.metric, "a function of the user's")),
        Figure(
            "Images",
            f"{result.images} + {held}" if held else str(result.images),
            "searched with, and held out from the choice" if held else "none were held out",
        ),
        _budget(result),
        _itself(result),
    )


def _budget(result: SearchResult) -> Figure:
    match result.budget:
        case None:
            return Figure("Budget", "none", "the whole front was wanted")
        case str(time):
            return Figure("Budget", time, "for a call with the first batch, at most")
        case share:
            return Figure("Budget", f"{share:.4g}", "of the model's multiply-adds, at most")


def _itself(result: SearchResult) -> Figure:
    detail = "multiply-adds for one image"
    if result.baseline_milliseconds is not None:
        detail += f"; {short(result.baseline_milliseconds)} ms for a batch of {result.batch}"
    size, unit = unit_of(result.baseline_macs)
    return Figure("The model itself", f"{result.baseline_macs / size:.4g} {unit}", detail)


def plan_figures(
    result: SearchResult, one: Candidate, inspection: Inspection, runs: Runs
) -> tuple[Figure, ...]:
    """What is known of one plan."""
    return (
        macs_figure(inspection),
        _quality(result, one),
        _time(result, one),
        tokens_figure(inspection),
        replace(agreement_figure(runs), name="On these images"),
        _check(result, inspection),
    )


def _quality(result: SearchResult, one: Candidate) -> Figure:
    spread = with_spread(one.quality, one.spread)
    detail = f"{spread} on {result.images} images"
    if one.held_out is None:
        return Figure("Quality", f"{one.quality:.4f}", f"{detail}; none were held out")
    held = with_spread(one.held_out, one.held_out_spread)
    detail += f"; {held} on the {result.held_out_images} held out"
    return Figure("Quality, held out", f"{one.held_out:.4f}", detail)


def _time(result: SearchResult, one: Candidate) -> Figure:
    before, now = result.baseline_milliseconds, one.milliseconds
    if before is None or now is None:
        return Figure("Time", "not measured", "the search was made with measure=False")
    return Figure("Time", change(now / before - 1), f"{short(before)} → {short(now)} ms")


def _check(result: SearchResult, inspection: Inspection) -> Figure:
    if validated_by(result):
        detail = "against the model with masked tokens, by the search, and not again for this page"
        return Figure("Check", "validated", detail)
    return validation_figure(inspection)


def with_spread(value: float, spread: float | None) -> str:
    """A quality with its standard error, if it is known."""
    return f"{value:.4f}" if spread is None else f"{value:.4f} ± {spread:.4f}"


@dataclass(frozen=True)
class FrontRow:
    """A line of the table of plans.

    Attributes:
        plan: in its notation.
        method: the method that it was published as; empty for the others.
        macs, share: multiply-adds in billions or millions, and as a share of the model's.
        quality, held, milliseconds, speed: as text; empty if not known.
    """

    plan: str
    method: str
    macs: str
    share: str
    quality: str
    held: str
    milliseconds: str
    speed: str

    @property
    def said(self) -> str:
        """All of it, for those who hear it."""
        parts = [
            f"Plan {self.plan}" + (f", {self.method}" if self.method else ""),
            f"{self.share} of the multiply-adds",
            f"quality {self.quality}",
            f"held out {self.held}" if self.held else "",
            f"{self.milliseconds} milliseconds" if self.milliseconds else "",
        ]
        return ", ".join(part for part in parts if part)


def front_rows(result: SearchResult) -> list[FrontRow]:
    """A line for every plan of the front."""
    return list(_rows(result))


def _rows(result: SearchResult) -> Iterator[FrontRow]:
    before, (size, _) = result.baseline_milliseconds, unit_of(result.baseline_macs)
    for one in result.front:
        held, now = one.held_out, one.milliseconds
        timed = before is not None and now is not None
        yield FrontRow(
            plan=one.name,
            method=one.method,
            macs=f"{one.macs / size:.3f}",
            share=f"{100 * one.macs / result.baseline_macs:.1f} %",
            quality=with_spread(one.quality, one.spread),
            held="" if held is None else with_spread(held, one.held_out_spread),
            milliseconds=f"{now:.2f}" if timed else "",
            speed=f"{before / now:.2f}" if timed else "",  # type: ignore[operator]
        )


@dataclass(frozen=True)
class Cell:
    """One stage alone.

    Attributes:
        quality, share: what it preserves, and its multiply-adds as a share of the model's.
        lost: its loss of quality in percent of the largest one in the profile.
    """

    quality: str
    share: str
    lost: float


def sensitivity(result: SearchResult) -> dict[int, list[Cell | None]]:
    """For every layer a cell for every amount of the profile; ``None`` where it was not tried."""
    profile = result.profile
    qualities = [entry.quality for entry in profile.entries]
    own = [one.quality for one in result.candidates if not one.plan.spans]
    best, worst = max(qualities + own, default=0.0), min(qualities, default=0.0)

    def cell(layer: int, percent: int) -> Cell | None:
        entry = profile.find(layer, percent)
        if entry is None:
            return None
        lost = 100 * (best - entry.quality) / (best - worst) if best > worst else 0.0
        share = f"{100 * entry.macs / result.baseline_macs:.1f} %"
        return Cell(f"{entry.quality:.4f}", share, round(lost, 1))

    return {
        layer: [cell(layer, percent) for percent in profile.percents] for layer in profile.layers
    }
