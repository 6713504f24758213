"""What differs between training and evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import nn

Constant: TypeAlias = bool | int | float


def by_mode(owner: nn.Module, train: Constant, evaluation: Constant) -> Constant:
    """One of two constants, by the mode that ``owner`` is in.

    Authors write ``dropout_p=self.attn_drop.p if self.training else 0.0``. A trace sees only one of the two;
    this keeps both alive in the graph.
    """
    return train if owner.training else evaluation


class InTraining(nn.Module):
    """Calls a function, or a method of its first argument, while training. In eval mode one argument passes through.

    Authors write ``if self.training: x = augment(x)``, where a trace sees one of the two modes only.
    """

    def __init__(self, function: Callable[..., Any] | str, passes: int) -> None:
        super().__init__()
        self.function = function
        self.passes = passes

    def forward(self, owner: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What the function returns for the other arguments, if ``owner`` is in train mode."""
        if not owner.training:
            return args[self.passes]
        if isinstance(self.function, str):
            return getattr(args[0], self.function)(*args[1:], **kwargs)
        return self.function(*args, **kwargs)

    def extra_repr(self) -> str:
        return self.function if isinstance(self.function, str) else self.function.__name__
