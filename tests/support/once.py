"""What several tests start from, such as a model and its rewrite, is made once per process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def made_once(make: Callable[P, T]) -> Callable[P, T]:
    """``make``, run once for the same arguments: whoever calls it gets a deep copy of what it made."""
    made: Any = cache(make)

    @wraps(make)
    def copied(*args: P.args, **kwargs: P.kwargs) -> T:
        result: T = copy.deepcopy(made(*args, **kwargs))
        return result

    return copied
