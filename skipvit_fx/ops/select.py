"""Which patches stay, which go."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor, nn


class Select(nn.Module):
    """Keeps the patches with the highest scores, ``ceil((1 - ratio) * n)`` of them, in their original order.

    Ties are broken in favour of the earlier patch. No gradient flows through the choice.
    """

    def __init__(self, ratio: Fraction) -> None:
        super().__init__()
        self.ratio = ratio

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
        dropped = self.ratio.numerator * n // self.ratio.denominator
        if dropped == 0:
            return None, None
        ranking = total.argsort(dim=1, descending=True, stable=True)
        kept = ranking[:, : n - dropped].sort(dim=1).values
        return kept, ranking[:, n - dropped :].sort(dim=1).values

    def extra_repr(self) -> str:
        return f"drop {float(self.ratio):.1%}"


class Survivors(nn.Module):
    """Positions of a later stage's kept patches in the full sequence, from those of the stage before it."""

    def forward(self, before: Tensor | None, kept: Tensor | None) -> Tensor | None:
        """``[batch, k]`` positions; ``before`` is ``[batch, n]``, ``kept`` indexes into it. ``None`` is "all"."""
        if before is None or kept is None:
            return kept if before is None else before
        return before.gather(1, kept)
