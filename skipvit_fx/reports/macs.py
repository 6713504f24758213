"""Multiply-adds and memory traffic of one image, counted on fake tensors: nothing is computed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from skipvit_fx.author.code import AuthorError, author_code
from skipvit_fx.author.side_effects import contained
from skipvit_fx.capture.cloning import fake_structure
from skipvit_fx.capture.example import batch_size, floating_like, has_samples
from skipvit_fx.capture.fakes import TracelessFakeMode
from skipvit_fx.errors import GuardError, TraceError
from skipvit_fx.graph.attention_ops import SDPA_KERNELS
from skipvit_fx.graph.module import SkipViTModule
from skipvit_fx.ops.guard import guard
from skipvit_fx.ops.select import Amount
from skipvit_fx.ops.switch import switches
from skipvit_fx.torch_internals import (
    TorchDispatchMode,
    is_writing,
    pytree,
    storage_of,
    tensor_leaves,
)


def attention_flops(
    query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any
) -> int:
    """Both products of an attention, from the shapes ``[..., tokens, channels]``; key heads may be shared."""
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


# Every fused attention that a device may choose. Which of them the counter knows by itself depends
# on torch's version, and one that it does not know would count as zero.
ATTENTION = dict.fromkeys(SDPA_KERNELS, attention_flops)


@dataclass(frozen=True)
class MacCount:
    """Multiply-adds of one image: matrix products, convolutions and attention products.

    Attributes:
        total: of the whole module.
        nodes: by name of the graph node, in graph order; they sum to ``total``. Empty for a module without a graph.
        bytes: by name as well: read and written by operators other than matrix products. Views move nothing.
        shapes: the shape of every node's value for a batch of one; a tuple of shapes for several tensors, or for none.
    """

    total: int
    nodes: dict[str, int]
    bytes: dict[str, int]
    shapes: dict[str, Any]


def count_macs(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    skipping: bool | None = None,
) -> MacCount:
    """Count the multiply-adds of one image in eval mode.

    The module is neither run nor changed: a copy of its structure is interpreted on fake tensors.

    Args:
        args, kwargs: example inputs, batch first; their first sample is counted. Only shapes are read, so tensors on
            the meta device will do. They are converted to the device and floating-point dtype of the module.
        skipping: count a rewritten module with skipping off, or on as its plan says, whatever its switch and schedule
            say; with None, as it is now.

    Raises:
        TraceError: the module does not run on such inputs, or not without data.
    """
    with contained(module):
        return _count(module, args, kwargs or {}, skipping)


def _count(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], skipping: bool | None
) -> MacCount:
    mode = TracelessFakeMode(module)
    faked = fake_structure(module, mode).eval()
    if skipping is not None:
        skip_as_planned(faked, skipping)
    flops = FlopCounterMode(display=False, custom_mapping=ATTENTION)
    traffic = _Traffic(frozenset(flops.flop_registry))
    try:
        around = mode.surroundings
        with around.kept(), around.watched(), mode, torch.no_grad(), flops, traffic:
            fake_args, fake_kwargs = _one_sample(module, args, dict(kwargs))
            if not isinstance(module, SkipViTModule):
                with author_code():
                    faked(*fake_args, **fake_kwargs)
                return MacCount(flops.get_total_flops() // 2, {}, {}, {})
            counter = _NodeCounter(faked, module.graph, flops, traffic)
            with author_code():
                counter.run(*module.own.inputs_of(module.own.calls[0], fake_args, fake_kwargs))
    except (AuthorError, GuardError) as error:
        raise TraceError(
            f"{type(module).__name__} cannot be counted on inputs of this shape without computing: "
            f"{error.message}",
            hint="pass inputs like those that the model takes; a score function must not read the contents of tensors",
        ) from error
    return MacCount(sum(counter.macs.values()), counter.macs, counter.bytes, counter.shapes)


def skip_as_planned(copy: nn.Module, on: bool) -> None:
    """Switch a copy's skipping off, or on as its plan says, whatever its switch, mode and schedule say."""
    for switch in switches(copy):
        switch.enabled, switch.train_only = on, False
    for module in copy.modules():
        if isinstance(module, Amount):
            module.current = module.amount


class _Traffic(TorchDispatchMode):
    """Sums up the bytes that operators read and write, except for matrix products and views."""

    def __init__(self, products: frozenset[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products = products
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket not in self.products:
            read, written = tensor_leaves((args, kwargs)), tensor_leaves(out)
            known = {_storage(tensor) for tensor in read}
            if is_writing(func) or any(_storage(t) not in known for t in written):
                self.bytes += sum(_size(tensor) for tensor in [*read, *written]) if read else 0
        return out


def _storage(tensor: Tensor) -> int:
    number: int = storage_of(tensor)
    return number


def _size(tensor: Tensor) -> int:
    """Bytes of a tensor's distinct elements; expanded ones are counted once."""
    distinct = (n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return math.prod(distinct) * tensor.element_size()


class _NodeCounter(fx.Interpreter):
    """Notes for every node by how much the counters grew while it ran, and the shape of its value."""

    def __init__(
        self, owner: nn.Module, graph: fx.Graph, flops: FlopCounterMode, traffic: _Traffic
    ) -> None:
        super().__init__(owner, graph=graph)
        self.flops = flops
        self.traffic = traffic
        self.macs: dict[str, int] = {}
        self.bytes: dict[str, int] = {}
        self.shapes: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        macs, bytes_ = self.flops.get_total_flops(), self.traffic.bytes
        value = (
            None if n.target is guard else super().run_node(n)
        )  # one sample stands for any number
        self.macs[n.name] = (self.flops.get_total_flops() - macs) // 2
        self.bytes[n.name] = self.traffic.bytes - bytes_
        shapes = tuple(tuple(tensor.shape) for tensor in tensor_leaves(value))
        self.shapes[n.name] = shapes[0] if isinstance(value, Tensor) else shapes
        return value


def _one_sample(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs cut to a batch of one, with the module's current device and dtype."""
    like = floating_like(module)
    batch = batch_size(args, kwargs)

    def fake(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        dtype = like.dtype if leaf.is_floating_point() else leaf.dtype
        shape = (1, *leaf.shape[1:]) if has_samples(leaf, batch) else leaf.shape
        return torch.empty(shape, dtype=dtype, device=like.device)

    one: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(fake, (args, kwargs))
    return one
