"""Capture a model, opening more of its modules for as long as this is requested."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from skipvit_fx.author.side_effects import contained
from skipvit_fx.capture.capture import Capture, capture
from skipvit_fx.capture.fakes import TracelessFakeMode
from skipvit_fx.errors import TraceError, UnsupportedModelError
from skipvit_fx.options import Frontend
from skipvit_fx.torch_internals import pytree

T = TypeVar("T")


class OpenModules(Exception):  # noqa: N818 - a request, not an error
    """Leaf modules must be traced through before they can be judged."""

    def __init__(self, paths: Iterable[str]) -> None:
        self.paths = frozenset(paths)
        super().__init__(sorted(self.paths))


def with_capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    work: Callable[[Capture], T],
    *,
    frontend: Frontend | Literal["auto"] = "auto",
) -> T:
    """Return what ``work`` returns for a capture of ``model``. One thread at a time.

    If it raises :class:`OpenModules` instead, it gets a new capture in which these modules are open, too. If ``"auto"``
    cannot trace the model symbolically, it exports it.

    Raises:
        TraceError: the model's Python code cannot be followed; under ``"auto"``, by neither front end.
        UnsupportedModelError: a module that ``work`` asked to open cannot be followed.
    """
    recorded = torch.is_grad_enabled()
    mode = TracelessFakeMode(model)
    # in inference mode operators could not be watched
    with _without_collecting(), torch.inference_mode(False), contained(model):
        args, kwargs = pytree.tree_map(_trackable, (args, dict(kwargs)))
        look = functools.partial(_opening, model, args, kwargs, work, mode, recorded)
        try:
            if frontend != "auto":
                return look(frontend, "it was asked for")
            try:
                return look("symbolic", "it is tried first")
            except TraceError as error:
                return _exported(look, error)
        except _ClosedModuleError as error:
            raise error.as_refusal() from error


@contextlib.contextmanager
def _without_collecting() -> Iterator[None]:
    """A pause of the garbage collector, which so many new objects set off again and again.

    It looks through all that the process has: a tenth of a rewrite where a few libraries are loaded.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _exported(look: Callable[[Frontend, str], T], symbolic: TraceError) -> T:
    """The second attempt of ``"auto"``; if it fails as well, the error is that of the first, with both reasons."""
    reason = f"symbolic tracing was refused: {symbolic.message}"
    try:
        return look("export", reason)
    except TraceError as export:
        symbolic.message = f"{symbolic.message}\n  torch.export was refused, too: {export.message}"
        raise symbolic from export
    except UnsupportedModelError as error:
        error.add_note(f"The model was captured by torch.export, because {reason}")
        raise


class _ClosedModuleError(TraceError):
    """A leaf module that must be opened cannot be."""

    def __init__(self, path: str, error: TraceError) -> None:
        super().__init__(error.message)
        self.path = path

    def as_refusal(self) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"this module may mix tokens, and what it computes cannot be followed: {self.message}",
            node=self.path.replace(".", "_"),
            module_path=self.path,
            hint="choose a plan that returns before this place or drops after it, or change the model there",
        )


def _trackable(leaf: Any) -> Any:
    """A tensor that autograd accepts, even if the example was made in inference mode."""
    return leaf.clone() if isinstance(leaf, Tensor) and leaf.is_inference() else leaf


def _opening(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    work: Callable[[Capture], T],
    mode: TracelessFakeMode,
    recorded: bool,
    frontend: Frontend,
    reason: str,
) -> T:
    opened = asked = frozenset[str]()
    with mode.surroundings.kept():
        while True:
            try:
                captured = capture(
                    model,
                    args,
                    kwargs,
                    frontend=frontend,
                    reason=reason,
                    mode=mode,
                    recorded=recorded,
                    also_open=opened,
                )
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
