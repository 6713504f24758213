"""What an object holds, however nested."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn

_WHOLE = (bool, int, float, str, type(None), Tensor, nn.Parameter, nn.Module, ModuleType, type)
_SEQUENCES = (list, tuple, set, frozenset, collections.deque)
_DEEPEST = 6


def nested(thing: Any, depth: int = 0) -> Iterator[Any]:
    """The thing and what it holds: elements, keys and values of containers, attributes of plain objects."""
    yield thing
    if depth > _DEEPEST:
        return
    container = holds(thing)
    parts = [*dict.keys(container)] if isinstance(thing, dict) else []
    parts += [*dict.values(container)] if isinstance(container, dict) else [*container]
    for part in parts:
        yield from nested(part, depth + 1)


def holds(thing: Any) -> Any:
    """The container that a thing is, or that holds its attributes; an empty one if it is taken as a whole."""
    kind = type(thing)
    if kind in _WHOLE or issubclass(kind, _WHOLE):  # most are the former, which is faster to see
        return ()
    if isinstance(thing, (dict, *_SEQUENCES)):
        return thing
    return getattr(thing, "__dict__", {})


def functions_in(thing: Any) -> Iterator[FunctionType]:
    """A function, or that of a property, and all that it wraps; nothing for anything else."""
    inner = thing.fget if isinstance(thing, property) else thing
    while isinstance(inner, FunctionType):
        yield inner
        inner = getattr(inner, "__wrapped__", None)
