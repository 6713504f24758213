"""What a rewritten model keeps beside the author's attributes: its inserted modules, its graphs and its settings."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torch import nn

from skipvit_fx.graph.calls import Call, Form, form_of, signature_of
from skipvit_fx.graph.inputs import places_of
from skipvit_fx.graph.traced_through import Traced
from skipvit_fx.ops.select import Amount
from skipvit_fx.ops.switch import Switchable

if TYPE_CHECKING:
    from skipvit_fx.graph.module import SkipViTModule

Rewrite = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], "SkipViTModule"]


class Replacements(Protocol):
    """Judges the modules that were replaced since a graph was made; ``uses`` says how the graph calls them."""

    uses: dict[str, Any]

    def check(self) -> None:
        """Raise if one of them would give wrong results."""

    def of_copy(self, root: nn.Module) -> Replacements:
        """The same for a copy of the model."""

    def with_more(self, uses: Any) -> Replacements:
        """The same for one more graph."""


class Own(Switchable):
    """The only child that the compiler adds: the inserted modules, and the state of the rewritten model as a whole.

    It is not kept on the module itself, because the author's attributes there may have any name.

    Attributes:
        author: the class of the model.
        run: its forward, or the method set on the model instance in its place; takes the model as its first argument.
        calls: the graphs; the one for the example call comes first.
        forms: the ways in which their arguments were passed so far.
        drops: whether the plan drops anything at all.
        rewrite: rewrites the author's model for another call.
        traced: the modules that the graphs were traced through; ``None`` until the first graph is complete.
        replacements: the modules that they call on fewer tokens.
        built_in: names of number arguments that a graph cannot take as inputs, so that each value needs its own graph.
    """

    def __init__(self, author: type[nn.Module], run: Callable[..., Any]) -> None:
        super().__init__()
        self.author = author
        self.run = run
        self.calls: list[Call] = []
        self.forms: list[Form] = []
        self.drops = True
        self.rewrite: Rewrite | None = None
        self.traced: Traced | None = None
        self.replacements: Replacements | None = None
        self.built_in: set[str] = set()

    @property
    def skipping(self) -> bool:
        """Whether the graph runs, rather than the author's code."""
        return self.drops and self.active

    def method(self, name: str) -> Callable[..., Any]:
        """A method of the author's class; takes the model as its first argument."""
        method: Callable[..., Any] = getattr(self.author, name)
        return self.run if name == "forward" else method

    def inputs_of(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The arguments that the graph of a call takes, in its order, from those of a call like it."""
        places = places_of(signature_of(self.method(call.method)), args, kwargs)
        return form_of(call, places, args, kwargs).values(args, kwargs)

    def forward(self, x: Any) -> Any:
        """Return the input: some models call all their children in turn."""
        return x


class Settings(NamedTuple):
    """The settings that change while a model is trained.

    Attributes:
        enabled, train_only: of every inserted module.
        amounts: the amounts that apply now, by the path of the selecting module.
    """

    enabled: bool
    train_only: bool
    amounts: dict[str, Fraction | int]


def settings_of(own: Own) -> Settings:
    """The settings that apply now."""
    amounts = {path: m.current for path, m in own.named_modules() if isinstance(m, Amount)}
    return Settings(own.enabled, own.train_only, amounts)


def set_settings(inserted: nn.Module, settings: Settings) -> None:
    """Give the inserted modules these settings."""
    for path, module in inserted.named_modules():
        if isinstance(module, Switchable):
            module.enabled, module.train_only = settings.enabled, settings.train_only
        if isinstance(module, Amount):
            module.current = settings.amounts.get(path, module.current)
