"""Which modules and attentions run when a model runs, without a graph: one call on fake tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from skipvit_fx.author.code import AuthorError, author_code
from skipvit_fx.author.side_effects import contained
from skipvit_fx.capture.cloning import fake_structure
from skipvit_fx.capture.fakes import TracelessFakeMode, fake_inputs
from skipvit_fx.errors import TraceError
from skipvit_fx.graph.attention_ops import SDPA_KERNELS, SOFTMAX_KERNELS
from skipvit_fx.graph.module_paths import naming_parts
from skipvit_fx.torch_internals import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    TorchDispatchMode,
)

_ON_VALUES = (DataDependentOutputException, DynamicOutputShapeException)


@dataclass(frozen=True)
class AttentionCall:
    """A fused attention or a softmax that ran.

    Attributes:
        module_path: the innermost module that it ran in.
        fused: whether it was a ``scaled_dot_product_attention``.
        length: the number of keys, or of values in a row of the softmax.
    """

    module_path: str
    fused: bool
    length: int


@dataclass(frozen=True)
class Calls:
    """One call of a model.

    Attributes:
        modules: paths of the modules that ran, in the order of their first call.
        around_attention: paths of those in whose forward an attention ran and of all their callers, including the model
            itself (path ``""``), in the order of the attentions.
        attention: every attention, in order.
    """

    modules: tuple[str, ...]
    around_attention: tuple[str, ...]
    attention: tuple[AttentionCall, ...]


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every module on the call stack while an attention operator runs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stack: list[str] = []
        self.modules: dict[str, None] = {}
        self.around_attention: dict[str, None] = {}
        self.attention: list[AttentionCall] = []

    def enter(self, path: str) -> None:
        self.stack.append(path)
        self.modules[path] = None

    def leave(self) -> None:
        self.stack.pop()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.overloadpacket in (SDPA_KERNELS | SOFTMAX_KERNELS):
            fused = func.overloadpacket not in SOFTMAX_KERNELS
            length = args[1].shape[-2] if fused else args[0].shape[int(args[1])]
            path = self.stack[-1] if self.stack else ""
            self.attention.append(AttentionCall(path, fused, int(length)))
            self.around_attention.update(dict.fromkeys(self.stack))
        return func(*args, **(kwargs or {}))


def watch_calls(
    model: nn.Module, mode: TracelessFakeMode, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Calls:
    """Run ``model`` on fake tensors and note which modules and which attentions run.

    The call is in eval mode, whatever mode the model is in: the same modules run in train mode.

    Raises:
        TraceError: the model cannot be copied, or does not run on these inputs.
    """
    with contained(model):
        watched = fake_structure(model, mode).eval()
        watch = _Watch()
        for path, module in watched.named_modules():
            module.register_forward_pre_hook(lambda *_, path=path: watch.enter(path))
            module.register_forward_hook(lambda *_: watch.leave(), always_call=True)
        fake_args, fake_kwargs = fake_inputs(mode, (args, dict(kwargs)))
        try:
            with mode.surroundings.watched(), mode, watch, torch.no_grad(), author_code():
                watched(*fake_args, **fake_kwargs)
        except AuthorError as error:
            depends = isinstance(error.__cause__, _ON_VALUES)
            with naming_parts(watch.around_attention if depends else ()):
                raise _refusal(model, error, depends=depends) from error
    return Calls(tuple(watch.modules), tuple(watch.around_attention), tuple(watch.attention))


def _refusal(model: nn.Module, error: AuthorError, *, depends: bool) -> TraceError:
    name, reason = type(model).__name__, error.message
    if depends:
        return TraceError(
            f"what {name} computes depends on the values in its input tensors: {reason}",
            hint="pass values that its Python code reads from tensors as numbers, if the model accepts them",
        )
    return TraceError(
        f"{name} does not run on the example inputs: {reason}",
        hint="pass example_inputs=(...) of the shape and dtype that the model takes",
    )
