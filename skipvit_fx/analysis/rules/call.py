"""The type of rules, and of the calls that they take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from skipvit_fx.analysis.axes import (
    Axes,
    Dim,
    MixesTokens,
    Tokens,
    axes_of,
    batch_of,
    plain,
    tensors_in,
    tokens_of,
)
from skipvit_fx.torch_internals import schema_arguments


class Position(NamedTuple):
    """An operand of fixed token length meets the token axis: row i belongs to position i.

    Attributes:
        operand: the tensor.
        dim: its dimension of token length.
        tokens: the token axis that it meets.
        rank: the rank of the result that it is broadcast to.
        batch_dim: the result's batch axis; ``None`` if it has none.
        per_sample: whether the operand has a batch axis of its own there.
        repeat: how often each sample repeats along the batch axis (when heads are merged into it).
    """

    operand: Tensor
    dim: int
    tokens: Tokens
    rank: int
    batch_dim: int | None
    per_sample: bool
    repeat: int


@dataclass
class Call:
    """One dispatched operator, and what its rule notes besides the axes.

    ``reads``: if the operator takes prefix rows out, the first row it does not take, counted from the first patch (so 0
    for all prefix rows, -1 for all but the last).
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    positions: list[Position] = field(default_factory=list)
    softmax_over: Tokens | None = None
    sums_weights: bool = False
    reads: int | None = None

    def argument(self, name: str) -> Any:
        """An argument by its name in the operator's schema: as passed, or the schema's default.

        The dispatcher leaves out arguments that equal their default, so no rule may have a default of its own. ``None``
        if this overload has no such argument.
        """
        for i, argument in enumerate(schema_arguments(self.func)):
            if argument.name == name:
                if i < len(self.args) and not argument.kwarg_only:
                    return self.args[i]
                return self.kwargs.get(name, argument.default_value)
        return None

    @property
    def self(self) -> Tensor:
        """The first argument."""
        tensor = self.args[0] if self.args else next(iter(self.kwargs.values()))
        assert isinstance(tensor, Tensor)
        return tensor

    @property
    def outs(self) -> list[Tensor]:
        """The tensors that the operator returns, in order."""
        return tensors_in(self.out)

    @property
    def name(self) -> str:
        """The readable name of the operator."""
        return str(self.func.overloadpacket).removeprefix("aten.")

    def same(self, axes: Axes) -> list[Axes | None]:
        """These axes for every result."""
        return [axes] * len(self.outs)


Rule: TypeAlias = Callable[[Call], "list[Axes | None]"]
"""Maps a call to the axes of its results, one entry each; ``None`` for a result without a token axis."""

RULES: dict[Any, Rule] = {}


def rule(*packets: Any) -> Callable[[Rule], Rule]:
    """Register a function as the rule of these operators."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(packets, function))
        return function

    return register


def axes_or_plain(tensor: Tensor) -> Axes:
    """The axes of an operand that may have no token axis."""
    return axes_of(tensor) or plain(tensor.shape)


def labelled_self(call: Call) -> Axes:
    """The axes of the first argument, which must carry the tokens."""
    axes = axes_of(call.self)
    if axes is None:
        raise MixesTokens(f"{call.name} looks things up by token")
    return axes


def only_tokens(dim: Dim, what: str) -> Tokens | None:
    """The token factor of a dimension that holds only tokens."""
    tokens = tokens_of(dim)
    if tokens is not None and len(dim) != 1:
        raise MixesTokens(f"{what} on an axis that merges tokens with others")
    return tokens


def refuse_moving(axes: Axes, dims: Sequence[int], what: str) -> list[int]:
    """The dimensions, counted from the front, if neither tokens nor samples lie along them."""
    normal = [d % len(axes) for d in dims]
    for d in normal:
        if tokens_of(axes[d]):
            raise MixesTokens(f"{what} runs over the token axis")
        refuse_samples(axes[d], what)
    return normal


def refuse_samples(dim: Dim, what: str) -> None:
    """Refuse operators along the batch axis: tokens are chosen per sample, so they would meet other positions there."""
    if batch_of(dim):
        raise MixesTokens(f"{what} mixes the samples of a batch")
