"""Tables that an author's code keeps outside any module, in every place that Python has for one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from support import caching_elsewhere

BY_COUNT: dict[int, Tensor] = {}
RECENT: list[Tensor] = []
LATEST: Tensor | None = None
STARTED = False


def make(x: Tensor) -> Tensor:
    """A factor for every channel."""
    return torch.linspace(0.5, 1.5, x.shape[-1], device=x.device, dtype=x.dtype)


def in_a_dict(x: Tensor) -> Tensor:
    if "table" not in BY_COUNT:
        BY_COUNT["table"] = make(x)  # type: ignore[index]
    return x * BY_COUNT["table"]  # type: ignore[index]


def in_a_dict_by_count(x: Tensor) -> Tensor:
    count = x.shape[-1]
    if count not in BY_COUNT:
        BY_COUNT[count] = make(x)
    return x * BY_COUNT[count]


def in_a_list(x: Tensor) -> Tensor:
    if not RECENT:
        RECENT.append(make(x))
    return x * RECENT[0]


def in_a_global(x: Tensor) -> Tensor:
    global LATEST
    if LATEST is None:
        LATEST = make(x)
    return x * LATEST


def in_a_new_global(x: Tensor) -> Tensor:
    global NEW
    if "NEW" not in globals():
        NEW = make(x)
    return x * NEW


def in_a_default(x: Tensor, table: dict[str, Tensor] = {}) -> Tensor:  # noqa: B006
    if "table" not in table:
        table["table"] = make(x)
    return x * table["table"]


def in_an_attribute(x: Tensor) -> Tensor:
    kept: Any = in_an_attribute
    if not hasattr(kept, "table"):
        kept.table = make(x)
    return x * kept.table


class Tables:
    """A class, and an object of it."""

    table: Tensor | None = None

    def __init__(self) -> None:
        self.own: dict[str, list[Tensor]] = {"tables": []}


TABLES = Tables()


def in_a_class(x: Tensor) -> Tensor:
    if Tables.table is None:
        Tables.table = make(x)
    return x * Tables.table


def in_an_object(x: Tensor) -> Tensor:
    tables = TABLES.own["tables"]
    if not tables:
        tables.append(make(x))
    return x * tables[0]


def _closing() -> Callable[[Tensor], Tensor]:
    table: Tensor | None = None

    def in_a_closure(x: Tensor) -> Tensor:
        nonlocal table
        if table is None:
            table = make(x)
        return x * table

    return in_a_closure


in_a_closure = _closing()


@functools.lru_cache
def _cached(channels: int) -> Tensor:
    return torch.linspace(0.5, 1.5, channels)


def in_functools(x: Tensor) -> Tensor:
    return x * _cached(x.shape[-1])


def elsewhere(x: Tensor) -> Tensor:
    return caching_elsewhere.times_table(x)


PLACES: list[Callable[[Tensor], Tensor]] = [
    in_a_dict,
    in_a_dict_by_count,
    in_a_list,
    in_a_global,
    in_a_new_global,
    in_a_default,
    in_an_attribute,
    in_a_class,
    in_an_object,
    in_a_closure,
    in_functools,
    elsewhere,
]


def clear() -> None:
    """Forget every table."""
    global LATEST
    BY_COUNT.clear()
    RECENT.clear()
    LATEST = Tables.table = None
    globals().pop("NEW", None)
    in_a_default.__defaults__[0].clear()  # type: ignore[index]
    vars(in_an_attribute).clear()
    TABLES.own["tables"].clear()
    in_a_closure.__closure__[0].cell_contents = None  # type: ignore[index]
    _cached.cache_clear()
    caching_elsewhere.TABLES.clear()


def tables() -> list[Any]:
    """Every table that is kept."""
    found = [*BY_COUNT.values(), *RECENT, LATEST, globals().get("NEW"), Tables.table]
    found += [*in_a_default.__defaults__[0].values(), *vars(in_an_attribute).values()]  # type: ignore[index]
    found += [*TABLES.own["tables"], in_a_closure.__closure__[0].cell_contents]  # type: ignore[index]
    found += list(caching_elsewhere.TABLES.values())
    if _cached.cache_info().currsize:
        found.append(_cached(32))
    return [table for table in found if table is not None]
