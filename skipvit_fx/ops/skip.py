"""Tokens leave the sequence, pass around, and return."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from skipvit_fx.ops.rows import inverse_rows, sequence_rows, take_rows


class _OnStream(nn.Module):
    """Works on a residual stream with its tokens at ``dim`` 0 or 1, the batch at the other."""

    def __init__(self, dim: int, lead: int, tail: int) -> None:
        super().__init__()
        self.dim = dim
        self.lead = lead
        self.tail = tail

    def _batch_first(self, stream: Tensor) -> Tensor:
        return stream if self.dim == 1 else stream.transpose(0, 1)

    def _patch_count(self, stream: Tensor) -> int:
        return stream.shape[1] - self.lead - self.tail


class Keep(_OnStream):
    """The sequence without the dropped patches; prefix and trailing tokens stay."""

    def forward(self, stream: Tensor, kept: Tensor | None) -> Tensor:
        """``[batch, tokens, channels]`` to ``[batch, lead + k + tail, channels]``."""
        if kept is None:
            return stream
        tokens = self._batch_first(stream)
        rows = sequence_rows(kept, self.lead, self._patch_count(tokens), self.tail)
        return self._batch_first(take_rows(tokens, rows))


class PassAround(_OnStream):
    """The dropped patches in the state they have now: the token-level skip connection."""

    def forward(self, stream: Tensor, dropped: Tensor | None) -> Tensor | None:
        """``[batch, tokens, channels]`` to ``[batch, d, channels]``."""
        if dropped is None:
            return None
        return take_rows(self._batch_first(stream), dropped + self.lead)


class Fuse(_OnStream):
    """One token that stands in for the dropped ones: their sum weighted by their scores, not normalised (EViT).

    It is appended behind the kept patches, and counts as a patch from then on.
    """

    def forward(
        self, kept_stream: Tensor, around: Tensor | None, dropped: Tensor | None, *scores: Tensor
    ) -> Tensor:
        """``[batch, lead + k + tail, channels]`` to ``[batch, lead + k + 1 + tail, channels]``."""
        if around is None or dropped is None:
            return kept_stream
        total = scores[0] if len(scores) == 1 else torch.stack(scores).mean(0)
        weights = take_rows(total.unsqueeze(-1), dropped).to(around.dtype)
        fused = (around * weights).sum(1, keepdim=True)
        tokens = self._batch_first(kept_stream)
        end = tokens.shape[1] - self.tail
        return self._batch_first(torch.cat([tokens[:, :end], fused, tokens[:, end:]], 1))


class Merge(_OnStream):
    """The dropped patches return to their original positions; a fused token's work is done and it leaves.

    By concatenation and one row gather with the inverse permutation: no scatter.
    """

    def __init__(self, dim: int, lead: int, tail: int, fused: bool) -> None:
        super().__init__(dim, lead, tail)
        self.fused = fused

    def forward(
        self, stream: Tensor, around: Tensor | None, kept: Tensor | None, dropped: Tensor | None
    ) -> Tensor:
        """``[batch, lead + k + tail, channels]`` and ``[batch, d, channels]`` to ``[batch, tokens, channels]``."""
        if around is None or kept is None or dropped is None:
            return stream
        tokens = self._batch_first(stream)
        k = kept.shape[1]
        inverse = inverse_rows(torch.cat([kept, dropped], 1), k + dropped.shape[1])
        extra = self.tail + int(self.fused)
        if extra:  # rows of the dropped ones come behind the trailing tokens
            inverse = inverse + (inverse >= k) * extra
        rows = inverse + self.lead
        parts = [rows]
        batch = rows.shape[0]
        if self.lead:
            parts.insert(0, torch.arange(self.lead, device=rows.device).expand(batch, self.lead))
        if self.tail:
            start = self.lead + k + int(self.fused)
            last = torch.arange(start, start + self.tail, device=rows.device)
            parts.append(last.expand(batch, self.tail))
        whole = torch.cat([tokens, around], 1)
        return self._batch_first(take_rows(whole, torch.cat(parts, 1)))
