"""What differs between training and evaluation, and what may not differ between calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import nn

from skipvit_fx.errors import GuardError
from skipvit_fx.ops.following import kept_whole, sizes
from skipvit_fx.torch_internals import tensor_leaves

Constant: TypeAlias = bool | int | float


def by_mode(owner: nn.Module, train: Constant, evaluation: Constant) -> Constant:
    """One of two constants, depending on the mode of ``owner``.

    Authors write ``dropout_p=self.attn_drop.p if self.training else 0.0``. A trace sees only one of the two; this keeps
    both in the graph.
    """
    return train if owner.training else evaluation


class InTraining(nn.Module):
    """Calls a function, or a method of its first argument, while training. In eval mode one argument passes through.

    Authors write ``if self.training: x = augment(x)``, where a trace sees only one of the two modes.
    """

    def __init__(self, function: Callable[..., Any] | str, passes: int) -> None:
        super().__init__()
        self.function = function
        self.passes = passes

    @kept_whole
    def forward(self, owner: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What the function returns for the other arguments, if ``owner`` is in train mode."""
        if not owner.training:
            return args[self.passes]
        if isinstance(self.function, str):
            return getattr(args[0], self.function)(*args[1:], **kwargs)
        return self.function(*args, **kwargs)

    def extra_repr(self) -> str:
        return self.function if isinstance(self.function, str) else self.function.__name__


class FixedSize(nn.Module):
    """Passes an input through after checking the shapes of its tensors (except the batch axis).

    There is one at every input: which rows are patches, what a literal slice takes and which branch an image's height
    selects were determined for the sizes of the example, and may be silently wrong for others.

    Raises (from ``forward``):
        GuardError: the shape differs.
    """

    def __init__(self, name: str, shapes: tuple[tuple[int, ...], ...]) -> None:
        super().__init__()
        self.name = name
        self.shapes = shapes

    @kept_whole
    def forward(self, given):  # type: ignore[no-untyped-def]
        tensors = tensor_leaves(given)
        for tensor, shape in zip(tensors, self.shapes, strict=True):
            if tuple(sizes(tensor)[1:]) != shape:
                raise GuardError(
                    f"input {self.name!r} has shape {tuple(tensor.shape)}, but the model was rewritten for "
                    f"{_batch_of(shape)}",
                    hint="rewrite it again with example_inputs of that shape",
                )
        return given

    def extra_repr(self) -> str:
        return ", ".join(map(_batch_of, self.shapes))


def _batch_of(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(['batch', *map(str, shape)])}]"
