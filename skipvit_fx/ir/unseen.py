"""What a forward may do besides computing values, which a graph would lose: refused around attention.

Modules that run no attention are called as they are, so they may do all of it.
"""

from __future__ import annotations

import contextlib
import pickle
import random
import sys
import unittest.mock
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor

from skipvit_fx.errors import TraceError

_AS_WRITTEN = {
    (torch.autograd.Function, "apply"): "calls a torch.autograd.Function",
    (Tensor, "register_hook"): "hooks the gradient of a tensor",
}


@contextlib.contextmanager
def refuse_unseen() -> Iterator[None]:
    """While a forward is followed.

    Raises:
        TraceError: it draws random numbers in Python, which the graph would repeat for ever, or changes gradients.
    """
    before = _generators()
    try:
        with _replaced({place: _refusal(what) for place, what in _AS_WRITTEN.items()}):
            yield
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


def _refusal(what: str) -> Callable[..., NoReturn]:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise _lost(what)

    return refuse


# -- functions --------------------------------------------------------------------------------------------------------

_Place = tuple[Any, str]
_ORIGINALS: dict[_Place, Any] = {
    (owner, name): vars(owner)[name] for owner, name in _AS_WRITTEN if name in vars(owner)
}


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
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    return pickle.dumps(one) == pickle.dumps(other)  # which looks into NumPy's arrays
