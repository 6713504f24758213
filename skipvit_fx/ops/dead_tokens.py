"""Rows that nobody reads are not computed."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from skipvit_fx.ops.switch import Switchable


class Narrow(Switchable):
    """The first ``rows`` rows along ``dim``: the only ones that are read later."""

    def __init__(self, dim: int, rows: int) -> None:
        super().__init__()
        self.dim = dim
        self.rows = rows

    def forward(self, x: Tensor) -> Tensor:
        """Any tensor, shorter along ``dim``."""
        return x.narrow(self.dim, 0, self.rows) if self.active else x

    def extra_repr(self) -> str:
        return f"dim={self.dim}, rows={self.rows}"


class ProjectQueriesOfFirst(Switchable):
    """A joint projection to queries, keys and values of which only the first rows' queries are read.

    The result has the full shape, so that the author's reshapes go on working; the queries that nobody reads are zeros.

    Args:
        dim: token axis of the input, 0 or 1.
        rows: rows whose queries are read.
        start, stop: the output channels that are queries, at one end of all.
    """

    def __init__(self, dim: int, rows: int, start: int, stop: int) -> None:
        super().__init__()
        self.dim = dim
        self.rows = rows
        self.start = start
        self.stop = stop

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """``[batch, tokens, channels]`` to ``[batch, tokens, queries + keys + values]``."""
        if not self.active:
            return F.linear(x, weight, bias)
        queries = slice(self.start, self.stop)
        others = slice(self.stop, None) if self.start == 0 else slice(0, self.start)
        read = F.linear(
            x.narrow(self.dim, 0, self.rows),
            weight[queries],
            None if bias is None else bias[queries],
        )
        unread = (0, 0) * (2 - self.dim) + (0, x.shape[self.dim] - self.rows)
        parts = [
            F.pad(read, unread),
            F.linear(x, weight[others], None if bias is None else bias[others]),
        ]
        return torch.cat(parts if self.start == 0 else parts[::-1], -1)

    def extra_repr(self) -> str:
        return f"rows={self.rows}, queries={self.start}:{self.stop}"
