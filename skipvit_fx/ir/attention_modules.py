"""In which modules does attention run? One fake run of the model tells."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from skipvit_fx.ir.cloning import fake_structure
from skipvit_fx.ir.fakes import TracelessFakeMode, fake_inputs

aten = torch.ops.aten

ATTENTION_OPS = frozenset(
    {
        aten._softmax,
        aten._safe_softmax,
        aten._scaled_dot_product_flash_attention_for_cpu,
        aten._scaled_dot_product_flash_attention,
        aten._scaled_dot_product_efficient_attention,
        aten._scaled_dot_product_cudnn_attention,
        aten._scaled_dot_product_fused_attention_overrideable,
    }
)


class _Watch(TorchDispatchMode):
    """Notes every module on the call stack while an attention operator runs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stack: list[str] = []
        self.found: dict[str, None] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.overloadpacket in ATTENTION_OPS:
            self.found.update(dict.fromkeys(self.stack))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def slow_attention() -> Iterator[None]:
    """Keep ``nn.MultiheadAttention`` from its inference kernel, which hides the attention in one operator."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def attention_modules(
    model: nn.Module,
    mode: TracelessFakeMode,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> tuple[str, ...]:
    """Paths of the modules in whose forward an attention (or any softmax) runs, in call order.

    Every ancestor on the call stack is included, the model itself (path ``""``) too.
    """
    watched = fake_structure(model, mode).eval()  # whatever mode it is in: the same modules
    watch = _Watch()
    for path, module in watched.named_modules():
        module.register_forward_pre_hook(lambda *_, path=path: watch.stack.append(path))
        module.register_forward_hook(lambda *_: watch.stack.pop() and None, always_call=True)
    fake_args, fake_kwargs = fake_inputs(mode, (args, dict(kwargs)))
    with mode, watch, torch.no_grad(), slow_attention():
        watched(*fake_args, **fake_kwargs)
    return tuple(watch.found)
