"""What a rule is, and what it gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from skipvit_fx.analysis.axes import Axes, Dim, MixesTokens, Tokens, axes_of, plain, tokens_of


class Position(NamedTuple):
    """An operand of fixed token length meets the token axis: row i belongs to position i.

    Attributes:
        operand: the tensor.
        dim: its dimension of token length.
        tokens: the token axis it meets.
        rank: rank of the result it is broadcast to.
        batch_dim: the result's batch axis; ``None`` if it has none.
        per_sample: whether the operand has a batch axis of its own there.
        repeat: how often each sample repeats along the batch axis (heads merged into it).
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
    """One dispatched operator, and what its rule has to say besides the axes.

    ``reads``: where the operator takes prefix rows out, the first row it does not take, counted from the first patch
    (so 0 for all prefix rows, -1 for all but the last).
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    positions: list[Position] = field(default_factory=list)
    softmax_over: Tokens | None = None
    sums_weights: bool = False
    reads: int | None = None

    def argument(self, index: int, name: str, default: Any = None) -> Any:
        if index < len(self.args):
            return self.args[index]
        return self.kwargs.get(name, default)

    @property
    def self(self) -> Tensor:
        tensor = self.argument(0, "self")
        assert isinstance(tensor, Tensor)
        return tensor


Rule: TypeAlias = Callable[[Call], "Axes | list[Axes | None] | None"]
RULES: dict[Any, Rule] = {}


def rule(*packets: Any) -> Callable[[Rule], Rule]:
    """Register a function as the rule of these operators."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(packets, function))
        return function

    return register


def axes_or_plain(tensor: Tensor) -> Axes:
    """What is known of an operand that may have no token axis."""
    return axes_of(tensor) or plain(tensor.shape)


def labelled_self(call: Call) -> Axes:
    """The axes of the first argument, which must be what has the tokens."""
    axes = axes_of(call.self)
    if axes is None:
        raise MixesTokens(f"{call.func.overloadpacket} looks things up by token")
    return axes


def only_tokens(dim: Dim, what: str) -> Tokens | None:
    """The token factor of a dimension that is nothing but tokens."""
    tokens = tokens_of(dim)
    if tokens is not None and len(dim) != 1:
        raise MixesTokens(f"{what} on an axis that merges tokens with others")
    return tokens


def refuse_tokens(axes: Axes, dims: Sequence[int], what: str) -> list[int]:
    """The dimensions, counted from the front, if none of them is the token axis."""
    normal = [d % len(axes) for d in dims]
    if any(tokens_of(axes[d]) for d in normal):
        raise MixesTokens(f"{what} runs over the token axis")
    return normal
