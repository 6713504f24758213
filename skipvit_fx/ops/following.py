"""Support of inserted modules for tools that trace a model: the tracers of ``torch.fx``, and ``torch.jit.trace``."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from skipvit_fx.torch_internals import is_in_fake_mode

Result = TypeVar("Result")
Function = TypeVar("Function", bound=Callable[..., Any])


def kept_whole(forward: Function) -> Function:
    """Decorate the ``forward`` of an inserted module, so that every tracer of ``torch.fx`` calls the module.

    A tracer that went through it would fail at decisions on sizes, and would freeze what may change later: the switch,
    the mode and the ratio.
    """

    @functools.wraps(forward)
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        tracer = _tracer_of(args)
        if tracer is None:
            return forward(self, *args, **kwargs)
        return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)

    return called  # type: ignore[return-value]


def recorded(function: Function) -> Function:
    """The same for an inserted function of positional arguments."""

    @functools.wraps(function)
    def called(*args: Any) -> Any:
        tracer = _tracer_of(args)
        if tracer is None:
            return function(*args)
        return tracer.create_proxy("call_function", called, args, {})

    return called  # type: ignore[return-value]


@recorded
def as_shape(*sizes: int) -> tuple[int, ...]:
    """All sizes as one value for a Python operator, for which a plain tuple would need concrete values in tracing."""
    return sizes


def _tracer_of(args: tuple[Any, ...]) -> Any:
    """The tracer, if any of the arguments is a proxy."""
    for arg in args:
        if isinstance(arg, fx.Proxy):
            return arg.tracer
    return None


def in_jit_trace() -> bool:
    """Whether ``torch.jit.trace``, or the ONNX exporter that builds on it, is tracing."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined,no-untyped-call]


def in_compilation() -> bool:
    """Whether ``torch.compile`` or ``torch.export`` is tracing: nothing can be run or captured meanwhile."""
    if torch.compiler.is_compiling():
        return True
    return is_in_fake_mode()


def quietly(function: Callable[..., Result], *args: Any) -> Result:
    """Call a function that decides by sizes. While ``torch.jit`` traces, these are tensors, and each decision warns.

    The compiler's decisions hold as long as the sizes of images do, and a trace is for one size.
    """
    if not in_jit_trace():
        return function(*args)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        return function(*args)


def sizes(x: Tensor) -> Sequence[int]:
    """The sizes of ``x`` as numbers, whatever tool is tracing."""
    return quietly(_numbers, x.shape) if in_jit_trace() else x.shape


def _numbers(values: Sequence[Any]) -> tuple[int, ...]:
    return tuple(int(value) for value in values)
