"""The caching functions (``functools.lru_cache``) that a model's code may call."""

from __future__ import annotations

import functools
import inspect
import sys
import weakref
from collections.abc import Iterator
from typing import Any, TypeAlias

from torch import nn

from skipvit_fx.author.nested import functions_in, nested
from skipvit_fx.author.referrers import referrers_of

Cached: TypeAlias = "functools._lru_cache_wrapper[Any]"

_SPARED = frozenset({"torch", "sympy"}) | sys.stdlib_module_names
"""Packages whose caches never see a tensor of a model."""


class _Imported:
    """The caching functions that existed when modules were last imported.

    Searching all objects takes a tenth of a rewrite or more, so it is done once per import.
    """

    def __init__(self) -> None:
        self._modules = 0
        self._found: list[weakref.ref[Cached]] = []

    def __iter__(self) -> Iterator[Cached]:
        if len(sys.modules) != self._modules:
            self._modules = len(sys.modules)
            referrers = referrers_of(functools._lru_cache_wrapper)
            self._found = [weakref.ref(found) for found in referrers if _is_cache(found)]
        for found in self._found:
            if (cache := found()) is not None:
                yield cache


_imported = _Imported()


def caches_of(model: nn.Module) -> list[Cached]:
    """Those of all imported modules, and those made since then in reach of the model's classes and attributes."""
    known = {id(cache): cache for cache in (*_imported, *_in_reach(model))}
    return [
        cache
        for cache in known.values()
        if (cache.__module__ or "").partition(".")[0] not in _SPARED
    ]


def _in_reach(model: nn.Module) -> Iterator[Cached]:
    """Caches in attributes of modules, however nested, and in the namespaces that methods of their classes see."""
    names: dict[int, dict[str, Any]] = {}
    for module in model.modules():
        for value in vars(module).values():
            yield from filter(_is_cache, nested(value))
        for kind in type(module).__mro__:
            if kind.__module__.partition(".")[0] not in _SPARED and id(kind) not in names:
                own = vars(kind).items()
                names[id(kind)] = {name: getattr(value, "__func__", value) for name, value in own}
                for value in vars(kind).values():
                    names |= {id(seen): seen for seen in _seen_by(value)}
    for seen in names.values():
        yield from filter(_is_cache, seen.values())


def _seen_by(method: Any) -> Iterator[dict[str, Any]]:
    for function in functions_in(getattr(method, "__func__", method)):
        yield function.__globals__
        if function.__closure__:
            yield dict(inspect.getclosurevars(function).nonlocals)


def _is_cache(thing: Any) -> bool:
    return type(thing) is functools._lru_cache_wrapper
