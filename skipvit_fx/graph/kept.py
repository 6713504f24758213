"""What objects hold, however nested: a configuration, a table, a list of sizes. It is watched, as code may read it."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch.compiler import is_compiling

from skipvit_fx.author.nested import holds, nested

_PLAIN = (bool, int, float, str)

_MOST = 256
"""The largest container that is examined; a larger one holds data: names of classes, a vocabulary."""


class Contents:
    """What some containers hold, compared by identity and without a Python loop, as this runs in every call.

    Args:
        dicts: their keys and values are compared.
        rows: sequences and sets.
    """

    def __init__(self, dicts: Iterable[dict[Any, Any]], rows: Iterable[Any] = ()) -> None:
        self._dicts, self._rows = [*dicts], [*rows]
        self._then = self._now()

    def _now(self) -> list[Any]:
        values = map(dict.values, self._dicts)
        return [*itertools.chain.from_iterable((*self._dicts, *values, *self._rows))]

    def are_so(self) -> bool:
        """Whether nothing has been added, removed or replaced since."""
        now = self._now()
        return len(now) == len(self._then) and all(map(operator.is_, now, self._then))


class _Held(NamedTuple):
    """One container or object, and what it held.

    Attributes:
        container: a dict, or a sequence.
        keys, values: its keys and values, in order; a sequence has no keys.
    """

    container: Any
    keys: list[Any]
    values: list[Any]


class Kept:
    """What some objects hold at this moment.

    Args:
        roots: the objects.
    """

    def __init__(self, roots: Iterable[Any]) -> None:
        self._roots = [*roots]
        self._look()

    def _look(self) -> None:
        self._held = [*_containers(self._roots)]
        containers = [held.container for held in self._held]
        self._contents = Contents(
            (c for c in containers if isinstance(c, dict)),
            (c for c in containers if not isinstance(c, dict)),
        )

    def is_so(self) -> bool:
        """Whether they still hold the same; plain values are compared by value, all others by identity."""
        if is_compiling():
            return all(map(_is_so, self._held))
        if self._contents.are_so():
            return True
        so = all(map(_is_so, self._held))
        if so:  # some are equal, but other objects
            self._look()
        return so


def same(now: Any, then: Any) -> bool:
    """Whether two values are identical, or equal plain values, or equal containers of these."""
    if now is then:
        return True
    if type(now) is not type(then):
        return False
    if isinstance(then, _PLAIN):
        return bool(now == then)
    if isinstance(then, (list, tuple)):
        return len(now) == len(then) and all(map(same, now, then))
    if isinstance(then, (set, frozenset)):
        return bool(now == then)
    if isinstance(then, dict):
        return [*now] == [*then] and all(map(same, now.values(), then.values()))
    return False


def _is_so(held: _Held) -> bool:
    container, keys, values = held
    if isinstance(container, dict):
        return [*container] == keys and all(map(same, container.values(), values))
    return len(container) == len(values) and all(map(same, container, values))


def _containers(roots: Iterable[Any]) -> Iterator[_Held]:
    seen: dict[int, Any] = {}
    for root in roots:
        for part in nested(root):
            container = holds(part)
            if 0 < len(container) <= _MOST and id(container) not in seen:
                seen[id(container)] = container
                if isinstance(container, dict):
                    yield _Held(container, [*container], [*container.values()])
                else:
                    yield _Held(container, [], [*container])
