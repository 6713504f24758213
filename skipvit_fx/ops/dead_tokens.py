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
        return x.narrow(self.dim, 0, self.rows) if self.enabled else x

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
        if not self.enabled:
            return F.linear(x, weight, bias)
        channels = weight.shape[0]
        others = slice(self.stop, channels) if self.start == 0 else slice(0, self.start)
        front, back = (self.stop, 0) if self.start == 0 else (0, channels - self.start)
        first = F.linear(x.narrow(self.dim, 0, self.rows), weight, bias)
        rest = F.linear(
            x.narrow(self.dim, self.rows, x.shape[self.dim] - self.rows),
            weight[others],
            None if bias is None else bias[others],
        )
        return torch.cat([first, self.pad(rest, front, back)], self.dim)

    def pad(self, x: Tensor, front: int, back: int) -> Tensor:
        """More channels in front or behind, where the queries that nobody reads would stand."""
        return F.pad(x, (front, back))

    def extra_repr(self) -> str:
        return f"rows={self.rows}, queries={self.start}:{self.stop}"
