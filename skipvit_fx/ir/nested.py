"""What an object holds, however nested."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from torch import Tensor, nn

_WHOLE = (bool, int, float, str, type(None), Tensor, nn.Module, ModuleType, type)
_DEEPEST = 6


def nested(thing: Any, depth: int = 0) -> Iterator[Any]:
    """The thing, and what it holds: elements, keys and values of containers, attributes of plain objects."""
    yield thing
    if depth > _DEEPEST or issubclass(type(thing), _WHOLE):
        return
    if isinstance(thing, dict):
        parts = [*dict.keys(thing), *dict.values(thing)]
    elif isinstance(thing, (list, tuple, set, frozenset, collections.deque)):
        parts = list(thing)
    else:
        parts = list(getattr(thing, "__dict__", {}).values())
    for part in parts:
        yield from nested(part, depth + 1)
