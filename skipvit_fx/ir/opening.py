"""Capture a model, and look into more of its modules as long as that is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from torch import nn

from skipvit_fx.ir.capture import Capture, capture_symbolic

T = TypeVar("T")


class OpenModules(Exception):  # noqa: N818 - it asks for something, nothing is wrong
    """Leaf modules must be traced through before they can be judged."""

    def __init__(self, paths: Iterable[str]) -> None:
        self.paths = frozenset(paths)
        super().__init__(sorted(self.paths))


def with_capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    work: Callable[[Capture], T],
) -> T:
    """What ``work`` returns for a capture of ``model``.

    Where it raises :class:`OpenModules` instead, it gets a new capture in which these modules are open, too.

    Raises:
        TraceError: the model's Python code cannot be followed.
    """
    opened: frozenset[str] = frozenset()
    while True:
        capture = capture_symbolic(model, args, kwargs, opened)
        try:
            return work(capture)
        except OpenModules as leaves:
            if leaves.paths <= opened:
                raise
            opened |= leaves.paths
