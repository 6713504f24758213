"""Which layers drop how many tokens, and where these return: the paper's notation as a value.

``6(55%)+11`` drops 55 % of the patch tokens at layer 6 and returns them at the input of layer 11.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from skipvit_fx.errors import PlanError

_EXAMPLES = "write it like 6(55%)+11, 4,7(30%,30%)+10 or 6(45%)+fused"
_NOTATION = re.compile(r"(?P<layers>[^()]*)\((?P<ratios>[^()]*)\)(?P<suffix>[^()]*)")
_INTEGER = re.compile(r"-?[0-9]{1,9}")
_NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+|/[0-9]+)?")


@dataclass(frozen=True, init=False)
class Stage:
    """One drop: at ``layer`` (counted from 1), ``ratio`` of the patch tokens still present.

    Attributes:
        layer: the layer whose attention scores the tokens, and in which they leave.
        ratio: the dropped share, exact, in [0, 1). The constructor also takes a float, read in decimal (0.29 is
            29/100), an int, or a string such as "29%", "0.29" or "2/7".
    """

    layer: int
    ratio: Fraction

    def __init__(self, layer: int, ratio: Fraction | float | str) -> None:
        if not _is_int(layer):
            raise PlanError(
                f"layer {layer!r} is not an integer", hint="layers are counted 1, 2, 3, ..."
            )
        if layer < 1:
            raise PlanError(
                f"layer {layer} is out of range", hint="layers count from 1, not from 0"
            )
        object.__setattr__(self, "layer", layer)
        object.__setattr__(self, "ratio", _ratio(ratio))

    def dropped(self, n: int) -> int:
        """How many of ``n`` patch tokens leave: floor(ratio * n). ``n`` may be a torch.SymInt."""
        return self.ratio.numerator * n // self.ratio.denominator

    def kept(self, n: int) -> int:
        """How many of ``n`` patch tokens stay: ceil((1 - ratio) * n). See :meth:`dropped`."""
        return n - self.dropped(n)


@dataclass(frozen=True, repr=False)
class Plan:
    """All drops, ascending by layer, and the layer at whose input every dropped token returns.

    A plan without stages drops nothing. ``str(plan)`` is its canonical notation.

    Attributes:
        stages: the drops.
        return_layer: may be depth + 1 (before the final norm); None if they never return.
        fused: whether an extra token, the score-weighted sum of the dropped ones, stands in for them.
    """

    stages: tuple[Stage, ...] = ()
    return_layer: int | None = None
    fused: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.stages, tuple) or not all(
            isinstance(stage, Stage) for stage in self.stages
        ):
            raise PlanError(
                f"stages must be a tuple of Stage, got {self.stages!r}",
                hint="write Plan((Stage(6, 0.55),), return_layer=11) or Plan.parse('6(55%)+11')",
            )
        if not isinstance(self.fused, bool):
            raise PlanError(
                f"fused must be True or False, got {self.fused!r}", hint="pass fused=True"
            )
        if self.return_layer is not None and not _is_int(self.return_layer):
            raise PlanError(
                f"return layer {self.return_layer!r} is not an integer",
                hint="give the layer at whose input the tokens return, or None for never",
            )
        for before, after in pairwise(stage.layer for stage in self.stages):
            if before == after:
                raise PlanError(
                    f"layer {after} is repeated", hint="name each layer once, with a larger ratio"
                )
            if before > after:
                raise PlanError(
                    f"layer {after} comes after layer {before}",
                    hint="put the layers in ascending order",
                )
        if not self.stages and (self.return_layer is not None or self.fused):
            raise PlanError(
                "a plan without stages has nothing to return or fuse",
                hint="add a stage, or leave out the return layer and the fused token",
            )
        if self.return_layer is not None and self.return_layer <= self.stages[-1].layer:
            last = self.stages[-1].layer
            raise PlanError(
                f"return at layer {self.return_layer}, but layer {last} still drops tokens",
                hint=f"return at layer {last + 1} or later",
            )

    def __repr__(self) -> str:
        return f"Plan({str(self)!r})"

    def __str__(self) -> str:
        if not self.stages:
            return ""
        layers = ",".join(str(stage.layer) for stage in self.stages)
        ratios = ",".join(_percent(stage.ratio) for stage in self.stages)
        returned = "" if self.return_layer is None else f"+{self.return_layer}"
        return f"{layers}({ratios}){returned}{'+fused' if self.fused else ''}"

    def check(self, depth: int) -> None:
        """Raise PlanError unless the plan fits a model of ``depth`` layers."""
        for stage in self.stages:
            if stage.layer > depth:
                raise PlanError(
                    f"layer {stage.layer} is out of range: the model has {depth} layers",
                    hint=f"drop at one of the layers 1 to {depth}",
                )
        if self.return_layer is not None and self.return_layer > depth + 1:
            raise PlanError(
                f"return layer {self.return_layer} is out of range: the model has {depth} layers",
                hint=f"return at layer {depth + 1} (before the final norm) at the latest",
            )

    @classmethod
    def parse(cls, text: str) -> Plan:
        """Read the paper's notation, such as ``4,7(30%,30%)+10``; spaces do not matter."""
        if not isinstance(text, str):
            raise PlanError(f"a plan's notation must be a string, got {text!r}", hint=_EXAMPLES)
        if not text.strip():
            return cls()
        match = _NOTATION.fullmatch(text)
        if match is None:
            raise PlanError(f"cannot read the plan {text!r}", hint=_EXAMPLES)
        layers = [_parse_layer(item) for item in match["layers"].split(",")]
        ratios = [_parse_percent(item) for item in match["ratios"].split(",")]
        if len(layers) != len(ratios):
            raise PlanError(
                f"{len(layers)} layer(s) but {len(ratios)} ratio(s) in the plan {text!r}",
                hint="give each layer its own ratio, as in 4,7(30%,30%)",
            )
        return_layer, fused = _parse_suffix(match["suffix"])
        return cls(tuple(map(Stage, layers, ratios)), return_layer, fused)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _ratio(value: Fraction | float | str) -> Fraction:
    """The exact ratio that ``value`` denotes in decimal; PlanError unless it is in [0, 1)."""
    hint = 'ratios are at least 0 and below 1; 55 % is 0.55 or "55%"'
    if isinstance(value, bool) or not isinstance(value, Fraction | float | int | str):
        raise PlanError(f"ratio {value!r} is not a number", hint=hint)
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


