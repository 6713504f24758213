"""Rows that nothing reads are not computed."""

from __future__ import annotations

from torch import Tensor

from skipvit_fx.ops.following import kept_whole
from skipvit_fx.ops.switch import Switchable


class Narrow(Switchable):
    """The first ``rows`` rows along ``dim``: the only ones that are read later."""

    def __init__(self, dim: int, rows: int) -> None:
        super().__init__()
        self.dim = dim
        self.rows = rows

    @kept_whole
    def forward(self, x: Tensor) -> Tensor:
        """Any tensor, shorter along ``dim``."""
        return x.narrow(self.dim, 0, self.rows) if self.active else x

    def extra_repr(self) -> str:
        return f"dim={self.dim}, rows={self.rows}"
