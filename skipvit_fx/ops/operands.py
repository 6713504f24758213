"""The queries, keys and values of an attention in one layout, however its author lays them out."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from skipvit_fx.ops.following import sizes


class OperandLayout(NamedTuple):
    """Where the queries, keys or values of an attention lie.

    Attributes:
        tokens, channels: their dimensions, from the right: negative. Samples come first, and heads are all the others.
        heads: heads per sample.
        prefix, suffix: the numbers of rows before and after the patches.
    """

    tokens: int
    channels: int
    heads: int
    prefix: int
    suffix: int

    def patches(self, operand: Tensor) -> Tensor:
        """Those of the patches that are present, ``[batch, heads, patches, channels]``."""
        operand = operand.movedim((self.tokens, self.channels), (-2, -1))
        count, channels = sizes(operand)[-2:]
        rows = operand.reshape(-1, self.heads, count, channels)
        return rows[:, :, self.prefix : count - self.suffix]
