"""The options of a rewrite as one value: in the context of the passes, in the record and in the saved file."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias, get_args

from skipvit_fx.arguments import check_choice, check_flag, check_prefix_tokens
from skipvit_fx.errors import PlanError
from skipvit_fx.plan import Plan
from skipvit_fx.scores import (
    OF_ATTENTION,
    ScoreFunction,
    asked_by,
    check_score,
    function_of,
    name_of,
)

Frontend = Literal["symbolic", "export"]
Cut = Literal["attention", "block"]
Score: TypeAlias = str | ScoreFunction
"""A name, built in or registered, or a function."""

_FLAGS = (
    "fill_taps",
    "eliminate_dead_tokens",
    "train_only",
    "proportional_attention",
    "validate",
)


@dataclass(frozen=True)
class Options:
    """The arguments of :func:`skipvit_fx.rewrite`, which describes them.

    Raises (from the constructor):
        PlanError: an argument is not one of its choices.
    """

    plan: Plan
    frontend: Frontend | Literal["auto"] = "auto"
    cut: Cut = "attention"
    score: Score = "auto"
    prefix_tokens: int | None = None
    fill_taps: bool = False
    eliminate_dead_tokens: bool = True
    multiple_of: int = 1
    train_only: bool = False
    proportional_attention: bool = True
    validate: bool = True

    def __post_init__(self) -> None:
        check_prefix_tokens(self.prefix_tokens)
        for name in _FLAGS:
            check_flag(name, getattr(self, name))
        check_choice("frontend", self.frontend, ("auto", *get_args(Frontend)))
        check_choice("cut", self.cut, get_args(Cut))
        check_score(self.score)
        multiple = self.multiple_of
        if isinstance(multiple, bool) or not isinstance(multiple, int) or multiple < 1:
            raise PlanError(
                f"multiple_of must be an integer of 1 or more, got {multiple!r}",
                hint="pass 1 for any number of tokens, or the length of a kernel's tile, such as 8 or 16",
            )

    @property
    def drops(self) -> bool:
        """Whether anything may be left out: tokens, or, in a plan without stages, rows that nothing reads."""
        return any(stage.amount for stage in self.plan.stages) or not self.plan.stages

    @property
    def eliminates(self) -> bool:
        """Whether rows that nothing reads are left out."""
        return self.eliminate_dead_tokens and self.drops

    @property
    def score_function(self) -> ScoreFunction | None:
        """The function that scores; ``None`` if attention does, or chance.

        Raises:
            PlanError: it is registered in another process only.
        """
        return function_of(self.score)

    @property
    def score_asks(self) -> tuple[str, ...]:
        """What the score reads of the layer's attention: empty if it needs none."""
        if self.score in OF_ATTENTION:
            return ("attention",)
        function = self.score_function
        return asked_by(function) if function is not None else ()

    @property
    def score_name(self) -> str:
        """The name of the score, even if it is a function."""
        if isinstance(self.score, str):
            return self.score
        return name_of(self.score) or str(getattr(self.score, "__name__", "function"))

    def to_dict(self) -> dict[str, Any]:
        """The options as plain values, with the plan in the paper's notation and a score function by its name."""
        return {**asdict(self), "plan": str(self.plan), "score": self.score_name}
