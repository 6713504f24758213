"""Decides whether an exception is the fault of the author's code or of this package. Nothing else decides this."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import CodeType, FrameType, TracebackType
from typing import NamedTuple

import torch
from torch import nn

from skipvit_fx.errors import SkipViTError, TraceError, first_line

_HANDED_ON = frozenset(
    {
        "__torch_dispatch__",
        "__torch_function__",
        "call_module",
        "create_arg",
        "create_node",
        "create_proxy",
        "run_node",
        "stand_in",
    }
)
"""Methods that torch calls in the middle of the author's code, and that call torch again on its behalf."""

_AUTHORS_CALL = "authors_method"
"""The function of :mod:`skipvit_fx.graph.nodes` that calls a method in the author's place: its frame does not count."""

_LIBRARIES = frozenset({"torch", "sympy", *sys.stdlib_module_names}) - {"__main__"}

_NOT_THE_AUTHORS = _LIBRARIES | {"skipvit_fx"}

_NEVER_REFUSED = (SkipViTError, MemoryError, torch.OutOfMemoryError)


class AuthorError(TraceError):
    """The model's own code raised while it was examined. ``__cause__`` is the exception itself."""


class author_code(contextlib.ContextDecorator):  # noqa: N801 - used like a function
    """Wraps one call of the model's own code, or of an operator that it called; nothing else belongs in the block.

    Exceptions of this package, and those that are not an :class:`Exception`, pass unchanged: they are crashes.

    Raises:
        AuthorError: the author's code raised, or torch did when that code called it; names exception, file and line.
    """

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not isinstance(error, Exception) or isinstance(error, _NEVER_REFUSED):
            return
        assert traceback is not None
        places = list(_places(traceback.tb_next))
        if _ours(places):
            return
        authors = [place for place in places if place.owner == "author"]
        where = f" ({authors[-1].file}:{authors[-1].line})" if authors else ""
        raise AuthorError(f"{type(error).__name__}: {first_line(error)}{where}") from error


class _Place(NamedTuple):
    """A line that was running when an exception was raised.

    Attributes:
        owner: ``"author"``, ``"module"`` for a module of one of torch's classes in the model, ``"us"``, or empty.
    """

    owner: str
    function: str
    file: str
    line: int


def _places(traceback: TracebackType | None) -> Iterator[_Place]:
    """Outermost first."""
    while traceback is not None:
        frame = traceback.tb_frame
        code = frame.f_code
        if code.co_name != _AUTHORS_CALL:
            yield _Place(_owner(frame), code.co_name, code.co_filename, traceback.tb_lineno)
        traceback = traceback.tb_next


def is_authors(frame: FrameType) -> bool:
    """Whether ``frame`` runs the author's code, rather than that of this package, of torch or of Python."""
    return _owner(frame) == "author"


def author_frames(within: CodeType) -> Iterator[FrameType]:
    """The frames of the author's code that are running, innermost first, up to the one that runs ``within``."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not within:
        if _package(frame) not in _NOT_THE_AUTHORS:
            yield frame
        frame = frame.f_back


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _owner(frame: FrameType) -> str:
    package = _package(frame)
    if package == "skipvit_fx":
        return "us"
    if package not in _LIBRARIES:
        return "author"
    return "module" if isinstance(frame.f_locals.get("self"), nn.Module) else ""


def _ours(places: list[_Place]) -> bool:
    """Whether this package raised, or called what raised; the block itself counts as the author's call."""
    if places and places[-1].owner == "us":
        return True
    owners = [
        place.owner
        for place in places
        if place.owner and not (place.owner == "us" and place.function in _HANDED_ON)
    ]
    return bool(owners) and owners[-1] == "us"
