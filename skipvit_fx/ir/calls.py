"""What runs when a model runs, module by module, without a graph: one call on fake tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from skipvit_fx.ir.attention_modules import ATTENTION_OPS
from skipvit_fx.ir.cloning import fake_structure
from skipvit_fx.ir.fakes import TracelessFakeMode, fake_inputs

_SOFTMAX = frozenset({torch.ops.aten._softmax, torch.ops.aten._safe_softmax})


@dataclass(frozen=True)
class AttentionCall:
    """A fused attention or some softmax that ran.

    Attributes:
        module_path: the innermost module that it ran in.
        fused: whether it was a ``scaled_dot_product_attention``.
        shape: of the queries, or of what the softmax runs over.
        dim: the axis of the softmax; -2, the keys' axis, for a fused attention.
        length: how many keys, or values that the softmax sums to one.
    """

    module_path: str
    fused: bool
    shape: tuple[int, ...]
    dim: int
    length: int


@dataclass(frozen=True)
class Calls:
    """One call of a model.

    Attributes:
        modules: paths of the modules that ran, in the order of their first call.
        attention: every attention, in order.
    """

    modules: tuple[str, ...]
    attention: tuple[AttentionCall, ...]


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stack: list[str] = []
        self.modules: dict[str, None] = {}
        self.attention: list[AttentionCall] = []

    def enter(self, path: str) -> None:
        self.stack.append(path)
        self.modules[path] = None

    def leave(self) -> None:
        self.stack.pop()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.overloadpacket in ATTENTION_OPS:
            first: Tensor = args[0]
            fused = func.overloadpacket not in _SOFTMAX
            dim = -2 if fused else int(args[1])
            length = (args[1] if fused else first).shape[dim]
            path = self.stack[-1] if self.stack else ""
            self.attention.append(AttentionCall(path, fused, tuple(first.shape), dim, length))
        return func(*args, **(kwargs or {}))


def watch_calls(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Calls:
    """Run ``model`` on fake tensors and note which modules and which attentions run."""
    mode = TracelessFakeMode()
    watched = fake_structure(model, mode)
    watch = _Watch()
    for path, module in watched.named_modules():
        module.register_forward_pre_hook(lambda *_, path=path: watch.enter(path))
        module.register_forward_hook(lambda *_: watch.leave(), always_call=True)
    fake_args, fake_kwargs = fake_inputs(mode, (args, dict(kwargs)))
    around = mode.surroundings
    with around.kept(), around.watched(), mode, watch, torch.no_grad():
        watched(*fake_args, **fake_kwargs)
    return Calls(tuple(watch.modules), tuple(watch.attention))
