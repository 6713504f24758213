"""Operands that hold one row per position, such as a rotary table or a relative position bias."""

from __future__ import annotations

from torch import Tensor, nn

from skipvit_fx.ops.following import kept_whole
from skipvit_fx.ops.rows import rows_of, sequence_rows


class GatherPositions(nn.Module):
    """The rows of a position-dependent operand that belong to the kept patches, per sample.

    Args:
        dims: the operand's token axes, ascending, each with the prefix and trailing rows around its patches.
        rank: rank of the tensor that the operand is broadcast to.
        batch_dim: the batch axis of that tensor, along which the result has one row of positions per sample.
        per_sample: whether the operand has a batch axis of its own there.
        repeat: how often each sample repeats in succession along the batch axis (heads merged into the batch).
    """

    def __init__(
        self,
        dims: tuple[tuple[int, int, int], ...],
        rank: int,
        batch_dim: int,
        per_sample: bool,
        repeat: int,
    ) -> None:
        super().__init__()
        self.dims = dims
        self.rank = rank
        self.batch_dim = batch_dim
        self.per_sample = per_sample
        self.repeat = repeat

    @property
    def place(self) -> tuple[object, ...]:
        """The key in which two gathers of one operand must agree to be the same."""
        return self.dims, self.rank, self.batch_dim, self.per_sample, self.repeat

    @kept_whole
    def forward(self, operand: Tensor, positions: Tensor | None) -> Tensor:
        """Any shape that broadcasts to ``rank`` axes, and ``[batch, k]``; the result has ``rank`` axes."""
        if positions is None:
            return operand
        missing = self.rank - operand.ndim
        full = operand.reshape((1,) * missing + tuple(operand.shape))
        per_sample = self.per_sample
        if per_sample and self.repeat > 1:
            positions = positions.repeat_interleave(self.repeat, 0)
        for dim, prefix, suffix in self.dims:
            d = dim + missing
            rows = sequence_rows(positions, prefix, full.shape[d] - prefix - suffix, suffix)
            if per_sample:
                front = full.movedim((self.batch_dim, d), (0, 1))
                full = rows_of(front, rows).movedim((0, 1), (self.batch_dim, d))
            else:
                full = self._each_samples(full, d, rows)
                per_sample = True
        if not self.per_sample and self.repeat > 1:
            full = full.repeat_interleave(self.repeat, self.batch_dim)
        return full

    def _each_samples(self, shared: Tensor, dim: int, rows: Tensor) -> Tensor:
        """Rows ``[batch, k]`` along ``dim`` of an operand that all samples share, whose batch axis has length 1."""
        near = shared.index_select(dim, rows.flatten())
        near = near.reshape(*shared.shape[:dim], *rows.shape, *shared.shape[dim + 1 :])
        return near.movedim(dim, self.batch_dim).squeeze(self.batch_dim + 1)
