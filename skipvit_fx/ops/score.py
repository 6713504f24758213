"""The importance of each patch token: one row of attention, or another score."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from skipvit_fx.ops.following import kept_whole, sizes
from skipvit_fx.ops.switch import Switchable


def _probabilities(logits: Tensor) -> Tensor:
    """Softmax over the last axis, in float32 if the logits are narrower, so that close scores stay apart."""
    narrow = logits.dtype in (torch.float16, torch.bfloat16)
    return logits.softmax(-1, dtype=torch.float32 if narrow else None)


def _row(x: Tensor, dim: int, query: int | None) -> Tensor:
    """One row along ``dim``, kept as an axis of length 1: row ``query`` (from either end), or the mean of all."""
    return x.mean(dim, keepdim=True) if query is None else x.narrow(dim, query, 1)


def _logits_row(x: Tensor, dim: int, query: int | None) -> Tensor:
    """The same for logits or a mask: the mean for a key is over the queries from which no mask hides it."""
    if query is not None:
        return _row(x, dim, query)
    hidden = x == -torch.inf
    seeing = (~hidden).to(x.dtype).sum(dim, keepdim=True)
    total = x.masked_fill(hidden, 0.0).sum(dim, keepdim=True)
    return (total / seeing.clamp(min=1.0)).masked_fill(seeing == 0, -torch.inf)


class ScoreByQuery(Switchable):
    """The attention that one query pays to every patch: ``softmax(q k^T * scale + mask)``, mean over heads.

    See the paper's section "Identifying Important Patches". The attention itself stays fused: only this row is computed
    in addition.

    Args:
        query: the row of the queries that scores: 0 for a class token at the front, -1 for one at the end; ``None`` for
            the mean of all queries, or of those from which no mask hides the key.
        prefix, suffix: the numbers of keys before and after the patches.
        heads: heads per sample: the product of all axes except the batch, the rows and the channels.
        scale: of the logits; ``None`` for ``1 / sqrt(channels)``.
    """

    def __init__(
        self, query: int | None, prefix: int, suffix: int, heads: int, scale: float | None
    ) -> None:
        super().__init__()
        self.query = query
        self.prefix = prefix
        self.suffix = suffix
        self.heads = heads
        self.scale = scale

    @kept_whole
    def forward(self, query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor | None:
        """Scores ``[batch, patches]`` from ``[..., queries, channels]`` and ``[..., keys, channels]``."""
        if not self.active:
            return None
        scale = self.scale if self.scale is not None else sizes(query)[-1] ** -0.5
        if key.ndim > 2 and sizes(key)[-3] != sizes(query)[-3]:  # grouped queries share their keys
            key = key.repeat_interleave(sizes(query)[-3] // sizes(key)[-3], -3)
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -torch.inf)
        if mask is None or self.query is not None or sizes(mask)[-2] == 1:
            logits = (_row(query, -2, self.query) * scale) @ key.transpose(-2, -1)
        else:
            seeing = (mask > -torch.inf).to(query.dtype).transpose(-2, -1)
            asking = seeing @ query / seeing.sum(-1, keepdim=True).clamp(min=1.0)
            logits = (asking * scale * key).sum(-1).unsqueeze(-2)
        if mask is not None:
            logits = logits + (mask if sizes(mask)[-2] == 1 else _logits_row(mask, -2, self.query))
        return _patches(_probabilities(logits), self.heads, self.prefix, self.suffix)

    def extra_repr(self) -> str:
        return f"query={'mean' if self.query is None else self.query}"


def _patches(probabilities: Tensor, heads: int, prefix: int, suffix: int) -> Tensor:
    keys = probabilities.shape[-1]
    mean = probabilities.reshape(-1, heads, keys).mean(1)
    return mean[:, prefix : keys - suffix]


class ScoreByWeights(Switchable):
    """The same score for a model that spells its attention out: one row of its matrix is read.

    Args:
        query: the row that scores; ``None`` for the mean of all, taken before the softmax.
        query_dim, key_dim: the matrix's query axis and its key axis, counted from the right (negative).
        prefix, suffix, heads: as in :class:`ScoreByQuery`.
    """

    def __init__(
        self,
        query: int | None,
        query_dim: int,
        key_dim: int,
        prefix: int,
        suffix: int,
        heads: int,
    ) -> None:
        super().__init__()
        self.query = query
        self.query_dim = query_dim
        self.key_dim = key_dim
        self.prefix = prefix
        self.suffix = suffix
        self.heads = heads

    @kept_whole
    def forward(self, matrix: Tensor) -> Tensor | None:
        """Scores ``[batch, patches]`` from the weights (class token) or the logits (mean query)."""
        if not self.active:
            return None
        row = _logits_row(matrix, self.query_dim, self.query)
        row = row.movedim((self.query_dim, self.key_dim), (-2, -1))
        probabilities = _probabilities(row) if self.query is None else row
        return _patches(probabilities, self.heads, self.prefix, self.suffix)

    def extra_repr(self) -> str:
        return f"query={'mean' if self.query is None else self.query}"


class ScoreAtRandom(Switchable):
    """Uniform random scores, new in every call: the baseline that every other score must beat."""

    def __init__(self, dim: int, prefix: int, suffix: int) -> None:
        super().__init__()
        self.dim = dim
        self.prefix = prefix
        self.suffix = suffix

    @kept_whole
    def forward(self, stream: Tensor) -> Tensor | None:
        """Scores ``[batch, patches]`` from a stream with its tokens at ``dim`` 0 or 1, the batch at the other."""
        if not self.active:
            return None
        patches = stream.shape[self.dim] - self.prefix - self.suffix
        return torch.rand(stream.shape[1 - self.dim], patches, device=stream.device)


class ScoreByFunction(Switchable):
    """The user's score: a function from patch tokens ``[batch, patches, channels]`` to ``[batch, patches]``."""

    def __init__(
        self, function: Callable[[Tensor], Tensor], dim: int, prefix: int, suffix: int
    ) -> None:
        super().__init__()
        self.function = function
        self.dim = dim
        self.prefix = prefix
        self.suffix = suffix

    @kept_whole
    def forward(self, stream: Tensor) -> Tensor | None:
        """Scores ``[batch, patches]`` from a stream as in :class:`ScoreAtRandom`.

        Raises:
            ValueError: the function returned another shape.
        """
        if not self.active:
            return None
        tokens = stream if self.dim == 1 else stream.transpose(0, 1)
        patches = tokens[:, self.prefix : tokens.shape[1] - self.suffix]
        scores = self.function(patches)
        if sizes(scores) != sizes(patches)[:2]:
            raise ValueError(
                f"the score function returned shape {tuple(scores.shape)}, expected {tuple(patches.shape[:2])}"
            )
        return scores
