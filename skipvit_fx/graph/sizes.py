"""Sizes as graph values: finds the nodes that are the length of dimension d of tensor x."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from skipvit_fx.torch_internals import aten

SIZE_FREE = frozenset(
    {"dim", "ndimension", "ndim", "dtype", "device", "is_cuda", "is_floating_point", "is_complex"}
    | {"requires_grad", "type", "is_contiguous", "layout", "is_sparse", "get_device"}
    | {torch.is_floating_point, torch.is_complex}
)
"""Methods and attributes of a tensor whose values do not depend on its sizes."""

RESHAPES: frozenset[Any] = frozenset(
    {"view", "reshape", "expand", torch.reshape, torch.broadcast_to, "broadcast_to"}
    | {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default}
)
"""Operators that take a tensor and its new sizes."""

SPLITS: frozenset[Any] = frozenset(
    {"split", "split_with_sizes", torch.split, torch.functional.split}
    | {aten.split_with_sizes.default, torch.split_with_sizes}
)
"""Operators that take a tensor and the lengths of its parts."""

SELECTS: frozenset[Any] = frozenset({"select", torch.select, aten.select.int})
"""Operators that take a tensor, a dimension and the index of a row."""

PICKS: frozenset[Any] = frozenset({operator.getitem, aten.slice.Tensor}) | SELECTS
"""Operators that take a tensor and the bounds of a part, or the index of a row."""

_SYM_SIZE = aten.sym_size.int


def sizes_of(node: fx.Node) -> tuple[fx.Node, slice] | None:
    """If the node is ``x.shape``, ``x.size()`` or a slice of one: the tensor, and which of its dimensions."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    if node.target is getattr and node.args[1] == "shape":
        return source, slice(None)
    if node.op == "call_method" and node.target == "size":
        return (source, slice(None)) if len(node.args) + len(node.kwargs) == 1 else None
    if node.target is operator.getitem and isinstance(node.args[1], slice):
        whole = sizes_of(source)
        plain = not any(
            isinstance(bound, fx.Node)
            for bound in (node.args[1].start, node.args[1].stop, node.args[1].step)
        )
        if whole is not None and whole[1] == slice(None) and plain:
            return whole[0], node.args[1]
    return None


def dimension_of(node: fx.Node, rank: Callable[[fx.Node], int]) -> tuple[fx.Node, int] | None:
    """If the node is the length of one dimension: the tensor and the dimension, counted from the left."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    if node.target is _SYM_SIZE or (node.op == "call_method" and node.target == "size"):
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        return (source, dim % rank(source)) if isinstance(dim, int) else None
    if node.target is operator.getitem and isinstance(node.args[1], int):
        whole = sizes_of(source)
        if whole is not None:
            tensor, dims = whole
            return tensor, range(rank(tensor))[dims][node.args[1]]
    return None
