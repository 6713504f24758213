"""What the author's code asks of tensors and torch while its forward is followed: who asks, and what to answer."""

from __future__ import annotations

import builtins
import contextlib
import contextvars
import dis
import functools
import linecache
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from types import CodeType, FrameType
from typing import Any

import torch

from skipvit_fx.author.this_thread import replaced
from skipvit_fx.errors import TraceError
from skipvit_fx.ops.guard import kind_of
from skipvit_fx.torch_internals import FakeTensor, FunctionalTensor

_LONGEST = 80
"""The most characters of a source line in a message."""

OF_GRADIENTS = frozenset({"grad", "grad_fn", "is_inference", "is_leaf", "requires_grad"})
"""Attributes and methods of a tensor that tell whether a call records gradients, which differs between calls."""


def not_known_before_training(asked: str | None) -> TraceError:
    """The error for code that asks for one of :data:`OF_GRADIENTS`."""
    return TraceError(
        f"the model's Python code asks for {asked!r} of a tensor, which is not known before training",
        hint="move the branch into a module that runs no attention",
    )


# -- who asks ---------------------------------------------------------------------------------------------------------


def author_frame() -> FrameType:
    """The innermost frame that runs neither torch's code nor this package's."""
    frame = sys._getframe(1)
    while _of_a_library(frame) and frame.f_back is not None:
        frame = frame.f_back
    return frame


def asked_by_a_library(frame: FrameType, *, but: tuple[str, ...] = ()) -> bool:
    """Whether a frame runs torch's code or this package's, except for the modules ``but``."""
    return _of_a_library(frame) and frame.f_globals["__name__"] not in but


def _of_a_library(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).partition(".")[0] in ("torch", "skipvit_fx")


def place_of(frame: FrameType) -> str:
    """The line that a frame is at, in words. It has no line number, which differs between versions of a file."""
    return spelled_place(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_qualname)


def spelled_place(file: str, line: int, function: str) -> str:
    """A line of source and the function that it is in."""
    code = textwrap.shorten(linecache.getline(file, line), _LONGEST, placeholder=" ...")
    return f"`{code}` in {function}" if code else function


def compares_identity(frame: FrameType) -> bool:
    """Whether the function of a frame asks ``a is b`` for anything but None: a proxy cannot answer that."""
    return any(
        step.opname == "IS_OP" and not (before.opname == "LOAD_CONST" and before.argval is None)
        for before, step in pairwise(dis.get_instructions(frame.f_code))
    )


_COMPARED_SOON = 4
_COMPARISONS = ("COMPARE_OP", "CONTAINS_OP", "IS_OP")


def compares_class(code: CodeType) -> bool:
    """Whether a function compares ``x.__class__`` for anything but ``self``: a fake tensor returns its own class."""
    steps = list(dis.get_instructions(code))
    return any(
        step.argval == "__class__"
        and before.argval != "self"
        and any(later.opname in _COMPARISONS for later in steps[i + 2 : i + 2 + _COMPARED_SOON])
        for i, (before, step) in enumerate(pairwise(steps))
        if step.opname == "LOAD_ATTR"
    )


_ASKING = ("isinstance", "getattr", "__instancecheck__")


@functools.lru_cache(maxsize=4096)
def asks_class(code: CodeType, at: int) -> bool:
    """Whether Python asks for a class in the instruction at this offset. Otherwise C++ does, and unpacks tensors.

    For instance, ``torch.pow(x, 2)`` asks whether ``x`` is a zero-dimensional tensor, which could pass as a number.
    """
    steps = list(dis.get_instructions(code))
    now = next(i for i, step in enumerate(steps) if step.offset == at)
    if steps[now].opname == "MATCH_CLASS" or steps[now].argval == "__class__":
        return True
    called = _called(steps, now)
    return called in _ASKING if called else any(name in code.co_names for name in _ASKING)


def _called(steps: list[dis.Instruction], call: int) -> str:
    """The name of the function that an instruction calls, which begins where the call begins; empty if unknown."""
    whole = steps[call].positions
    if whole is None or whole.lineno is None:
        return ""
    for step in reversed(steps[:call]):
        part = step.positions
        begins = part is not None and part[::2] == whole[::2]
        if begins and step.opname.startswith("LOAD") and part != whole:
            return str(step.argval)
    return ""


