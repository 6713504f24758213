"""What a forward may do besides computing values, which a graph would lose: refused around attention.

Modules that run no attention are called as they are, so they may do all of it.
"""

from __future__ import annotations

import contextlib
import random
import sys
import unittest.mock
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointFunction, checkpoint

from skipvit_fx.errors import TraceError


@dataclass
class Checkpoints:
    """Where a forward that is followed recomputes its activations.

    Attributes:
        count: how many calls of ``torch.utils.checkpoint`` there were so far.
        current: number of the outermost that runs, or None.
    """

    count: int = 0
    current: int | None = None
    _depth: int = 0

    def enter(self) -> None:
        if not self._depth:
            self.current = self.count
            self.count += 1
        self._depth += 1

    def leave(self) -> None:
        self._depth -= 1
        if not self._depth:
            self.current = None


@contextlib.contextmanager
def refuse_unseen() -> Iterator[Checkpoints]:
    """While a forward is followed.

    Yields:
        What is not refused: the checkpoints that it makes.

    Raises:
        TraceError: it draws random numbers in Python, which the graph would repeat for ever, or changes gradients.
    """
    before = _generators()
    checkpoints = Checkpoints()
    try:
        with _replaced(_while_followed(checkpoints)):
            yield checkpoints
        drawn = [name for name, state in _generators().items() if not _same(state, before[name])]
    finally:
        _restore(before)
    if drawn:
        raise _lost(f"draws random numbers from {' and '.join(drawn)} in its Python code")


@contextlib.contextmanager
def unseen_allowed() -> Iterator[None]:
    """While a module that stays as it is runs, for what its results look like."""
    before = _generators()
    try:
        with _replaced(_ORIGINALS):
            yield
    finally:
        _restore(before)


def _lost(what: str) -> TraceError:
    return TraceError(
        f"the model {what} around attention, which a graph does not show",
        hint="move it into a module that runs no attention; such modules stay as they are",
    )


# -- functions --------------------------------------------------------------------------------------------------------

_Place = tuple[Any, str]
_ORIGINALS: dict[_Place, Any] = {
    (owner, name): vars(owner)[name]
    for owner, name in (
        (torch.autograd.Function, "apply"),
        (Tensor, "register_hook"),
        (saved_tensors_hooks, "__enter__"),
        (saved_tensors_hooks, "__exit__"),
    )
}


def _while_followed(checkpoints: Checkpoints) -> dict[_Place, Any]:
    """What stands in for the originals."""

    def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
        if function is not CheckpointFunction:
            raise _lost("calls a torch.autograd.Function")
        run, _, *arguments = args
        checkpoints.enter()
        result = run(*arguments)
        checkpoints.leave()
        return result

    def register_hook(tensor: Tensor, hook: Any) -> NoReturn:
        raise _lost("hooks the gradient of a tensor")

    def enter(hooks: saved_tensors_hooks) -> None:
        if type(hooks).__module__ != checkpoint.__module__:
            raise _lost("saves tensors for its backward pass in a way of its own")
        checkpoints.enter()

    def leave(hooks: saved_tensors_hooks, *error: Any) -> None:
        checkpoints.leave()

    return dict(zip(_ORIGINALS, (classmethod(apply), register_hook, enter, leave), strict=True))


@contextlib.contextmanager
def _replaced(functions: dict[_Place, Any]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for (owner, name), function in functions.items():
            stack.enter_context(unittest.mock.patch.object(owner, name, function))
        yield


# -- generators -------------------------------------------------------------------------------------------------------


def _generators() -> dict[str, Any]:
    """States of the global ones by library, but for those of accelerators, where tracing computes nothing."""
    states: dict[str, Any] = {"random": random.getstate(), "torch": torch.get_rng_state()}
    numpy = sys.modules.get("numpy")
    return states if numpy is None else states | {"numpy.random": numpy.random.get_state()}


def _restore(states: dict[str, Any]) -> None:
    random.setstate(states["random"])
    torch.set_rng_state(states["torch"])
    if "numpy.random" in states:
        sys.modules["numpy"].random.set_state(states["numpy.random"])


def _same(one: Any, other: Any) -> bool:
    pairs = zip(pytree.tree_leaves(one), pytree.tree_leaves(other), strict=True)
    return all(bool((a == b).all()) if hasattr(a, "all") else a == b for a, b in pairs)
