"""The plans that are searched: numbers in fixed ranges, each set of which is a plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from skipvit_fx.methods import METHODS
from skipvit_fx.plan import Plan, Span, Stage
from skipvit_fx.planner.shared_graph import KINDS, SharedGraph, span_of

PERCENT = (2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 35, 40, 45, 50, 55, 60, 65, 70, 75, 80)
"""The amounts that are tried."""

MOST_MERGED = Fraction(1, 2)
"""More cannot merge at one layer."""

PROFILED = (25, 50, 75)
"""Those of the profile, in percent."""

MOST_GROUPS = 3
"""Stages are given in so many groups at most. If there may be more stages, those of a group are alike, and one, two or
three layers apart."""

PAPER = (
    "6(45%)+fused",
    "4,7(30%,30%)+10",
    "4,7(30%,30%)+11",
    "5,8(35%,35%)+10",
    "5,8(35%,35%)+11",
    "6(45%)+11",
    "6(50%)+11",
    "6(55%)+11",
)
"""The rows of the paper's table, made for 12 layers."""


@dataclass(frozen=True)
class Dimension:
    """A number that is chosen between two others, both included."""

    name: str
    low: int
    high: int


@dataclass(frozen=True)
class Space:
    """The plans of up to ``stages`` stages on one model.

    A group of stages has a first layer, a number of stages and their distance, an amount, a kind, and the number of
    layers after which its tokens return: past the last layer, never. Groups that overlap become one span, which returns
    where the last of them does and is of the first one's kind.

    Attributes:
        depth: the number of layers.
        layers: those at which a stage may be.
        kinds: those that some layer takes.
        stages: the most in a plan.
    """

    depth: int
    layers: tuple[int, ...]
    kinds: tuple[str, ...]
    stages: int

    @classmethod
    def of(cls, shared: SharedGraph, stages: int) -> Space:
        """The plans that a model takes."""
        layers = sorted({layer for taken in shared.places.values() for layer in taken})
        kinds = tuple(kind for kind in KINDS if shared.places[kind])
        return cls(shared.depth, tuple(layers), kinds, stages)

    @property
    def groups(self) -> int:
        """The most groups of stages in a plan."""
        return min(self.stages, MOST_GROUPS)

    def dimensions(self) -> list[Dimension]:
        """The numbers that make a plan."""
        found = []
        for i in range(self.groups):
            found += [
                Dimension(f"layer_{i}", 0, len(self.layers) - 1),
                Dimension(f"amount_{i}", 0 if i == 0 else -len(PERCENT) // 2, len(PERCENT) - 1),
                Dimension(f"length_{i}", 1, self.depth + 2),
                Dimension(f"kind_{i}", 0, len(self.kinds) - 1),
            ]
            if self.stages > self.groups:
                found += [
                    Dimension(f"repeat_{i}", 1, self.stages),
                    Dimension(f"distance_{i}", 1, 3),
                ]
        return found

    def plan(self, values: Mapping[str, int]) -> Plan:
        """The plan that these numbers make. A negative amount leaves its group out."""
        groups: list[_Group] = []
        taken: set[int] = set()
        for i in range(self.groups):
            if (amount := values[f"amount_{i}"]) < 0:
                continue
            kind = self.kinds[values[f"kind_{i}"]]
            first, distance = self.layers[values[f"layer_{i}"]], values.get(f"distance_{i}", 1)
            places = range(first, self.depth + 1, distance)[: values.get(f"repeat_{i}", 1)]
            free = [layer for layer in places if layer in self.layers and layer not in taken]
            free = free[: self.stages - len(taken)]
            taken.update(free)
            if free:
                stages = [Stage(layer, Fraction(PERCENT[amount], 100)) for layer in free]
                groups.append(_Group(stages, free[-1] + values[f"length_{i}"], kind))
        return Plan(tuple(self._spans(groups)))

    def values(self, plan: Plan) -> dict[str, int] | None:
        """The numbers that make a plan, with a group for every stage; ``None`` if there are none."""
        values = {dimension.name: max(0, dimension.low) for dimension in self.dimensions()}
        values |= {f"amount_{i}": -1 for i in range(1, self.groups)}
        kinds = [
            ("fused" if span.fused else "merged" if span.merged else "skip", span, stage)
            for span in plan.spans
            for stage in span.stages
        ]
        if len(kinds) > self.groups:
            return None
        for i, (kind, span, stage) in enumerate(kinds):
            percent = stage.amount * 100 if isinstance(stage.amount, Fraction) else None
            if percent not in PERCENT or stage.layer not in self.layers or kind not in self.kinds:
                return None
            back = self.depth + 2 if span.return_layer is None else span.return_layer
            values |= {
                f"layer_{i}": self.layers.index(stage.layer),
                f"amount_{i}": PERCENT.index(int(percent)),
                f"length_{i}": back - stage.layer,
                f"kind_{i}": self.kinds.index(kind),
            }
        return values if self.plan(values) == plan else None

    def _spans(self, groups: list[_Group]) -> list[Span]:
        spans: list[Span] = []
        waiting = sorted(groups, key=lambda group: group.stages[0].layer)
        while waiting:
            group = waiting.pop(0)
            while waiting and waiting[0].stages[0].layer < group.back:
                other = waiting.pop(0)
                stages = sorted(group.stages + other.stages, key=lambda stage: stage.layer)
                later = max(group, other, key=lambda one: one.stages[-1].layer)
                group = _Group(stages, max(later.back, stages[-1].layer + 1), group.kind)
            back = group.back if group.back <= self.depth + 1 else None
            most = MOST_MERGED if group.kind == "merged" else Fraction(1)
            own = tuple(Stage(s.layer, min(Fraction(s.amount), most)) for s in group.stages)
            spans.append(span_of(own, back, group.kind))
        return spans


@dataclass
class _Group:
    """Stages of one kind, and the layer at which their tokens return."""

    stages: list[Stage]
    back: int
    kind: str


def profiled(space: Space, back: int | None) -> dict[tuple[int, int], Plan]:
    """The plans of the profile, by layer and percent: one stage each, which returns at ``back``."""
    return {
        (layer, percent): Plan(
            (span_of((Stage(layer, Fraction(percent, 100)),), back, space.kinds[0]),)
        )
        for layer in space.layers
        for percent in PROFILED
    }


def published(depth: int, patches: int) -> dict[str, str]:
    """Plans that are always tried, as far as the model has the layers: the paper's, and those of EViT and ToMe.

    Returns:
        The name of each by its notation. ToMe's amounts are for 196 patches, and in proportion for other numbers.
    """
    plans = dict.fromkeys(PAPER, "SkipViT") | {METHODS["evit"].plan: "EViT"}
    for merged in (8, 13):
        amount = max(1, round(merged * patches / 196))
        plans[f"1-{depth}({amount})+merged"] = "ToMe"
    return {
        str(Plan.parse(plan)): name
        for plan, name in plans.items()
        if _fits(Plan.parse(plan), depth)
    }


def _fits(plan: Plan, depth: int) -> bool:
    last = max(stage.layer for stage in plan.stages)
    back = max(span.return_layer or 0 for span in plan.spans)
    return last <= depth and back <= depth + 1
