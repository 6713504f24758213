"""All process-wide changes made while a model is examined: one thread at a time, visible to that thread only.

In a forward that is followed, side effects that a graph would lose are refused. Modules that stay as they are may have
them, and then run on fake tensors. In other threads every function is unchanged.

``torch.fx`` and ``torch.export`` make changes as well. Replacements by the former are hidden from other threads, too.
For the latter, other threads do not see that it is compiling, and it does not switch off backend kernels, which no
operator in its graph would use. Only ``max``, ``min`` and ``math.pow`` become functions that do the same to numbers.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import logging
import random
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointFunction, checkpoint

from skipvit_fx.author.draws import RefuseDraws, draws, draws_undone, lost, nothing_drawn
from skipvit_fx.author.this_thread import (
    LOCK,
    Checkpoints,
    Replaceable,
    during,
    here,
    only_here,
    replaced,
)
from skipvit_fx.errors import TraceError
from skipvit_fx.torch_internals import DTYPE_OF_MASK, KEEPS_ARGUMENTS, pytree, symbolic_trace_module

FACTORIES = (
    "arange",
    "empty",
    "eye",
    "finfo",
    "full",
    "iinfo",
    "linspace",
    "ones",
    "rand",
    "randn",
    "tensor",
    "zeros",
)
"""Functions of sizes and dtypes: torch does not dispatch them on proxies, so they are recorded explicitly."""


@contextlib.contextmanager
def contained(model: nn.Module) -> Iterator[None]:
    """A context in which copies of ``model`` run on fake tensors in this thread. It is reentrant.

    Global random generators are neither used nor set, and ``nn.MultiheadAttention`` does not run its inference kernel,
    which hides the attention in one operator.
    """
    if here.phase:
        with draws_undone():
            yield
        return
    with (
        LOCK,  # first: the originals must not be another thread's replacements
        replaced(_replacements(model)),
        draws_undone(),
        _no_autocast_cache(),
        during("stay"),
    ):
        here.python, here.numpy = random.Random(0), None
        yield


@contextlib.contextmanager
def followed(*, exporting: bool) -> Iterator[Checkpoints]:
    """A context in which a forward is followed, within :func:`contained`.

    Args:
        exporting: whether ``torch.export`` follows it; its graphs show random operators and autocast.

    Yields:
        The checkpoints that it makes, which are not refused.

    Raises:
        TraceError: it draws random numbers in Python, which the graph would repeat forever, or changes gradients.
    """
    here.checkpoints, here.exporting = Checkpoints(), exporting
    aside = replaced(_exporting()) if exporting else RefuseDraws()  # type: ignore[no-untyped-call]
    with aside, nothing_drawn(), during("followed"):
        yield here.checkpoints


@contextlib.contextmanager
def stays_as_it_is() -> Iterator[None]:
    """A context for a module that stays as it is, within a forward that is followed."""
    with during("stay"):
        yield


def lost_context(context: str) -> TraceError:
    """The error for a forward that works under ``context``."""
    return TraceError(
        f"the model runs attention, or what leads to it, under {context}, which a graph does not show",
        hint="move what runs under it into a module that runs no attention",
    )


def _replacements(model: nn.Module) -> dict[Replaceable, Any]:
    """All replacements except those for ``torch.export``. The originals are the current functions."""
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    written_in = sorted({kind.__module__ for kind in kinds})
    functions = _factories() | draws()
    return {
        **functions,
        **_imported_by_name(functions, {name.partition(".")[0] for name in written_in}),
        **_lengths(written_in),
        **_gradients(),
        **_fast_path(),
        **_quiet(),
        DTYPE_OF_MASK: only_here(getattr(*DTYPE_OF_MASK), _dtype_of_mask),
        (torch.autocast, "__enter__"): _autocast(torch.autocast.__enter__),
        (torch, "clear_autocast_cache"): only_here(torch.clear_autocast_cache, _nothing, _nothing),
        (symbolic_trace_module, "_Patcher"): only_here(
            symbolic_trace_module._Patcher, _Patcher, _Patcher
        ),
    }


def _imported_by_name(
    functions: dict[Replaceable, Any], packages: set[str]
) -> dict[Replaceable, Any]:
    """The same functions where the author's code has ``from random import random``, and ``act = Act.apply``."""
    known = {
        id(vars(owner)[name]): function
        for (owner, name), function in functions.items()
        if name in vars(owner)
    }
    found: dict[Replaceable, Any] = {}
    for path, module in list(sys.modules.items()):
        if path.partition(".")[0] not in packages - {"builtins", "torch"}:
            continue
        for name, value in list(vars(module).items()):
            if id(value) in known:
                found[module, name] = known[id(value)]
            elif _is_apply(value):
                found[module, name] = only_here(value, functools.partial(_apply, value.__self__))
    return found


# -- values -----------------------------------------------------------------------------------------------------------


def _factories() -> dict[Replaceable, Any]:
    """Factories that become a node if they are called with proxies."""

    def record(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, fx.Proxy):
                return leaf.tracer.create_proxy("call_function", function, args, kwargs)
        return function(*args, **kwargs)

    originals = {name: vars(torch)[name] for name in FACTORIES}
    return {
        (torch, name): only_here(function, functools.partial(record, function))
        for name, function in originals.items()
    }


