"""A module of the same author's that no model is written in."""

from __future__ import annotations

import torch
from torch import Tensor

TABLES: dict[str, Tensor] = {}


def times_table(x: Tensor) -> Tensor:
    """``x`` times a factor for every channel, which is made once."""
    if "table" not in TABLES:
        TABLES["table"] = torch.linspace(0.5, 1.5, x.shape[-1], device=x.device, dtype=x.dtype)
    return x * TABLES["table"]
