"""Which patches stay, which go."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor, nn

from skipvit_fx.ops.following import kept_whole, sizes
from skipvit_fx.ops.rows import ascending, rows_of


class Select(nn.Module):
    """Keeps the patches with the highest scores, ``ceil((1 - ratio) * n)`` of them, in their original order.

    Ties are broken in favour of the earlier patch. No gradient flows through the choice.

    Args:
        ratio: of the patches present that leave, as the plan says.
        multiple_of: more stay, so that the shortened sequence has a multiple of so many tokens.
        others: tokens of the shortened sequence that are no kept patches: prefix, trailing and fused ones.

    Attributes:
        current: the ratio that applies now; less than ``ratio`` while a schedule raises it.
    """

    def __init__(self, ratio: Fraction, multiple_of: int = 1, others: int = 0) -> None:
        super().__init__()
        self.ratio = ratio
        self.current = ratio
        self.multiple_of = multiple_of
        self.others = others

    def dropped(self, n: int) -> int:
        """How many of ``n`` patches leave."""
        stay = n - self.current.numerator * n // self.current.denominator + self.others
        aligned = -(-stay // self.multiple_of) * self.multiple_of
        return max(0, n + self.others - aligned)

    @kept_whole
    def forward(self, *scores: Tensor | None) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Kept ``[batch, k]`` and dropped ``[batch, n - k]`` patch indices, int32, both ascending.

        Several scores ``[batch, n]`` (parallel attentions of one layer) count equally. ``(None, None)`` where a score
        stepped aside or nothing is to be dropped.
        """
        present = [score.detach() for score in scores if score is not None]
        if not present:
            return None, None
        total = present[0] if len(present) == 1 else torch.stack(present).mean(0)
        n = sizes(total)[1]
        dropped = self.dropped(n)
        return (None, None) if dropped == 0 else partition(total, n - dropped)

    def extra_repr(self) -> str:
        aligned = f", multiple of {self.multiple_of}" if self.multiple_of > 1 else ""
        return f"drop {float(self.current):.1%}{aligned}"


def partition(scores: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """The ``kept`` highest of ``[batch, n]`` scores, and the others: their indices, int32, ascending.

    Of equal scores the earlier is the higher, and what is no number is higher than any number.

    By operators that every tool knows, and right whatever these do with equal values: of ``topk`` only values are read,
    and what is sorted has no value twice.
    """
    if scores.dtype == torch.bool:
        scores = scores.to(torch.uint8)  # topk takes no booleans
    n = sizes(scores)[1]
    highest = scores.topk(kept, dim=1, sorted=False).values
    edge = highest.topk(1, dim=1, largest=False).values  # amin would see what is no number first
    # A number for every patch, the lower the better, no two alike: first those whose score is no number, then those
    # above the edge, on it and below it, and of each kind the earlier first. Those on the edge count from 0, so that a
    # device that computes in half precision tells the most of them apart.
    places = torch.arange(n, dtype=torch.float32, device=scores.device)
    places = places.add(scores < edge, alpha=float(n)).add(scores > edge, alpha=float(-n))
    places = places.add(scores != scores, alpha=-2.0 * n)
    order = places.argsort(dim=1).to(torch.int32)
    return ascending(order[:, :kept]), ascending(order[:, kept:])


class Survivors(nn.Module):
    """Positions of a later stage's kept patches in the full sequence, from those of the stage before it."""

    @kept_whole
    def forward(self, before: Tensor | None, kept: Tensor | None) -> Tensor | None:
        """``[batch, k]`` positions; ``before`` is ``[batch, n]``, ``kept`` indexes into it. ``None`` is "all"."""
        if before is None or kept is None:
            return kept if before is None else before
        return rows_of(before, kept)