def _lengths(written_in: list[str]) -> dict[Replaceable, Any]:
    """``len(x)`` in the author's code: Python needs a number, which may be the batch size of a tensor."""

    def length(thing: Any) -> Any:
        if isinstance(thing, Tensor):
            return thing.shape[0]
        try:
            return builtins.len(thing)
        except TraceError:
            if not isinstance(thing, fx.Proxy):
                raise
            shape: Any = thing.shape
            return shape[0]

    modules = [sys.modules[name] for name in written_in if name in sys.modules]
    return {
        (module, "len"): only_here(builtins.len, length)
        for module in modules
        if "len" not in vars(module)  # nor a function of that name
    }


def _dtype_of_mask(tensor: Any) -> Any:
    """The dtype that ``torch.nn.MultiheadAttention`` asks of its masks, even if they are proxies."""
    return None if tensor is None else tensor.dtype


# -- what a graph does not show ---------------------------------------------------------------------------------------


def _autocast(enter: Callable[..., Any]) -> Any:
    def refused(context: torch.autocast) -> Any:
        if here.exporting:
            return enter(context)
        raise lost_context("torch.autocast")

    return only_here(enter, refused)


@contextlib.contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """All threads share the cache of parameters in another dtype; it must not give them fake ones.

    Whether it is used is a per-thread setting; the outermost autocast of a thread is also kept from clearing it for
    all.
    """
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


def _nothing() -> None:
    pass


def _gradients() -> dict[Replaceable, Any]:
    raw = vars(torch.autograd.Function)["apply"]

    def apply(function: type, *args: Any, **kwargs: Any) -> Any:
        return raw.__get__(None, function)(*args, **kwargs)

    def refuse_hook(*args: Any) -> NoReturn:
        raise lost("hooks the gradient of a tensor")

    def enter(hooks: saved_tensors_hooks) -> None:
        if type(hooks).__module__ != checkpoint.__module__:
            raise lost("saves tensors for its backward pass in a way of its own")
        here.checkpoints.enter()

    def leave(hooks: saved_tensors_hooks, *error: Any) -> None:
        here.checkpoints.leave()

    hooks = saved_tensors_hooks
    return {
        (torch.autograd.Function, "apply"): classmethod(only_here(apply, _apply)),
        (Tensor, "register_hook"): only_here(Tensor.register_hook, refuse_hook),
        (hooks, "__enter__"): only_here(hooks.__enter__, enter),
        (hooks, "__exit__"): only_here(hooks.__exit__, leave),
    }


def _apply(function: type, *args: Any) -> Any:
    """The result of ``function.apply(*args)`` in a forward that is followed."""
    if function is KEEPS_ARGUMENTS:
        return args[0].clone()  # what matters of it is that it has a gradient
    if function is not CheckpointFunction:
        raise lost("calls a torch.autograd.Function")
    run, _, *arguments = args
    here.checkpoints.enter()
    result = run(*arguments)
    here.checkpoints.leave()
    return result


def _is_apply(value: Any) -> bool:
    bound = isinstance(value, (types.BuiltinMethodType, types.MethodType))
    owner = value.__self__ if bound else None
    is_function = isinstance(owner, type) and issubclass(owner, torch.autograd.Function)
    return is_function and value.__name__ == "apply"


# -- what torch does itself -------------------------------------------------------------------------------------------


def _fast_path() -> dict[Replaceable, Any]:
    def disabled() -> bool:
        return False

    mha, name = torch.backends.mha, "get_fastpath_enabled"
    return {(mha, name): only_here(vars(mha)[name], disabled, disabled)}


def _quiet() -> dict[Replaceable, Any]:
    """Suppress torch's warnings in the log: the author's code may handle the problem, and errors report it anyway."""
    call_handlers = logging.Logger.callHandlers

    def quiet(logger: logging.Logger, record: logging.LogRecord) -> None:
        if record.levelno < logging.WARNING or record.name.partition(".")[0] != "torch":
            call_handlers(logger, record)

    return {(logging.Logger, "callHandlers"): only_here(call_handlers, quiet, quiet)}


def _exporting() -> dict[Replaceable, Any]:
    """Limit what ``torch.export`` sets for the whole process to this thread, and keep it from turning off kernels."""

    def told(original: Callable[[], bool]) -> Callable[[], bool]:
        before = original()
        return functools.wraps(original)(lambda: original() if here.phase else before)

    names = ("is_compiling", "is_exporting")
    backends = (torch.backends.mkldnn, torch.backends.nnpack, torch.backends.cudnn)
    return {
        **{(torch.compiler, name): told(vars(torch.compiler)[name]) for name in names},
        **{(b, "set_flags"): only_here(b.set_flags, _no_flags, _no_flags) for b in backends},
    }


def _no_flags(*flags: Any, **more: Any) -> tuple[()]:
    """Set nothing. The returned former flags are empty, so passing them back sets nothing either."""
    return ()


class _Patcher(symbolic_trace_module._Patcher):
    """Applies the replacements that ``torch.fx`` makes while it traces, such as ``nn.Module.__call__``."""

    def patch(
        self, frame_dict: dict[str, Any], name: str, new_fn: Any, deduplicate: bool = True
    ) -> None:
        original = frame_dict[name] if name in frame_dict else getattr(builtins, name)
        super().patch(frame_dict, name, only_here(original, new_fn, new_fn), deduplicate)

    def patch_method(self, cls: type, name: str, new_fn: Any, deduplicate: bool = True) -> None:
        function = only_here(getattr(cls, name), new_fn, new_fn)
        super().patch_method(cls, name, function, deduplicate)
