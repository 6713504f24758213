"""Process-wide functions that are replaced in a single thread, for a while."""

from __future__ import annotations

import contextlib
import functools
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

Phase = Literal["", "stay", "followed"]

LOCK = threading.RLock()
"""Held by the thread that has replaced something."""

Replaceable = tuple[Any, str]
"""A module or class, and the name of what is replaced in it."""

_ABSENT = object()


@dataclass
class Checkpoints:
    """The checkpoints with which a followed forward recomputes activations.

    Attributes:
        count: the number of calls of ``torch.utils.checkpoint`` so far.
        current: the number of the outermost running one, or None.
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


class _Here(threading.local):
    """What this thread is doing.

    Attributes:
        phase: ``"followed"`` for a forward that is traced, ``"stay"`` for modules that stay as they are, else empty.
        exporting: whether ``torch.export`` follows the forward.
        checkpoints: those of the forward that is followed.
        python, numpy: generators used instead of the global ones.
    """

    phase: Phase = ""
    exporting = False
    checkpoints: Checkpoints
    python: random.Random
    numpy: Any = None


here = _Here()


def only_here(
    original: Callable[..., Any],
    followed: Callable[..., Any] | None = None,
    stay: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """``original``, replaced by ``followed`` or ``stay``, if given, while this thread is in the phase of that name."""

    @functools.wraps(original, updated=())
    def stand_in(*args: Any, **kwargs: Any) -> Any:
        other = {"followed": followed, "stay": stay}.get(here.phase)
        return (other or original)(*args, **kwargs)

    return stand_in


@contextlib.contextmanager
def during(phase: Phase) -> Iterator[None]:
    """Put this thread into another phase."""
    before = here.phase
    here.phase = phase
    try:
        yield
    finally:
        here.phase = before


@contextlib.contextmanager
def replaced(replacements: dict[Replaceable, Any]) -> Iterator[None]:
    """Put functions of :func:`only_here` in their places, and remove them again."""
    before = {place: vars(place[0]).get(place[1], _ABSENT) for place in replacements}
    try:
        for (owner, name), function in replacements.items():
            setattr(owner, name, function)
        yield
    finally:
        for (owner, name), original in before.items():
            if vars(owner).get(name) is not replacements[owner, name]:
                continue  # something else was put there meanwhile
            if original is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, original)