# -- type(x) ----------------------------------------------------------------------------------------------------------


class _Followed(type):
    """Lets :class:`followed_type` stand in for ``type`` wherever it is named."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs:
            return builtins.type(*args, **kwargs)
        found = builtins.type(args[0])
        if found in (FakeTensor, FunctionalTensor):
            return kind_of(args[0])
        if issubclass(found, torch.fx.Proxy):
            return args[0].__class__
        if found in _NUMBERS:
            return _NUMBERS[found]
        return cls if found is builtins.type else found

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, builtins.type)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, builtins.type)

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is builtins.type

    def __hash__(cls) -> int:
        return hash(builtins.type)


class followed_type(builtins.type, metaclass=_Followed):  # noqa: N801 - it is ``type``
    """``type``, except that a stand-in for a tensor gets the answer for the tensor itself."""


_NUMBERS: dict[type, type] = {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}


def followed_isinstance(thing: object, kinds: Any) -> bool:
    """``isinstance``, except that a symbolic size counts as a number."""
    if type(thing) in _NUMBERS and issubclass(_NUMBERS[type(thing)], kinds):
        return True
    return isinstance(thing, kinds)


TYPE_QUESTIONS: dict[str, Any] = {"isinstance": followed_isinstance, "type": followed_type}
"""The stand-in for the builtin of this name in the author's code."""

# -- modes of torch ---------------------------------------------------------------------------------------------------

_MODES = (
    "is_grad_enabled",
    "is_inference_mode_enabled",
    "is_autocast_enabled",
    "is_autocast_cpu_enabled",
    "get_autocast_dtype",
    "get_autocast_cpu_dtype",
    "get_autocast_gpu_dtype",
)


@dataclass
class Recorded:
    """Whether a call records gradients: what the author's code is told while it is followed.

    Attributes:
        told: the answer.
        asked: the modes, train (true) and eval (false), in which it asked.
    """

    told: bool
    asked: set[bool] = field(default_factory=set)

    def is_so(self, *, training: bool) -> bool:
        """Whether a call made now would get the same answer."""
        return training not in self.asked or torch.is_grad_enabled() == self.told


_followed: contextvars.ContextVar[tuple[Recorded, bool] | None] = contextvars.ContextVar(
    "followed", default=None
)


def _answered(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def ask(*args: Any, **kwargs: Any) -> Any:
        followed, frame = _followed.get(), sys._getframe(1)
        if followed is not None and not asked_by_a_library(frame):
            recorded, training = followed
            if function.__name__ == "is_grad_enabled":
                recorded.asked.add(training)
                return function() and recorded.told
            raise TraceError(
                f"the model calls torch.{function.__name__}() around attention, in {place_of(frame)}; the answer may "
                "change from call to call",
                hint="move the branch into a module that runs no attention; such modules stay as they are",
            )
        return function(*args, **kwargs)

    return ask


STAND_INS: dict[Any, Callable[..., Any]] = {
    getattr(torch, name): _answered(getattr(torch, name)) for name in _MODES if hasattr(torch, name)
}
"""The stand-in for a function of torch, under any name in the author's code."""


@contextlib.contextmanager
def modes_asked(recorded: Recorded, *, training: bool) -> Iterator[None]:
    """A context in which the author's code is followed and may ask for torch's modes: a graph runs in any of them.

    Args:
        recorded: the answer if it asks about gradients; it notes that it was asked.
        training: whether it is followed in train mode.

    Raises:
        TraceError: it asks for another mode outside :func:`modes_allowed`.
    """
    asked = {(torch, function.__name__): ask for function, ask in STAND_INS.items()}
    token = _followed.set((recorded, training))
    try:
        with replaced(asked):
            yield
    finally:
        _followed.reset(token)


@contextlib.contextmanager
def modes_allowed() -> Iterator[None]:
    """A context for running a module that stays as it is."""
    token = _followed.set(None)
    try:
        yield
    finally:
        _followed.reset(token)
