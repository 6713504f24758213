"""Which layers drop how many tokens, and where these return: a small language, and its value.

``6(55%)+11`` drops 55 % of the patch tokens at layer 6 and returns them at the input of layer 11, in the paper's
notation. ``1-12(8)+merged`` merges 8 tokens into others in each of twelve layers. Spans that follow each other are
joined by semicolons: ``4(30%)+5;5(30%)+6``. The grammar, in which spaces do not matter::

    plan    = [span (";" span)*]
    span    = layers "(" amounts ")" ["+" LAYER] ["+fused" | "+merged"]
    layers  = (LAYER | LAYER "-" LAYER) ("," ...)*
    amounts = one for all layers, or one per layer: a percentage, or a number of tokens
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import NoReturn, TypeVar

from skipvit_fx.errors import PlanError

T = TypeVar("T")

_EXAMPLES = "write it like 6(55%)+11, 4,7(30%,30%)+10, 1-12(8)+merged or 4(30%)+5;5(30%)+6"
_LAYER = re.compile(r"[0-9]{1,9}")
_NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+|/[0-9]+)?")
_AMOUNT = re.compile(rf"{_NUMBER.pattern}\s*%?")
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, init=False)
class Stage:
    """One drop: at ``layer``, some of the patch tokens still present.

    Attributes:
        layer: the layer whose attention scores the tokens, and in which they leave, counted from 1; 0 is the embedding,
            in front of layer 1, where no attention has run.
        amount: the dropped ratio, exact, in [0, 1), as a ``Fraction``; or the number of tokens that leave, as an
            ``int``. The constructor also takes a float, read in decimal (0.29 is 29/100), or a string such as "29%",
            "0.29", "2/7" or "8".
    """

    layer: int
    amount: Fraction | int

    def __init__(self, layer: int, amount: Fraction | float | str) -> None:
        if not _is_int(layer):
            raise PlanError(
                f"layer {layer!r} is not an integer",
                hint="layers are counted 1, 2, 3, ...; 0 is the embedding",
            )
        if layer < 0:
            raise PlanError(
                f"layer {layer} is out of range", hint="layers count from 1; 0 is the embedding"
            )
        object.__setattr__(self, "layer", layer)
        object.__setattr__(self, "amount", _amount(amount))

    def dropped(self, n: int) -> int:
        """How many of ``n`` patch tokens leave: floor(ratio * n), or the number, but not the last one of them.

        ``n`` may be a torch.SymInt.
        """
        return leaving(self.amount, n)

    def kept(self, n: int) -> int:
        """How many of ``n`` patch tokens stay. See :meth:`dropped`."""
        return n - self.dropped(n)


def leaving(amount: Fraction | int, n: int) -> int:
    """How many of ``n`` tokens an amount takes. See :meth:`Stage.dropped`."""
    if isinstance(amount, Fraction):
        return amount.numerator * n // amount.denominator
    return max(0, min(amount, n - 1))


@dataclass(frozen=True, repr=False)
class Span:
    """Drops in ascending layers, and the layer at whose input all that they dropped returns.

    Attributes:
        stages: the drops, at least one.
        return_layer: may be depth + 1 (before the final norm); ``None`` if they never return.
        fused: whether an extra token, the score-weighted sum of the dropped ones, stands in for them.
        merged: whether each of them becomes part of the most similar of those that stay, instead of leaving; when they
            return, every patch gets the state of the token that it is part of.
    """

    stages: tuple[Stage, ...]
    return_layer: int | None = None
    fused: bool = False
    merged: bool = False

    def __post_init__(self) -> None:
        if not _are(self.stages, Stage) or not self.stages:
            raise PlanError(
                f"the stages of a span must be a tuple of one or more Stage, got {self.stages!r}",
                hint="write Span((Stage(6, 0.55),), return_layer=11) or Plan.parse('6(55%)+11')",
            )
        for name in ("fused", "merged"):
            if not isinstance(value := getattr(self, name), bool):
                raise PlanError(
                    f"{name} must be True or False, got {value!r}", hint=f"pass {name}=True"
                )
        if self.fused and self.merged:
            raise PlanError(
                "a span is either fused or merged",
                hint="merged tokens are part of those that stay, so nothing is left to fuse",
            )
        if self.merged and not self.stages[0].layer:
            raise PlanError(
                "tokens cannot be merged at layer 0, where no attention has run",
                hint="merging compares the keys of an attention: begin at layer 1",
            )
        if self.return_layer is not None and not _is_int(self.return_layer):
            raise PlanError(
                f"return layer {self.return_layer!r} is not an integer",
                hint="give the layer at whose input the tokens return, or None for never",
            )
        for before, after in pairwise(stage.layer for stage in self.stages):
            if before == after:
                raise PlanError(
                    f"layer {after} is repeated", hint="name each layer once, with a larger amount"
                )
            if before > after:
                raise PlanError(
                    f"layer {after} comes after layer {before}",
                    hint="put the layers in ascending order",
                )
        last = self.stages[-1].layer
        if self.return_layer is not None and self.return_layer <= last:
            raise PlanError(
                f"return at layer {self.return_layer}, but layer {last} still drops tokens",
                hint=f"return at layer {last + 1} or later",
            )

    def __repr__(self) -> str:
        return f"Span({str(self)!r})"

    def __str__(self) -> str:
        layers = [str(stage.layer) for stage in self.stages]
        amounts = [_spelled(stage.amount) for stage in self.stages]
        ranges = list(_ranges([stage.layer for stage in self.stages]))
        if len(set(amounts)) == 1 and len(ranges) < len(layers):
            layers, amounts = ranges, amounts[:1]
        returned = "" if self.return_layer is None else f"+{self.return_layer}"
        kind = "+fused" if self.fused else "+merged" if self.merged else ""
        return f"{','.join(layers)}({','.join(amounts)}){returned}{kind}"


@dataclass(frozen=True, repr=False)
class Plan:
    """Spans that follow each other. One without spans drops nothing. ``str(plan)`` is its canonical notation.

    Attributes:
        spans: each returns what it dropped before the next one begins, at the same layer at the earliest; only the
            last may return nothing.
    """

    spans: tuple[Span, ...] = ()

    def __post_init__(self) -> None:
        if not _are(self.spans, Span):
            raise PlanError(
                f"the spans of a plan must be a tuple of Span, got {self.spans!r}",
                hint="write Plan((Span((Stage(6, 0.55),), return_layer=11),)) or Plan.parse('6(55%)+11')",
            )
        for before, after in pairwise(self.spans):
            first = after.stages[0].layer
            if before.return_layer is None:
                raise PlanError(
                    f"the span {before} never returns, and {after} follows it",
                    hint=f"let it return at layer {first} at the latest, or join the two: they then drop one "
                    "after another",
                )
            if first < before.return_layer:
                raise PlanError(
                    f"layer {first} drops tokens before those of {before} return",
                    hint=f"begin at layer {before.return_layer} or later, or join the two spans",
                )

    def __repr__(self) -> str:
        return f"Plan({str(self)!r})"

    def __str__(self) -> str:
        return ";".join(map(str, self.spans))

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages of all spans, in the order of their layers."""
        return tuple(stage for span in self.spans for stage in span.stages)

    def check(self, depth: int) -> None:
        """Raise PlanError unless the plan fits a model of ``depth`` layers."""
        for span in self.spans:
            for stage in span.stages:
                if stage.layer > depth:
                    raise PlanError(
                        f"layer {stage.layer} is out of range: the model has {depth} layers",
                        hint=f"drop at one of the layers 1 to {depth}",
                    )
            if span.return_layer is not None and span.return_layer > depth + 1:
                raise PlanError(
                    f"return layer {span.return_layer} is out of range: the model has {depth} layers",
                    hint=f"return at layer {depth + 1} (before the final norm) at the latest",
                )

    @classmethod
    def parse(cls, text: str) -> Plan:
        """Read the notation, such as ``4,7(30%,30%)+10``; spaces do not matter.

        Raises:
            PlanError: it cannot be read; the message points at the character.
        """
        if not isinstance(text, str):
            raise PlanError(f"a plan's notation must be a string, got {text!r}", hint=_EXAMPLES)
        return _Reader(text).plan() if text.strip() else cls()


