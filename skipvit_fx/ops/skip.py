"""Tokens leave the sequence, pass around, and return."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from skipvit_fx.ops.following import kept_whole
from skipvit_fx.ops.rows import inverse_order, sequence_rows, take_rows


class OnStream(nn.Module):
    """Works on a residual stream with its tokens at ``dim`` 0 or 1, the batch at the other.

    The stream passes through unchanged if any other operand is ``None``, which means that nothing is dropped.
    Subclasses define ``on_tokens``, which gets the stream batch first and returns it batch first.
    """

    on_tokens: Callable[..., Tensor]

    def __init__(self, dim: int, prefix: int, suffix: int) -> None:
        super().__init__()
        self.dim = dim
        self.prefix = prefix
        self.suffix = suffix

    @kept_whole
    def forward(self, stream: Tensor, *others: Tensor | None) -> Tensor | None:
        if any(other is None for other in others):
            return stream
        return self.batch_first(self.on_tokens(self.batch_first(stream), *others))

    def batch_first(self, stream: Tensor) -> Tensor:
        """The stream with its batch axis first, or back again."""
        return stream if self.dim == 1 else stream.transpose(0, 1)

    def patch_count(self, tokens: Tensor) -> int:
        """The number of patches in ``[batch, tokens, channels]``."""
        return tokens.shape[1] - self.prefix - self.suffix


class Keep(OnStream):
    """The sequence without the dropped patches; prefix and trailing tokens stay."""

    def on_tokens(self, tokens: Tensor, kept: Tensor) -> Tensor:
        """``[batch, tokens, channels]`` to ``[batch, prefix + k + suffix, channels]``."""
        rows = sequence_rows(kept, self.prefix, self.patch_count(tokens), self.suffix)
        return take_rows(tokens, rows)


class PassAround(OnStream):
    """The dropped patches in their current state: the token-level skip connection."""

    @kept_whole
    def forward(self, stream: Tensor, *others: Tensor | None) -> Tensor | None:
        """``[batch, tokens, channels]`` to ``[batch, d, channels]``; the result is always batch first."""
        (dropped,) = others
        return None if dropped is None else self.on_tokens(self.batch_first(stream), dropped)

    def on_tokens(self, tokens: Tensor, dropped: Tensor) -> Tensor:
        """``[batch, tokens, channels]`` to ``[batch, d, channels]``."""
        return take_rows(tokens, dropped + self.prefix)


class Fuse(OnStream):
    """One token that stands in for the dropped ones: their sum weighted by their scores, not normalised (EViT).

    It is appended after the kept patches, and counts as a patch from then on.
    """

    def on_tokens(self, tokens: Tensor, around: Tensor, dropped: Tensor, *scores: Tensor) -> Tensor:
        """``[batch, prefix + k + suffix, channels]`` to ``[batch, prefix + k + 1 + suffix, channels]``."""
        total = scores[0] if len(scores) == 1 else torch.stack(scores).mean(0)
        weights = take_rows(total.unsqueeze(-1), dropped).to(around.dtype)
        fused = (around * weights).sum(1, keepdim=True)
        end = tokens.shape[1] - self.suffix
        return torch.cat([tokens[:, :end], fused, tokens[:, end:]], 1)


class PutBack(OnStream):
    """The dropped patches return to their original positions; a fused token is removed.

    This is done by concatenation and one row gather with the inverse permutation, without a scatter.
    """

    def __init__(self, dim: int, prefix: int, suffix: int, fused: bool) -> None:
        super().__init__(dim, prefix, suffix)
        self.fused = fused

    def on_tokens(self, tokens: Tensor, around: Tensor, kept: Tensor, dropped: Tensor) -> Tensor:
        """``[batch, prefix + k + suffix, channels]`` and ``[batch, d, channels]`` to ``[batch, tokens, channels]``."""
        order = torch.cat([kept, dropped], 1)
        end = self.prefix + kept.shape[1]
        parts = [tokens[:, :end] if self.fused or self.suffix else tokens, around]
        if self.suffix:
            parts.append(tokens[:, tokens.shape[1] - self.suffix :])
        rows = sequence_rows(inverse_order(order), self.prefix, order.shape[1], self.suffix)
        return take_rows(torch.cat(parts, 1), rows)
