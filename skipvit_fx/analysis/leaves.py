"""Whether a module computes with the number of tokens or samples. It runs once with both counts unknown.

The counts are symbols of torch's shape arithmetic, so a size derived from one carries its origin: into a comparison,
where it leaves a guard, and into the arguments of an operator.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from skipvit_fx.analysis.axes import Axes, Batch, Factor, Tokens, axes_of, tensors_in
from skipvit_fx.author.code import author_code
from skipvit_fx.capture.fakes import TracelessFakeMode
from skipvit_fx.torch_internals import (
    TorchDispatchMode,
    aten,
    expression_of,
    new_size,
    pytree,
    symbol_of,
)

COUNTS = "a module computes with the number of tokens"
BRANCHES = "a module asks how many samples there are, and may behave differently for another number"

_RESHAPES = frozenset(
    {aten.view, aten._unsafe_view, aten.reshape, aten._reshape_alias, aten.flatten, aten.expand}
)
"""Operators that may take the length of a token axis as an argument, if their tensor has that axis."""


def computes_with_counts(
    mode: TracelessFakeMode, call: Callable[..., Any], args: tuple[Any, ...], kwargs: Any
) -> str:
    """How the result of ``call`` depends on the number of tokens or samples; empty if it does not.

    Args:
        mode: the mode that the arguments belong to; it has a shape environment.
        call: a module or function.
        args, kwargs: fake; tensors with tokens have their axes.

    Raises:
        AuthorError: the author's code needs to know a count.
    """
    counts = _Counts(mode)
    with mode, torch.no_grad():
        args, kwargs = counts.unknown((args, kwargs))
        with counts, author_code():
            out = call(*args, **kwargs)
    return counts.verdict(out)


class _Counts(TorchDispatchMode):
    """Watches where the two counts are used while a call runs on :meth:`unknown` arguments."""

    def __init__(self, mode: TracelessFakeMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        assert mode.shape_env is not None
        self._env = mode.shape_env
        self._lengths: dict[tuple[type, int], Any] = {}
        self._before = len(self._env.guards)
        self._by_torch: list[Any] = []
        self._computes = False

    def unknown(self, value: Any) -> Any:
        """The value, with the token and batch axes of its tensors made of unknown length."""

        def fresh(leaf: Any) -> Any:
            axes = axes_of(leaf) if isinstance(leaf, Tensor) else None
            if axes is None:
                return leaf
            return torch.empty(self._shape(axes), dtype=leaf.dtype, device=leaf.device)

        return pytree.tree_map(fresh, value)

    def _shape(self, axes: Axes) -> list[Any]:
        shape: list[Any] = []
        for dim in axes:
            length: Any = 1
            for factor in dim:
                length = length * self._length(factor)
            shape.append(length)
        return shape

    def _length(self, factor: Factor) -> Any:
        if isinstance(factor, Tokens):
            return self._symbol(Tokens, factor.patches) + (factor.prefix + factor.suffix)
        return self._symbol(Batch, factor.samples) if isinstance(factor, Batch) else factor

    def _symbol(self, kind: type, hint: int) -> Any:
        if (kind, hint) not in self._lengths:
            self._lengths[kind, hint] = new_size(self._env, kind.__name__, hint)
        return self._lengths[kind, hint]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = self._token_dims((args, kwargs))
        before = len(self._env.guards)
        out = func(*args, **kwargs)
        self._by_torch += self._env.guards[before:]
        if any(map(self._of_tokens, pytree.tree_leaves((args, kwargs)))):
            told_its_own = func.overloadpacket in _RESHAPES and self._token_dims(out) <= given
            self._computes |= not told_its_own
        return out

    def _token_dims(self, tensors: Any) -> int:
        """The number of dimensions of these tensors whose length depends on the number of tokens."""
        return sum(map(self._of_tokens, (n for t in tensors_in(tensors) for n in t.shape)))

    def _of_tokens(self, number: Any) -> bool:
        return self._depends(number, Tokens)

    def _depends(self, number: Any, kind: type) -> bool:
        """Whether a size, a number or a guard is computed from counts of this kind."""
        expression = expression_of(number)
        return expression is not None and not expression.free_symbols.isdisjoint(
            symbol_of(size) for (own, _), size in self._lengths.items() if own is kind
        )

    def verdict(self, out: Any) -> str:
        """The finding, given what the call returned."""
        guards = self._env.guards[self._before :]
        numbers = [*guards, *pytree.tree_leaves(out)]
        if self._computes or any(self._depends(number, Tokens) for number in numbers):
            return COUNTS
        asked = [guard for guard in guards if guard not in self._by_torch]
        return BRANCHES if any(self._depends(guard, Batch) for guard in asked) else ""


def structure(module: nn.Module) -> Hashable:
    """A key that is equal for modules that run the same code on inputs of the same kind, whatever their weights."""
    return tuple(
        (path, type(part), tuple(_described(part))) for path, part in module.named_modules()
    )


def _described(module: nn.Module) -> Iterator[Hashable]:
    for name, value in vars(module).items():
        if name in ("_parameters", "_buffers"):
            tensors = [(n, t if t is None else described(t)) for n, t in value.items()]
            yield name, tuple(tensors)
        elif name != "_modules" and not (isinstance(value, dict) and not value):
            yield name, described(value)


def described(value: Any) -> Hashable:
    """A key for a value, as far as code can tell it from others: plain ones by value, tensors by kind, others by id."""
    if isinstance(value, Tensor):
        return type(value), value.shape, value.dtype, value.device, axes_of(value)
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        return type(value), value
    if type(value) in (tuple, list):
        return type(value), tuple(map(described, value))
    if type(value) is set:
        return type(value), frozenset(map(described, value))
    return type(value), id(value)
