"""Capture a model, and look into more of its modules as long as that is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from skipvit_fx.errors import TraceError, UnsupportedModelError
from skipvit_fx.ir.capture import Capture, Frontend, capture
from skipvit_fx.ir.fakes import TracelessFakeMode

T = TypeVar("T")


class OpenModules(Exception):  # noqa: N818 - it asks for something, nothing is wrong
    """Leaf modules must be traced through before they can be judged."""

    def __init__(self, paths: Iterable[str]) -> None:
        self.paths = frozenset(paths)
        super().__init__(sorted(self.paths))


@torch.inference_mode(False)  # in which no operator could be watched
def with_capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    work: Callable[[Capture], T],
    *,
    frontend: Frontend | Literal["auto"] = "auto",
) -> T:
    """What ``work`` returns for a capture of ``model``.

    Where it raises :class:`OpenModules` instead, it gets a new capture in which these modules are open, too. Where
    ``"auto"`` cannot trace the model symbolically, it is exported.

    Raises:
        TraceError: the model's Python code cannot be followed.
        UnsupportedModelError: that of a module cannot, which ``work`` wants to look into.
    """
    mode = TracelessFakeMode()
    args, kwargs = pytree.tree_map(_trackable, (args, dict(kwargs)))
    failures: list[TraceError] = []
    attempts: tuple[Frontend, ...] = ("symbolic", "export") if frontend == "auto" else (frontend,)
    for attempt in attempts:
        try:
            with mode.surroundings.kept():
                return _opening(model, args, kwargs, work, attempt, mode)
        except TraceError as error:
            failures.append(error)
    raise failures[0].as_refusal() if isinstance(failures[0], _ClosedModuleError) else failures[0]


class _ClosedModuleError(TraceError):
    """A leaf module that must be looked into cannot be."""

    def __init__(self, path: str, error: TraceError) -> None:
        super().__init__(str(error.args[0]))
        self.path = path

    def as_refusal(self) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"this module may mix tokens, and what it computes cannot be followed: {self.args[0]}",
            node=self.path.replace(".", "_"),
            module_path=self.path,
            hint="choose a plan that returns before this place or drops after it, or change the model there",
        )


def _trackable(leaf: Any) -> Any:
    """A tensor that autograd may see, also if the example was made in inference mode."""
    return leaf.clone() if isinstance(leaf, Tensor) and leaf.is_inference() else leaf


def _opening(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    work: Callable[[Capture], T],
    frontend: Frontend,
    mode: TracelessFakeMode,
) -> T:
    opened = asked = frozenset[str]()
    while True:
        try:
            captured = capture(model, args, kwargs, frontend=frontend, mode=mode, also_open=opened)
        except TraceError as error:
            if not asked:
                raise
            raise _ClosedModuleError(min(asked), error) from error
        try:
            return work(captured)
        except OpenModules as leaves:
            if leaves.paths <= opened:
                raise
            asked = leaves.paths
            opened |= asked