def _percent(ratio: Fraction) -> str:
    """The exact percentage: decimal if it terminates ("12.5%"), else a fraction ("100/3%")."""
    percent = ratio * 100
    for digits in range(percent.denominator.bit_length()):
        shifted = percent * 10**digits
        if shifted.denominator == 1:
            text = f"{shifted.numerator:0{digits + 1}d}"
            return f"{text[:-digits]}.{text[-digits:]}%" if digits else f"{text}%"
    return f"{percent}%"


def _parse_layer(text: str) -> int:
    if not _INTEGER.fullmatch(text.strip()):
        raise PlanError(f"{text.strip()!r} is not a layer number", hint=_EXAMPLES)
    return int(text)


def _parse_percent(text: str) -> Fraction:
    if not text.strip().endswith("%"):
        raise PlanError(
            f"{text.strip()!r} is not a percentage", hint=f"end it with a percent sign: {_EXAMPLES}"
        )
    return _ratio(text.strip())


def _parse_suffix(text: str) -> tuple[int | None, bool]:
    """Read what follows the ratios: ``+R``, ``+fused``, ``+R+fused`` or nothing."""
    start, *items = (item.strip() for item in text.split("+"))
    fused = items[-1:] == ["fused"]
    if fused:
        items.pop()
    if start or len(items) > 1:
        raise PlanError(
            f"cannot read {text.strip()!r} after the ratios",
            hint="only +LAYER, +fused or +LAYER+fused may follow",
        )
    return (_parse_layer(items[0]) if items else None), fused
