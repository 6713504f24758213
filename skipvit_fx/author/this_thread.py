"""Functions of the whole process that are another one in a single thread, for a while."""

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
"""Held by the thread that has something replaced."""

Place = tuple[Any, str]
"""A module or class, and the name of what is replaced in it."""

_ABSENT = object()


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


class _Here(threading.local):
    """What this thread does.

    Attributes:
        phase: a forward is ``"followed"``, or modules run that ``"stay"`` as they are; empty if it captures nothing.
        exporting: whether the forward is followed by ``torch.export``.
        checkpoints: of the forward that is followed.
        python, numpy: what random numbers are drawn from instead of the global generators.
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
    """``original``, but where this thread is in the phase of that name ``followed`` and ``stay``, if there are any."""

    @functools.wraps(original, updated=())
    def stand_in(*args: Any, **kwargs: Any) -> Any:
        other = {"followed": followed, "stay": stay}.get(here.phase)
        return (other or original)(*args, **kwargs)

    return stand_in


@contextlib.contextmanager
def during(phase: Phase) -> Iterator[None]:
    """Let this thread be in another phase."""
    before = here.phase
    here.phase = phase
    try:
        yield
    finally:
        here.phase = before


@contextlib.contextmanager
def replaced(replacements: dict[Place, Any]) -> Iterator[None]:
    """Put functions of :func:`only_here` in their places, and take them away again."""
    before = {place: vars(place[0]).get(place[1], _ABSENT) for place in replacements}
    try:
        for (owner, name), function in replacements.items():
            setattr(owner, name, function)
        yield
    finally:
        for (owner, name), original in before.items():
            if vars(owner).get(name) is not replacements[owner, name]:
                continue  # somebody else has put something there meanwhile
            if original is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, original)
