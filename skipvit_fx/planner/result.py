"""What a search found."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from skipvit_fx.errors import SearchError
from skipvit_fx.plan import Plan
from skipvit_fx.planner.profile import Profile
from skipvit_fx.reports.html import paragraphs, table
from skipvit_fx.reports.table import columns

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEANS = (
    "Quality is measured against the model's own answers, on the images that were passed: with random weights it means "
    "nothing."
)


@dataclass(frozen=True)
class Candidate:
    """A plan that was evaluated.

    Attributes:
        plan: the plan; one without spans is the model itself, without the rows that nothing reads.
        macs: multiply-adds of one image: those of ``inspect(rewrite(model, plan))``.
        quality: on the images searched with.
        spread: its standard error; ``None`` for a single number.
        held_out: on the images held out; ``None`` with ``holdout=0``, or off the front.
        held_out_spread: its standard error.
        milliseconds: measured for one call with the first batch, median; ``None`` if it was not.
        method: the method that it was published as; empty for the others.
    """

    plan: Plan
    macs: int
    quality: float
    spread: float | None
    held_out: float | None = None
    held_out_spread: float | None = None
    milliseconds: float | None = None
    method: str = ""

    @property
    def name(self) -> str:
        """The plan in its notation, or in words if it drops nothing."""
        return str(self.plan) or "(every token)"

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values, with the plan in its notation."""
        return {**asdict(self), "plan": str(self.plan)}


def front_of(candidates: Iterable[Candidate]) -> tuple[Candidate, ...]:
    """Those that no other one beats in multiply-adds and quality, by multiply-adds; of equal ones the shortest plan."""
    found: list[Candidate] = []
    for one in sorted(
        candidates, key=lambda c: (c.macs, -c.quality, len(str(c.plan)), str(c.plan))
    ):
        if not found or one.quality > found[-1].quality:
            found.append(one)
    return tuple(found)


