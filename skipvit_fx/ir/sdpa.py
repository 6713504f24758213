"""The arguments of ``torch.nn.functional.scaled_dot_product_attention``, however they were passed."""

from __future__ import annotations

from typing import Any, NamedTuple


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
