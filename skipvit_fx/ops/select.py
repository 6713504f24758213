"""Which patches stay, which go."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor, nn


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

    def forward(self, *scores: Tensor | None) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Kept ``[batch, k]`` and dropped ``[batch, n - k]`` patch indices, both ascending.

        Several scores ``[batch, n]`` (parallel attentions of one layer) count equally. ``(None, None)`` where a score
        stepped aside or nothing is to be dropped.
        """
        present = [score.detach() for score in scores if score is not None]
        if not present:
            return None, None
        total = present[0] if len(present) == 1 else torch.stack(present).mean(0)
        n = total.shape[1]
        dropped = self.dropped(n)
        if dropped == 0:
            return None, None
        kept = n - dropped
        best = total.argsort(dim=1, descending=True, stable=True)[:, :kept]
        leaves = torch.ones_like(total).scatter_(1, best, 0.0)
        order = leaves.argsort(dim=1, stable=True)  # both groups in their original order
        return order[:, :kept], order[:, kept:]

    def extra_repr(self) -> str:
        aligned = f", multiple of {self.multiple_of}" if self.multiple_of > 1 else ""
        return f"drop {float(self.current):.1%}{aligned}"


class Survivors(nn.Module):
    """Positions of a later stage's kept patches in the full sequence, from those of the stage before it."""

    def forward(self, before: Tensor | None, kept: Tensor | None) -> Tensor | None:
        """``[batch, k]`` positions; ``before`` is ``[batch, n]``, ``kept`` indexes into it. ``None`` is "all"."""
        if before is None or kept is None:
            return kept if before is None else before
        return before.gather(1, kept)
