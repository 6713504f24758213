"""What a graph assumes of the calls that it is made for, checked at each call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn

from skipvit_fx.errors import GuardError
from skipvit_fx.ops.following import quietly, recorded
from skipvit_fx.torch_internals import pytree


def kind_of(value: Any) -> type:
    """The class of a value as its reader sees it: a tensor or a parameter, whatever class traces it."""
    if isinstance(value, nn.Parameter):
        return nn.Parameter
    return Tensor if isinstance(value, Tensor) else type(value)


READS: dict[str, Callable[[Any], Any]] = {
    "bool": lambda value: True if value else False,  # noqa: SIM210 - torch.compile decides here
    "int": int,
    "float": float,
    "len": len,
    "keys": lambda value: tuple(value.keys()),
    "value": lambda value: value,
    "class": lambda value: kind_of(value).__name__,
    "nothing": lambda value: [leaf is None for leaf in pytree.tree_leaves(value)],
}
"""The ways in which Python code may read a value to decide something while a forward is followed."""

OF_KIND = ("class", "nothing")
"""The reads that do not depend on any size."""


@fx.has_side_effect
@recorded
def guard(value: Any, read: str, assumed: Any, place: str) -> None:
    """Check that a value is what it was when the graph was made, since a branch may depend on it.

    Args:
        value: the value of a node.
        read: how the author's code read it, a key of :data:`READS`.
        assumed: the result of that read when the graph was made.
        place: where it was read, in words.

    Raises:
        GuardError: the value differs, so the author's code might take another path.
    """
    quietly(_check, value, read, assumed, place)


def _check(value: Any, read: str, assumed: Any, place: str) -> None:
    found = READS[read](value)
    if found != assumed:
        raise GuardError(
            f"the model was rewritten for a call in which {place} finds {assumed!r}; here it is {found!r}",
            hint="call it in the same way as with its example_inputs, or rewrite it with this call as example_inputs",
        )
