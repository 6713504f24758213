"""Writes into tensors, which a graph of values does not show: found harmless, or refused."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Proxy

from skipvit_fx.errors import TraceError
from skipvit_fx.names import WRITES
from skipvit_fx.torch_internals import (
    FakeTensor,
    TorchDispatchMode,
    hint_of,
    is_operator,
    is_writing,
    schema_arguments,
    storage_of,
    tensor_leaves,
)

AUGMENTED = (
    "add", "and", "floordiv", "lshift", "matmul", "mod", "mul", "or", "pow", "rshift", "sub", "truediv", "xor",
)  # fmt: skip
"""Operators that have an augmented assignment, such as ``+=``."""


def augmented(name: str) -> Callable[[Proxy, Any], Proxy]:
    """The method of a proxy for ``x += y``: it makes a new value, and notes that it was written over the old one."""
    function = getattr(operator, f"__{name}__")

    def method(proxy: Proxy, other: Any) -> Proxy:
        result: Proxy = function(proxy, other)
        result.node.meta[WRITES] = True
        return result

    return method


def refuse_lost_writes(
    graph: fx.Graph,
    value: Callable[[fx.Node], Any],
    written_by_leaf: Callable[[fx.Node], list[fx.Node]],
) -> None:
    """Accept a write if everything that reads the memory afterwards reads the result of the write.

    A write under one name that is read under another, such as ``y = x.view(-1); x += 1; f(y)``, does not survive a
    rewrite, in which ``x`` and ``y`` may become copies. A write that no node reads, such as ``x[0] = 1``, would even be
    eliminated as dead code.

    Args:
        graph: that of eval or train mode, before anything was eliminated.
        value: returns the fake tensor that a node computes.
        written_by_leaf: returns the arguments that a called module writes into.

    Raises:
        TraceError: a write would be lost, or changes the model's state or its inputs.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        place = order[node]
        if node.meta.get(WRITES) and _kind(value(node.args[0])) != _kind(value(node)):
            raise _refusal(node, f"is written over {node.args[0]}, of another shape or dtype")
        is_leaf = node.op == "call_module"
        for written in written_by_leaf(node) if is_leaf else _written(node):
            for other, there in order.items():
                if there >= place or not _share_memory(value(written), value(other)):
                    continue
                if other.op in ("placeholder", "get_attr"):
                    whose = "an input" if other.op == "placeholder" else "its own state"
                    raise _refusal(node, f"changes {whose}, {other.target!r}")
                readers = [user for user in other.users if order[user] > place]
                if readers:
                    raise _refusal(
                        node,
                        f"changes {other.name} in place, which {readers[0].name} reads afterwards",
                    )


def _written(node: fx.Node) -> list[fx.Node]:
    """The arguments that a function or method writes into."""
    target = node.target
    places: list[Any] = []
    if is_operator(target):
        places += _places(target, node.args, node.kwargs)
    elif node.op in ("call_method", "call_function"):
        name = target if isinstance(target, str) else getattr(target, "__name__", "")
        in_place = name.endswith("_") and not name.endswith("__")
        if in_place or node.kwargs.get("inplace") is True or node.meta.pop(WRITES, False):
            places.append(node.args[0] if node.args else node.kwargs.get("input"))
        places.append(node.kwargs.get("out"))
    found: list[fx.Node] = []
    fx.node.map_arg(places, found.append)
    return found


class WatchWrites(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes which memory is written into while a module runs on fake tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._written: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if is_writing(func):
            places = _places(func, args, kwargs)
            self._written |= _memory(places)
            if places and not isinstance(places[0], FakeTensor):
                return places[0]  # the model's state, such as a count of batches, must not change
        return func(*args, **kwargs)

    def wrote_into(self, tensors: Any) -> bool:
        """Whether any of these tensors, however nested, was written into."""
        return not self._written.isdisjoint(_memory(tensors))


def _memory(tensors: Any) -> set[int]:
    return {storage_of(tensor) for tensor in tensor_leaves(tensors)}


def _places(operator: Any, args: Any, kwargs: Any) -> list[Any]:
    """The arguments that an operator writes into, by its schema."""
    return [
        args[i] if i < len(args) else kwargs.get(argument.name)
        for i, argument in enumerate(schema_arguments(operator))
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


def _kind(value: Any) -> Any:
    return (value.dtype, len(value.shape)) if isinstance(value, Tensor) else None


def _share_memory(one: Any, other: Any) -> bool:
    """Whether two fake tensors have an element in common."""
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return False
    if storage_of(one) != storage_of(other):
        return False
    length = max(_end(one), _end(other))
    touched = torch.zeros(length, dtype=torch.bool, device="cpu")
    _view(touched, one).fill_(True)
    return bool(_view(touched, other).any())


def _view(memory: Tensor, like: Tensor) -> Tensor:
    return memory.as_strided(_ints(like.shape), _ints(like.stride()), int(like.storage_offset()))


def _end(tensor: Tensor) -> int:
    spans = zip(_ints(tensor.shape), _ints(tensor.stride()), strict=True)
    return int(tensor.storage_offset()) + 1 + sum((size - 1) * step for size, step in spans)


def _ints(sizes: Any) -> list[int]:
    """Sizes as numbers; a symbolic one as in the example."""
    return [hint_of(size) for size in sizes]


def _refusal(node: fx.Node, reason: str) -> TraceError:
    return TraceError(
        f"{node.name} {reason}; a graph does not show that",
        hint="compute a new tensor (x = x + y), or keep state that changes in a module that runs no attention",
    )