@dataclass(frozen=True)
class SearchResult:
    """The result of :func:`skipvit_fx.search`. Its text is a table of the front.

    Attributes:
        front: the plans that no other one beats in multiply-adds and quality, sorted by multiply-adds; under a budget
            only those within it.
        candidates: every plan that was evaluated, sorted by multiply-adds.
        profile: what one stage at each layer does.
        baseline_macs: multiply-adds of one image by the unmodified model.
        baseline_milliseconds: as ``milliseconds`` of a candidate.
        model: the model's class.
        fingerprint: of its structure, as in a saved file.
        metric: what quality is.
        images, held_out_images: how many images were searched with, and held out.
        batch: the number of images in the first batch.
        device: where it ran.
        budget: as it was passed.
        options: other arguments of the rewrites.
        seed: of the search.
        study: the name of the study in its storage.
        interrupted: whether it was stopped before its end.
        doubts: why the model's answers are no measure; empty if nothing speaks against them.
        refused: why a layer was no candidate, by layer.
        left_out: why a published plan was not evaluated, by plan.
    """

    front: tuple[Candidate, ...]
    candidates: tuple[Candidate, ...]
    profile: Profile
    baseline_macs: int
    baseline_milliseconds: float | None
    model: str
    fingerprint: str
    metric: str
    images: int
    held_out_images: int
    batch: int
    device: str
    budget: float | str | None
    options: dict[str, Any]
    seed: int
    study: str
    interrupted: bool = False
    doubts: str = ""
    refused: dict[int, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def best(
        self,
        *,
        macs: float | None = None,
        quality: float | None = None,
        milliseconds: float | None = None,
    ) -> Candidate:
        """The plan of the front with the highest quality within limits, or the cheapest with enough quality.

        Args:
            macs: at most this share of the model's multiply-adds, such as 0.75.
            milliseconds: at most this time for a call with the first batch.
            quality: at least this quality; then the cheapest such plan is returned. Without any limit: the best
                within the budget that was searched for.

        Raises:
            SearchError: the front has no such plan, or there is nothing to choose by.
        """
        limits = (macs, quality, milliseconds)
        if all(limit is None for limit in limits) and self.budget is None:
            raise SearchError(
                "there is nothing to choose a plan by",
                hint="pass macs=0.75, quality=0.98 or milliseconds=20",
            )
        if milliseconds is not None and self.baseline_milliseconds is None:
            raise SearchError("no time was measured", hint="search with measure=True")
        fitting = [
            one
            for one in self.front
            if (macs is None or one.macs <= macs * self.baseline_macs)
            and (quality is None or one.quality >= quality)
            and (milliseconds is None or (one.milliseconds or 0.0) <= milliseconds)
        ]
        if not fitting:
            raise SearchError(
                f"no plan of the front has {self._limits(macs, quality, milliseconds)}",
                hint=f"it has {self._reach()}; search with more trials, more stages or a budget",
            )
        return fitting[0] if quality is not None else max(fitting, key=lambda one: one.quality)

    def _limits(self, macs: float | None, quality: float | None, ms: float | None) -> str:
        limits = {
            "at most {:.1%} of the multiply-adds": macs,
            "at least a quality of {:.4g}": quality,
            "at most {:.4g} ms": ms,
        }
        return " and ".join(text.format(v) for text, v in limits.items() if v is not None) or (
            "what the budget allows"
        )

    def _reach(self) -> str:
        if not self.front:
            return "no plans"
        first, last = self.front[0], self.front[-1]
        return (
            f"{first.macs / self.baseline_macs:.1%} to {last.macs / self.baseline_macs:.1%} of the multiply-adds, "
            f"with a quality of {first.quality:.4g} to {last.quality:.4g}"
        )

    def summary(self, plan: Plan | str) -> dict[str, Any]:
        """How a plan was found, as plain values: what ``save(fast, path, search=result)`` keeps.

        Raises:
            SearchError: it was not evaluated.
        """
        wanted = str(Plan.parse(plan) if isinstance(plan, str) else plan)
        for one in self.candidates:
            if str(one.plan) == wanted:
                about = {name: getattr(self, name) for name in _SUMMARY}
                return {**one.to_dict(), **about, "evaluated": len(self.candidates)}
        raise SearchError(
            f"the plan {wanted!r} is not one of the {len(self.candidates)} that were evaluated",
            hint="pass a plan of result.front or result.candidates",
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            **{name: getattr(self, name) for name in _SUMMARY},
            "interrupted": self.interrupted,
            "doubts": self.doubts,
            "refused": {str(layer): why for layer, why in self.refused.items()},
            "left_out": self.left_out,
            "front": [one.to_dict() for one in self.front],
            "candidates": [one.to_dict() for one in self.candidates],
            "profile": self.profile.to_dict(),
        }

    def plot(self) -> Figure:
        """Quality over multiply-adds, and over measured time: all plans, the front, and published ones by name.

        Raises:
            SearchError: matplotlib is not installed.
        """
        from skipvit_fx.planner.drawing import draw_front

        return draw_front(self)

    def __str__(self) -> str:
        return "\n".join([*self._head(), "", *self._table(), "", *self._notes()])

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        head, *rows = self._rows()
        left = {0, len(head) - 1}
        return f"{paragraphs(*self._head())}{table(head, rows, left)}{paragraphs(*self._notes())}"

    def _head(self) -> Iterator[str]:
        held = f", {self.held_out_images} held out" if self.held_out_images else ", none held out"
        yield (
            f"Plans for {self.model} ({self.baseline_macs / 1e9:.3f} GMACs, fingerprint {self.fingerprint[:12]}): "
            f"{len(self.front)} on the front of {len(self.candidates)} evaluated"
        )
        yield f"Quality: {self.metric} on {self.images} images{held}; ± is one standard error"
        if self.interrupted:
            yield "Interrupted: this is the front so far"

    def _table(self) -> Iterator[str]:
        rows = self._rows()
        yield from columns(rows, to_the_left={0, len(rows[0]) - 1})

    def _rows(self) -> list[list[str]]:
        """The head of the table, and a line for every plan of the front."""
        held, timed = self.held_out_images, self.baseline_milliseconds
        rows = [["plan", "GMACs", "of model", "quality", ""]]
        rows[0] += ["held out", ""] if held else []
        rows[0] += ["ms", "speed"] if timed else []
        rows[0].append("")
        for one in self.front:
            row = [
                one.name,
                f"{one.macs / 1e9:.3f}",
                f"{one.macs / self.baseline_macs:.1%}",
                f"{one.quality:.4f}",
                _plus_minus(one.spread),
            ]
            if held:
                row += [f"{one.held_out:.4f}", _plus_minus(one.held_out_spread)]
            if timed:
                row += [f"{one.milliseconds:.2f}", f"{timed / (one.milliseconds or timed):.3f}"]
            rows.append([*row, one.method])
        return rows

    def _notes(self) -> Iterator[str]:
        if self.baseline_milliseconds:
            yield (
                f"ms: one call with {self.batch} images on {self.device}, median; the model itself "
                f"{self.baseline_milliseconds:.2f}"
            )
        if self.held_out_images:
            yield "The plans were chosen by quality; the share held out had no part in it."
        for layer, why in self.refused.items():
            yield f"No stage at layer {layer}: {why}"
        for plan, why in self.left_out.items():
            yield f"Left out: {plan}: {why}"
        yield MEANS
        if self.doubts:
            yield f"Here {self.doubts}."


def _plus_minus(spread: float | None) -> str:
    return "" if spread is None else f"±{spread:.4f}"


_SUMMARY = (
    "model",
    "fingerprint",
    "metric",
    "images",
    "held_out_images",
    "batch",
    "device",
    "budget",
    "options",
    "seed",
    "study",
    "baseline_macs",
    "baseline_milliseconds",
)
