"""For torch-npu: which aten operators a rewritten model runs, and what is known about them there."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor, nn

from skipvit_fx.names import OWN_CHILD
from skipvit_fx.torch_internals import TorchDispatchMode, overload_name, schema_name


@dataclass(frozen=True)
class NpuOperator:
    """One aten operator that a model runs.

    Attributes:
        name: such as ``topk`` or ``sort.stable``.
        inserted: whether a module of this compiler runs it, rather than only the author's code.
        status: ``npu_kernel``, ``composite_...`` (made of others), ``cpu_fallback`` or ``unknown``.
        data_dependent: whether the shape of its result depends on data, which stops the host.
        note: other known facts.
    """

    name: str
    inserted: bool
    status: str
    data_dependent: bool
    note: str

    @property
    def known_bad(self) -> bool:
        """Whether it is known to leave the device or to stop the host."""
        return self.data_dependent or self.status == "cpu_fallback"


_INDEXING = ("index", "index_put", "index_put_")


def _by_mask(indices: Sequence[Tensor | None]) -> bool:
    return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)


@cache
def _facts() -> dict[str, Any]:
    text = files("skipvit_fx.ascend").joinpath("npu_ops.json").read_text(encoding="utf-8")
    facts: dict[str, Any] = json.loads(text)
    return facts


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.depth = 0
        self.seen: dict[str, bool] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        packet, overload = schema_name(func).removeprefix("aten::"), overload_name(func)
        name = packet if overload == "default" else f"{packet}.{overload}"
        if packet in _INDEXING and _by_mask(args[1]):
            name = f"{name}, by mask"
        self.seen[name] = self.seen.get(name, False) or self.depth > 0
        return func(*args, **(kwargs or {}))


def npu_operators(fast: nn.Module, *args: Any, **kwargs: Any) -> list[NpuOperator]:
    """Run a model once on its device, and look up every aten operator that it runs.

    The decompositions are those of this machine: on an NPU, for instance, attention runs as one operator.
    """
    watch = _Watch()

    def enter(module: nn.Module, inputs: Any) -> None:
        watch.depth += 1

    def leave(module: nn.Module, inputs: Any, outputs: Any) -> None:
        watch.depth -= 1

    own = [m for name, m in fast.named_modules() if name.split(".")[0] == OWN_CHILD]
    handles = [module.register_forward_pre_hook(enter) for module in own]
    handles += [module.register_forward_hook(leave) for module in own]
    try:
        with torch.no_grad(), watch:
            fast(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return [_look_up(name, inserted) for name, inserted in sorted(watch.seen.items())]


def _look_up(name: str, inserted: bool) -> NpuOperator:
    facts = _facts()
    known = facts["operators"]
    plain, mask, _ = name.partition(", by mask")
    entry = known.get(plain) or known.get(plain.partition(".")[0]) or {}
    dependent = facts["data_dependent"]
    return NpuOperator(
        name,
        inserted,
        entry.get("status", "unknown"),
        bool(mask) or plain in dependent,
        entry.get("note", ""),
    )


def find_device() -> torch.device:
    """``npu:0`` if torch-npu and a device are available, else the CPU."""
    return torch.device("npu:0" if npu_is_available() else "cpu")


def npu_is_available() -> bool:
    """Whether torch-npu can be imported and sees a device."""
    try:
        importlib.import_module("torch_npu")
    except (
        ImportError,
        AttributeError,
        RuntimeError,
        OSError,
    ):  # CANN or torch is missing or wrong
        return False
    return bool(torch.get_device_module("npu").is_available())


def synchronise(x: Tensor) -> None:
    """Wait until the device has finished, before a clock is read."""
    if x.device.type == "npu":
        torch.get_device_module("npu").synchronize()
