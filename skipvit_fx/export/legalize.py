"""Inserted modules in the form that ONNX tools take best, swapped in on a copy.

The same numbers by other operators: TopK instead of a stable sort, indices in int32, rows taken from the flattened
``[batch * tokens, channels]`` with one Gather, and a return by Concat and Gather with the inverse permutation.
Nothing here scatters, and no shape depends on data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from skipvit_fx.ops.positions import GatherPositions
from skipvit_fx.ops.rows import same_rows, sequence_rows
from skipvit_fx.ops.select import Select, Survivors
from skipvit_fx.ops.skip import Fuse, Keep, Merge, PassAround


def legalize(module: nn.Module) -> None:
    """Swap every inserted module below ``module`` for its export form, in place: give it a copy."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            form = _FORMS.get(type(child))
            if form is not None:
                setattr(parent, name, form(child))


def flat_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Rows ``rows[b]`` of every sample: ``[batch, n, ...]``, ``[batch, k]`` to ``[batch, k, ...]``."""
    batch, count = x.shape[0], x.shape[1]
    flat = x.reshape(batch * count, *x.shape[2:])
    return flat.index_select(0, _flat(rows, batch, count)).reshape(batch, -1, *x.shape[2:])


def _flat(rows: Tensor, batch: int, count: int) -> Tensor:
    if isinstance(batch, int) and batch == 1:
        return rows.flatten()
    offsets = torch.arange(batch, dtype=torch.int32, device=rows.device) * count
    return (rows + offsets.unsqueeze(1)).flatten()


def _ascending(rows: Tensor) -> Tensor:
    """Sorted by value; as floats, which are exact up to 2**24 (2**11 in half precision)."""
    values = rows.to(torch.float32).topk(rows.shape[1], dim=1, largest=False).values
    return values.to(torch.int32)


def _mean(scores: list[Tensor]) -> Tensor:
    return scores[0] if len(scores) == 1 else torch.stack(scores).mean(0)


class _Select(nn.Module):
    """TopK over all patches: ONNX breaks ties in favour of the earlier one, as a stable sort does."""

    def __init__(self, op: Select) -> None:
        super().__init__()
        self.dropped = op.dropped

    def forward(self, *scores: Tensor | None) -> tuple[Tensor, Tensor] | tuple[None, None]:
        present = [score.detach() for score in scores if score is not None]
        if not present:
            return None, None
        total = _mean(present)
        n = total.shape[1]
        dropped = self.dropped(n)
        if dropped == 0:
            return None, None
        keep = n - dropped
        ranking = total.topk(n, dim=1).indices.to(torch.int32)
        return _ascending(ranking[:, :keep]), _ascending(ranking[:, keep:])


class _Survivors(nn.Module):
    def __init__(self, op: Survivors) -> None:
        super().__init__()

    def forward(self, before: Tensor | None, kept: Tensor | None) -> Tensor | None:
        if before is None or kept is None:
            return kept if before is None else before
        return flat_rows(before, kept)


class _Keep(Keep):
    def __init__(self, op: Keep) -> None:
        super().__init__(op.dim, op.lead, op.tail)

    def on_tokens(self, tokens: Tensor, kept: Tensor) -> Tensor:
        rows = sequence_rows(kept, self.lead, self.patch_count(tokens), self.tail)
        return flat_rows(tokens, rows)


class _PassAround(PassAround):
    def __init__(self, op: PassAround) -> None:
        super().__init__(op.dim, op.lead, op.tail)

    def on_tokens(self, tokens: Tensor, dropped: Tensor) -> Tensor:
        return flat_rows(tokens, dropped + self.lead)


class _Fuse(Fuse):
    def __init__(self, op: Fuse) -> None:
        super().__init__(op.dim, op.lead, op.tail)

    def on_tokens(self, tokens: Tensor, around: Tensor, dropped: Tensor, *scores: Tensor) -> Tensor:
        weights = flat_rows(_mean(list(scores)), dropped).to(around.dtype)
        fused = (around * weights.unsqueeze(-1)).sum(1, keepdim=True)
        end = tokens.shape[1] - self.tail
        parts = [tokens[:, :end], fused, tokens[:, end:]] if self.tail else [tokens, fused]
        return torch.cat(parts, 1)


class _Merge(Merge):
    """The inverse permutation by one TopK on the order; a fused token is cut away before."""

    def __init__(self, op: Merge) -> None:
        super().__init__(op.dim, op.lead, op.tail, op.fused)

    def on_tokens(self, tokens: Tensor, around: Tensor, kept: Tensor, dropped: Tensor) -> Tensor:
        order = torch.cat([kept, dropped], 1)
        n = order.shape[1]
        inverse = order.to(torch.float32).topk(n, dim=1, largest=False).indices.to(torch.int32)
        end = self.lead + kept.shape[1]
        whole = [tokens[:, :end] if self.fused or self.tail else tokens, around]
        if self.tail:
            whole.append(tokens[:, tokens.shape[1] - self.tail :])
        rows = sequence_rows(inverse, self.lead, n, self.tail)
        return flat_rows(torch.cat(whole, 1), rows)


class _GatherPositions(GatherPositions):
    """Rows of an operand by row gathers: from a shared operand directly, then from one a sample."""

    def __init__(self, op: GatherPositions) -> None:
        super().__init__(op.dims, op.rank, op.batch_dim, op.per_sample, op.repeat)

    def forward(self, operand: Tensor, positions: Tensor | None) -> Tensor:
        if positions is None:
            return operand
        missing = self.rank - operand.ndim
        full = operand.reshape((1,) * missing + tuple(operand.shape))
        per_sample = self.per_sample
        if per_sample and self.repeat > 1:
            positions = self._repeated(positions, 0)
        for dim, lead, tail in self.dims:
            d = dim + missing
            rows = sequence_rows(positions, lead, full.shape[d] - lead - tail, tail)
            if not per_sample:  # the batch axis is 1: it comes from the rows
                near = full.index_select(d, rows.flatten())
                near = near.reshape(*full.shape[:d], *rows.shape, *full.shape[d + 1 :])
                full = near.movedim(d, self.batch_dim).squeeze(self.batch_dim + 1)
                per_sample = True
                continue
            front = full.movedim((self.batch_dim, d), (0, 1))
            full = flat_rows(front, rows).movedim((0, 1), (self.batch_dim, d))
        if not self.per_sample and self.repeat > 1:
            full = self._repeated(full, self.batch_dim)
        return full

    def _repeated(self, x: Tensor, dim: int) -> Tensor:
        sizes = [-1] * (x.ndim + 1)
        sizes[dim + 1] = self.repeat
        return x.unsqueeze(dim + 1).expand(sizes).flatten(dim, dim + 1)


class KeptPositions(nn.Module):
    """The kept patches of every stage by their position in the full grid.

    Args:
        patches: patches in the full grid; fused tokens count on from there.
        fused: whether every stage leaves a fused token behind the kept ones.
    """

    def __init__(self, patches: int, fused: bool) -> None:
        super().__init__()
        self.patches = patches
        self.fused = fused

    def forward(self, *kept: Tensor | None) -> tuple[Tensor, ...]:
        """``[batch, k]`` a stage, from what each stage chose of those before it; no entry where nothing is dropped."""
        found: list[Tensor] = []
        for choice in kept:
            if choice is None:
                continue
            before = found[-1] if found else None
            if before is not None and self.fused:
                name = self.patches + len(found) - 1
                before = torch.cat([before, same_rows(name, name + 1, before)], 1)
            found.append(choice if before is None else flat_rows(before, choice))
        return tuple(found)


_FORMS: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    Select: _Select,
    Survivors: _Survivors,
    Keep: _Keep,
    PassAround: _PassAround,
    Fuse: _Fuse,
    Merge: _Merge,
    GatherPositions: _GatherPositions,
}
