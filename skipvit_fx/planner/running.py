"""The search itself: one plan after another, until there are enough."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from skipvit_fx.errors import PlanError, UnsupportedModelError
from skipvit_fx.plan import Plan
from skipvit_fx.planner.evaluate import Evaluator
from skipvit_fx.planner.profile import Profile, Sensitivity
from skipvit_fx.planner.quality import NotComparableError
from skipvit_fx.planner.result import Candidate, front_of
from skipvit_fx.planner.space import Space, profiled, published
from skipvit_fx.planner.study import Known, Study


@dataclass(frozen=True)
class Progress:
    """How far a search is.

    Attributes:
        evaluated: how many plans were, by all processes of the study.
        trials: how many there will be.
        last: the last one that this process evaluated.
        front: the best so far.
        baseline_macs: multiply-adds of one image by the unmodified model.
    """

    evaluated: int
    trials: int
    last: Candidate
    front: tuple[Candidate, ...]
    baseline_macs: int


class Run:
    """Evaluates plans that are always tried, then those that the study proposes.

    Args:
        most_macs: a proposed plan with more multiply-adds is not evaluated.
        trials: the number of plans to be known in the end.
        progress: called after every evaluation.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        study: Study,
        space: Space,
        most_macs: float,
        trials: int,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self._evaluator, self._study = evaluator, study
        self._most_macs, self._trials, self._progress = most_macs, trials, progress
        shared = evaluator.shared
        self._methods = published(shared.depth, shared.stream.tokens.patches)
        self._profiled = profiled(space, self._last_return(space))
        self._refused: dict[str, str] = {}
        self._must_return = ""

    def to_the_end(self) -> bool:
        """Evaluate plans until there are enough, or until Ctrl-C. Returns whether it was that."""
        try:
            self._always_tried()
            while len(self._study.known()) < self._trials:
                proposal = self._study.ask()
                if proposal is None:
                    break
                found = None
                try:
                    found = self._evaluated(proposal.plan, self._most_macs)
                finally:
                    if found is None:
                        self._study.reject(proposal)
                    else:
                        self._study.tell(proposal, found)
                if found is not None:
                    self._report(proposal.plan, found)
        except KeyboardInterrupt:
            return True
        return False

    def candidates(self) -> tuple[Candidate, ...]:
        """What is known, by multiply-adds."""
        found = [self._candidate(plan, known) for plan, known in self._study.known().items()]
        return tuple(sorted(found, key=lambda c: (c.macs, c.quality, str(c.plan))))

    def front(self) -> tuple[Candidate, ...]:
        """The best of those within the budget."""
        return front_of(c for c in self.candidates() if c.macs <= self._most_macs)

    def left_out(self) -> dict[str, str]:
        """Why published plans were not evaluated, by plan."""
        return {plan: why for plan, why in self._refused.items() if plan in self._methods}

    def profile(self) -> Profile:
        """What is known of one stage at each layer."""
        known = self._study.known()
        entries = tuple(
            Sensitivity(layer, percent, plan, *known[str(plan)])
            for (layer, percent), plan in self._profiled.items()
            if str(plan) in known
        )
        return Profile(entries, self._evaluator.costs.baseline, self._evaluator.metric.name)

    def _always_tried(self) -> None:
        plans = [Plan(), *self._profiled.values(), *map(Plan.parse, self._methods)]
        for plan in plans:
            if str(plan) in self._study.known():
                continue
            found = self._evaluated(plan)
            if found is not None:
                self._study.note(plan, found)
                self._report(plan, found)

    def _evaluated(self, plan: Plan, most_macs: float = float("inf")) -> Known | None:
        """What is found of a plan; ``None`` if it is refused, cannot be compared, or costs too much."""
        never = bool(plan.spans) and plan.spans[-1].return_layer is None
        if never and self._must_return:
            self._refused[str(plan)] = self._must_return
            return None
        try:
            found = self._evaluator.evaluate(plan, most_macs)
        except (NotComparableError, PlanError, UnsupportedModelError) as error:
            if never and isinstance(error, NotComparableError):
                self._must_return = error.message
            self._refused[str(plan)] = error.message
            return None
        if found is None:
            return None
        macs, quality = found
        return Known(macs, quality.mean, quality.spread)

    def _candidate(self, plan: str, known: Known) -> Candidate:
        return Candidate(Plan.parse(plan), *known, method=self._methods.get(plan, ""))

    def _report(self, plan: Plan, found: Known) -> None:
        if self._progress is None:
            return
        last = self._candidate(str(plan), found)
        evaluated = len(self._study.known())
        self._progress(
            Progress(evaluated, self._trials, last, self.front(), self._evaluator.costs.baseline)
        )

    def _last_return(self, space: Space) -> int | None:
        """After the last layer, or never if it cannot be told where that is."""
        back = space.depth + 1
        plan = next(iter(profiled(space, back).values()), None)
        if plan is None:
            return back
        try:
            with self._evaluator.shared.rewritten(plan):
                return back
        except UnsupportedModelError:
            return None
