"""Random numbers that a forward draws in its Python code: refused, or drawn from generators of their own."""

from __future__ import annotations

import contextlib
import functools
import random
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

import torch

from skipvit_fx.author.code import is_authors
from skipvit_fx.author.this_thread import Replaceable, during, here, only_here
from skipvit_fx.errors import TraceError
from skipvit_fx.torch_internals import TorchDispatchMode, pytree


def lost(what: str) -> TraceError:
    """The error for a side effect of a forward."""
    return TraceError(
        f"the model {what} around attention, which a graph does not show",
        hint="move it into a module that runs no attention; such modules stay as they are",
    )


def _drawn(libraries: str) -> TraceError:
    return lost(f"draws random numbers from {libraries} in its Python code")


def _refuse(library: str) -> Callable[..., NoReturn]:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise _drawn(library)

    return refuse


def draws() -> dict[Replaceable, Any]:
    """Functions that use or set a global generator: refused in a forward that is followed, made harmless elsewhere."""
    return _torch_seeds() | _python_functions() | _numpy_functions()


def _torch_seeds() -> dict[Replaceable, Any]:
    def seed(*args: Any) -> Any:
        return torch.default_generator

    return {
        (owner, name): only_here(vars(owner)[name], _refuse("torch"), seed)
        for owner in (torch, torch.random)
        for name in ("manual_seed", "seed", "set_rng_state")
    }


def _python_functions() -> dict[Replaceable, Any]:
    """The functions of ``random``, and the methods beneath them, with which an author's generators draw, too."""
    shared: Any = random.random.__self__  # type: ignore[attr-defined]

    def method(name: str) -> Callable[..., Any]:
        original = getattr(random.Random, name)

        def followed(generator: random.Random, *args: Any) -> Any:
            if _asked_by_author(sys._getframe(2)):
                raise _drawn("random")
            return original(generator, *args)

        def stay(generator: random.Random, *args: Any) -> Any:
            return original(here.python if generator is shared else generator, *args)

        return only_here(original, followed, stay)

    def apart(name: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(here.python, name)(*args, **kwargs)

    functions = {
        (random, name): only_here(function, _refuse("random"), functools.partial(apart, name))
        for name, function in vars(random).items()
        if getattr(function, "__self__", None) is shared and name != "getstate"
    }
    return {**functions, **{(random.Random, n): method(n) for n in ("random", "getrandbits")}}


def _asked_by_author(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_globals.get("__name__") == "random":
        frame = frame.f_back
    return frame is not None and is_authors(frame)


def _numpy_functions() -> dict[Replaceable, Any]:
    module: Any = sys.modules.get("numpy.random")
    if module is None:
        return {}
    shared = module.random_sample.__self__
    default_rng = module.default_rng

    def apart(name: str, *args: Any, **kwargs: Any) -> Any:
        if here.numpy is None:
            here.numpy = module.RandomState(0)
        return getattr(here.numpy, name)(*args, **kwargs)

    def seeded(seed: Any = None) -> Any:
        if seed is None:
            raise _drawn("numpy.random")
        return default_rng(seed)

    methods = {
        name: name
        for name, function in vars(module).items()
        if getattr(function, "__self__", None) is shared and name != "get_state"
    }
    aliases = {"seed": "seed", "sample": "random_sample", "ranf": "random_sample"}
    functions = {
        (module, name): only_here(
            vars(module)[name], _refuse("numpy.random"), functools.partial(apart, method)
        )
        for name, method in {**methods, **aliases}.items()
    }
    return {**functions, (module, "default_rng"): only_here(default_rng, seeded)}


class RefuseDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses torch's random operators in a forward that is followed, unless they become nodes."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if here.phase == "followed" and torch.Tag.nondeterministic_seeded in func.tags:
            raise _drawn("torch")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def draws_undone() -> Iterator[list[str]]:
    """Undo draws that bypassed all replacements, through a function kept elsewhere; the generator states show them.

    This is done only without other threads, which could have drawn as well.

    Yields:
        A list that on leaving holds the libraries whose generators had changed.
    """
    before = _generators() if threading.active_count() == 1 else {}
    drawn: list[str] = []
    try:
        yield drawn
    finally:
        if before and threading.active_count() == 1:
            now = _generators()
            drawn += [name for name, state in before.items() if not _same(state, now[name])]
            with during(""):
                _restore({name: before[name] for name in drawn})


@contextlib.contextmanager
def nothing_drawn() -> Iterator[None]:
    """The same for a forward that is followed.

    Raises:
        TraceError: something was drawn.
    """
    with draws_undone() as drawn:
        yield
    if drawn:
        raise _drawn(" and ".join(drawn))


def _generators() -> dict[str, Any]:
    """States of the global generators by library, except for accelerators, where tracing computes nothing."""
    states: dict[str, Any] = {"random": random.getstate(), "torch": torch.get_rng_state()}
    numpy: Any = sys.modules.get("numpy.random")
    return states if numpy is None else states | {"numpy.random": numpy.get_state()}


def _restore(states: dict[str, Any]) -> None:
    restore: dict[str, Callable[[Any], None]] = {
        "random": random.setstate,
        "torch": torch.set_rng_state,
        "numpy.random": lambda state: sys.modules["numpy.random"].set_state(state),
    }
    for name, state in states.items():
        restore[name](state)


def _same(one: Any, other: Any) -> bool:
    pairs = zip(pytree.tree_leaves(one), pytree.tree_leaves(other), strict=True)
    return all(bool((a == b).all()) if hasattr(a, "all") else a == b for a, b in pairs)
