"""Which patches stay and which leave."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor, nn

from skipvit_fx.ops.following import kept_whole, sizes
from skipvit_fx.ops.rows import ascending, rows_of
from skipvit_fx.plan import leaving


class Amount(nn.Module):
    """How many of the patches that are present leave.

    Args:
        amount: the ratio of the present patches that leave, or their number, as in the plan.
        multiple_of: more patches stay, so that the length of the shortened sequence is a multiple of this.
        others: the number of tokens of the shortened sequence that are not kept patches: prefix, trailing and fused
            ones.

    Attributes:
        current: the amount that applies now; less than ``amount`` while a schedule raises it.
    """

    def __init__(self, amount: Fraction | int, multiple_of: int = 1, others: int = 0) -> None:
        super().__init__()
        self.amount = amount
        self.current = amount
        self.multiple_of = multiple_of
        self.others = others

    def most(self, n: int) -> int:
        """How many of ``n`` patches may leave."""
        return n

    def dropped(self, n: int) -> int:
        """How many of ``n`` patches leave."""
        stay = n - min(leaving(self.current, n), self.most(n)) + self.others
        aligned = -(-stay // self.multiple_of) * self.multiple_of
        return max(0, n + self.others - aligned)

    def extra_repr(self) -> str:
        aligned = f", multiple of {self.multiple_of}" if self.multiple_of > 1 else ""
        amount = (
            f"{float(self.current):.1%}" if isinstance(self.current, Fraction) else self.current
        )
        return f"drop {amount}{aligned}"


class Select(Amount):
    """Keeps the patches with the highest scores, ``ceil((1 - ratio) * n)`` of them, in their original order.

    Ties are broken in favour of the earlier patch. No gradient flows through the choice.
    """

    @kept_whole
    def forward(self, *scores: Tensor | None) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Kept ``[batch, k]`` and dropped ``[batch, n - k]`` patch indices, int32, both ascending.

        Several scores ``[batch, n]`` (parallel attentions of one layer) count equally. ``(None, None)`` if there is no
        score, or nothing is to be dropped.
        """
        present = [score.detach() for score in scores if score is not None]
        if not present:
            return None, None
        total = present[0] if len(present) == 1 else torch.stack(present).mean(0)
        n = sizes(total)[1]
        dropped = self.dropped(n)
        return (None, None) if dropped == 0 else partition(total, n - dropped)


def partition(scores: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """The ``kept`` highest of ``[batch, n]`` scores, and the others: their indices, int32, ascending.

    Of equal scores the earlier counts as higher, and NaN counts as higher than any number.

    It uses operators that every tool knows, and is correct whatever these do with equal values: only the values of
    ``topk`` are read, and the sorted values are distinct.
    """
    if scores.dtype == torch.bool:
        scores = scores.to(torch.uint8)  # topk does not take booleans
    n = sizes(scores)[1]
    highest = scores.topk(kept, dim=1, sorted=False).values
    edge = highest.topk(1, dim=1, largest=False).values  # amin would return NaN
    # A distinct number for every patch, lower is better: first those whose score is NaN, then those
    # above, on and below the edge, and within each kind the earlier first. Those on the edge count
    # from 0, so that a device that computes in half precision can tell most of them apart.
    places = torch.arange(n, dtype=torch.float32, device=scores.device)
    places = places.add(scores < edge, alpha=float(n)).add(scores > edge, alpha=float(-n))
    places = places.add(scores != scores, alpha=-2.0 * n)
    order = places.argsort(dim=1).to(torch.int32)
    return ascending(order[:, :kept]), ascending(order[:, kept:])


class Survivors(nn.Module):
    """Positions of a later stage's kept patches in the full sequence, from those of the previous stage."""

    @kept_whole
    def forward(self, before: Tensor | None, kept: Tensor | None) -> Tensor | None:
        """``[batch, k]`` positions; ``before`` is ``[batch, n]``, ``kept`` indexes into it. ``None`` is "all"."""
        if before is None or kept is None:
            return kept if before is None else before
        return rows_of(before, kept)
