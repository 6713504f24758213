"""The operators that attention consists of, and the arguments of fused attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import fx, nn
from torch.nn import functional as F

from skipvit_fx.errors import UnsupportedModelError
from skipvit_fx.torch_internals import aten

SDPA: tuple[Any, ...] = (
    F.scaled_dot_product_attention,
    aten.scaled_dot_product_attention.default,
)
"""Fused attention, as called in graphs."""

SOFTMAX: tuple[Any, ...] = (
    torch.softmax,
    F.softmax,
    aten.softmax.int,
    aten._softmax.default,
)
"""Softmax functions, as called in graphs; the method and the module come on top of these."""

SDPA_KERNELS = frozenset(
    {
        aten._scaled_dot_product_flash_attention_for_cpu,
        aten._scaled_dot_product_flash_attention,
        aten._scaled_dot_product_efficient_attention,
        aten._scaled_dot_product_cudnn_attention,
        aten._scaled_dot_product_fused_attention_overrideable,
    }
)
"""Every fused attention kernel that a device may run."""

SOFTMAX_KERNELS = frozenset({aten._softmax, aten._safe_softmax})
"""Every softmax kernel that a device may run."""


class AttentionArguments(NamedTuple):
    """``AttentionArguments(*args, **kwargs)`` reads a call as Python would: by position, by name, or by default.

    The fields hold whatever was passed: tensors, or graph nodes.
    """

    query: Any
    key: Any
    value: Any
    attn_mask: Any = None
    dropout_p: Any = 0.0
    is_causal: Any = False
    scale: Any = None
    enable_gqa: Any = False

    @classmethod
    def of(cls, node: fx.Node) -> Self:
        """The arguments of a node.

        Raises:
            UnsupportedModelError: the scale is computed in the graph.
        """
        given = cls(*node.args, **node.kwargs)
        if isinstance(given.scale, fx.Node):
            raise UnsupportedModelError(
                "the scale of an attention is computed, not constant",
                node=node.name,
                hint="use score='random' or a function of tokens, keys, queries or values, which do not need it",
            )
        return given


def key_count(node: fx.Node, owner: nn.Module, shape_of: Callable[[fx.Node], Sequence[int]]) -> int:
    """The number of keys of an attention, or of values that a softmax runs over.

    Args:
        node: a fused attention, or a softmax: a module of ``owner``, a function or a method.
        shape_of: the shape of a node's value.
    """
    if node.target in SDPA:
        return int(shape_of(AttentionArguments(*node.args, **node.kwargs).key)[-2])
    if node.op == "call_module":
        dim: object = owner.get_submodule(str(node.target)).dim
    else:
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    return int(shape_of(node)[dim if isinstance(dim, int) else -1])
