"""Operands that hold one row per position, such as a rotary table or a relative position bias."""

from __future__ import annotations

from torch import Tensor, nn

from skipvit_fx.ops.rows import sequence_rows


class GatherPositions(nn.Module):
    """The rows of a position-dependent operand that belong to the kept patches, per sample.

    Args:
        dims: the operand's token axes, ascending, each with the prefix and trailing rows around its patches.
        rank: rank of the tensor that the operand is broadcast to.
        batch_dim: the batch axis of that tensor, where the result has one row of positions per sample.
        per_sample: whether the operand has a batch axis of its own there.
        repeat: samples repeat so often along the batch axis, one after another (heads merged into the batch).
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

    def forward(self, operand: Tensor, positions: Tensor | None) -> Tensor:
        """Any shape that broadcasts to ``rank`` axes, and ``[batch, k]``; the result has ``rank`` axes."""
        if positions is None:
            return operand
        missing = self.rank - operand.ndim
        full = operand.reshape((1,) * missing + tuple(operand.shape))
        if not self.per_sample:
            shape = [-1] * self.rank
            shape[self.batch_dim] = positions.shape[0]
            full = full.expand(shape)
        elif self.repeat > 1:
            positions = positions.repeat_interleave(self.repeat, 0)
        for dim, lead, tail in self.dims:
            d = dim + missing
            rows = sequence_rows(positions, lead, full.shape[d] - lead - tail, tail)
            shape = [1] * self.rank
            shape[self.batch_dim], shape[d] = rows.shape
            sizes = list(full.shape)
            sizes[d] = rows.shape[1]
            places = rows if self.batch_dim < d else rows.T
            full = full.gather(d, places.reshape(shape).expand(sizes))
        if not self.per_sample and self.repeat > 1:
            full = full.repeat_interleave(self.repeat, self.batch_dim)
        return full