class _Reader:
    """Reads a text from left to right."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def plan(self) -> Plan:
        plan = Plan()
        while not plan.spans or self.accept(";"):
            self.skip_spaces()
            start = self.at
            spans = (*plan.spans, self.span())
            plan = self.valid(functools.partial(Plan, spans), start)
        if self.rest():
            self.fail("expected +LAYER, +fused, +merged, a semicolon or the end")
        return plan

    def span(self) -> Span:
        start = self.at
        layers = list(self.layers())
        self.expect("(")
        amounts_at = self.at
        amounts = [self.amount()]
        while self.accept(","):
            amounts.append(self.amount())
        if len(amounts) not in (1, len(layers)):
            self.fail(
                f"{len(amounts)} amounts for {len(layers)} layer{'s' if len(layers) > 1 else ''}",
                at=amounts_at,
                hint="give one amount for all layers, or one for each, as in 4,7(30%,30%)",
            )
        self.expect(")")
        amounts *= len(layers) if len(amounts) == 1 else 1
        stages = tuple(Stage(*both) for both in zip(layers, amounts, strict=True))
        returns_at = self.at
        returns = self.return_layer()
        kind = self.kind()
        fused, merged = kind == "fused", kind == "merged"
        self.valid(lambda: Span(stages, None, fused, merged), start)
        return self.valid(lambda: Span(stages, returns, fused, merged), returns_at)

    def layers(self) -> Iterator[int]:
        while True:
            first = self.layer()
            if self.accept("-"):
                start = self.at
                last = self.layer()
                if last < first:
                    self.fail(
                        f"the range ends before it begins, at layer {first}",
                        at=start,
                        hint="write the lower layer first, as in 3-10",
                    )
                yield from range(first, last + 1)
            else:
                yield first
            if not self.accept(","):
                return

    def layer(self) -> int:
        return int(self.take(_LAYER, "a layer number"))

    def amount(self) -> Fraction | int:
        self.skip_spaces()
        start = self.at
        text = self.take(_AMOUNT, "an amount, such as 55% or 8").rstrip()
        if not text.endswith("%") and not _LAYER.fullmatch(text):
            self.fail(
                f"{text} is neither a percentage nor a number of tokens",
                at=start,
                hint=f"end a percentage with a percent sign: {_EXAMPLES}",
            )
        return self.valid(lambda: _amount(text), start)

    def kind(self) -> str:
        if not self.accept("+"):
            return ""
        word = self.word()
        if word not in ("fused", "merged"):
            self.fail(
                "expected fused or merged",
                hint="only +LAYER, +fused or +merged may follow the amounts, the layer first",
            )
        self.at += len(word)
        return word

    def return_layer(self) -> int | None:
        start = self.at
        if self.accept("+"):
            if _LAYER.match(self.rest()):
                return self.layer()
            self.at = start
        return None

    # -- characters -----------------------------------------------------------------------------------------------

    def skip_spaces(self) -> None:
        self.at = len(self.text) - len(self.text[self.at :].lstrip())

    def rest(self) -> str:
        self.skip_spaces()
        return self.text[self.at :]

    def word(self) -> str:
        found = _WORD.match(self.rest())
        return found[0] if found else ""

    def accept(self, character: str) -> bool:
        found = self.rest().startswith(character)
        self.at += found
        return found

    def expect(self, character: str) -> None:
        if not self.accept(character):
            self.fail(f"expected {character!r}")

    def take(self, pattern: re.Pattern[str], what: str) -> str:
        found = pattern.match(self.rest())
        if found is None:
            self.fail(f"expected {what}")
        self.at += found.end()
        return found[0]

    def valid(self, make: Callable[[], T], at: int) -> T:
        """What ``make`` returns; its error points at a character."""
        try:
            return make()
        except PlanError as error:
            self.fail(error.message, at=at, hint=error.hint)

    def fail(self, message: str, *, at: int | None = None, hint: str = _EXAMPLES) -> NoReturn:
        self.skip_spaces()
        at = self.at if at is None else at
        at += len(self.text[at:]) - len(self.text[at:].lstrip())
        line = self.text.replace("\n", " ")
        raise PlanError(
            f"{message} (character {at + 1} of the plan)\n  {line}\n  {' ' * at}^", hint=hint
        ) from None


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are(values: object, kind: type) -> bool:
    return isinstance(values, tuple) and all(isinstance(value, kind) for value in values)


def _amount(value: Fraction | float | str) -> Fraction | int:
    """The number of tokens, or the exact ratio in decimal, that ``value`` denotes.

    Raises:
        PlanError: it is a negative number of tokens, or a ratio that is not in [0, 1).
    """
    hint = 'a ratio is at least 0 and less than 1: 55 % is 0.55 or "55%"; a whole number is one of tokens'
    if isinstance(value, bool) or not isinstance(value, Fraction | float | int | str):
        raise PlanError(f"amount {value!r} is not a number", hint=hint)
    if isinstance(value, str) and _LAYER.fullmatch(value.strip()):
        value = int(value)
    if isinstance(value, int):
        if value < 0:
            raise PlanError(f"amount {value} is negative", hint=hint)
        return value
    try:
        if isinstance(value, str):
            ratio = _fraction(value)
        else:
            ratio = Fraction(float.__repr__(value) if isinstance(value, float) else value)
    except (ValueError, ZeroDivisionError) as error:
        raise PlanError(f"ratio {value!r} is not a number in [0, 1)", hint=hint) from error
    if not 0 <= ratio < 1:
        raise PlanError(f"ratio {value!s} is outside [0, 1)", hint=hint)
    return ratio


def _fraction(text: str) -> Fraction:
    number = text.strip()
    unit = Fraction(1)
    if number.endswith("%"):
        number = number[:-1].rstrip()
        unit = Fraction(1, 100)
    if not _NUMBER.fullmatch(number):
        raise ValueError(f"not a number: {text!r}")
    return Fraction(number) * unit


def _ranges(layers: list[int]) -> Iterator[str]:
    """The layers in words, three or more that follow each other as a range."""
    while layers:
        run = 1
        while run < len(layers) and layers[run] == layers[0] + run:
            run += 1
        if run < 3:
            run = 1
        yield str(layers[0]) if run == 1 else f"{layers[0]}-{layers[run - 1]}"
        layers = layers[run:]


def _spelled(amount: Fraction | int) -> str:
    """A number of tokens, or the exact percentage: decimal if it terminates ("12.5%"), else a fraction ("100/3%")."""
    if not isinstance(amount, Fraction):
        return str(amount)
    percent = amount * 100
    for digits in range(percent.denominator.bit_length()):
        shifted = percent * 10**digits
        if shifted.denominator == 1:
            text = f"{shifted.numerator:0{digits + 1}d}"
            return f"{text[:-digits]}.{text[-digits:]}%" if digits else f"{text}%"
    return f"{percent}%"
