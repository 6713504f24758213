"""The arguments of ``torch.nn.functional.scaled_dot_product_attention``, however they were passed."""

from __future__ import annotations

from typing import Any, NamedTuple, Self

from torch import fx

from skipvit_fx.errors import UnsupportedModelError


class AttentionArguments(NamedTuple):
    """``AttentionArguments(*args, **kwargs)`` reads a call as Python would: by position, by name, or left out.

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
                hint="use score='random' or a score function, which do not need it",
            )
        return given
