"""The importance of each patch token: one row of attention, or another score."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from skipvit_fx.ops.following import kept_whole, sizes
from skipvit_fx.ops.operands import OperandLayout
from skipvit_fx.ops.switch import Switchable

Asking: TypeAlias = int | Literal["mean", "all"]
"""Who pays the attention that scores: one row of the queries (from either end), their mean, taken before the softmax,
or all of them, with the mean taken after it."""


def _narrow(x: Tensor) -> bool:
    """Whether numbers are so narrow that close scores would become equal."""
    return x.dtype in (torch.float16, torch.bfloat16)


def _probabilities(logits: Tensor) -> Tensor:
    """Softmax over the last axis, in float32 if the logits are narrower, so that close scores stay apart."""
    return logits.softmax(-1, dtype=torch.float32 if _narrow(logits) else None)


def _row(x: Tensor, dim: int, query: int | Literal["mean"]) -> Tensor:
    """One row along ``dim``, kept as an axis of length 1: row ``query`` (from either end), or the mean of all."""
    return x.mean(dim, keepdim=True) if query == "mean" else x.narrow(dim, query, 1)


def _logits_row(x: Tensor, dim: int, query: int | Literal["mean"]) -> Tensor:
    """The same for logits or a mask: the mean for a key is over the queries from which no mask hides it."""
    if query != "mean":
        return _row(x, dim, query)
    hidden = x == -torch.inf
    seeing = (~hidden).to(x.dtype).sum(dim, keepdim=True)
    total = x.masked_fill(hidden, 0.0).sum(dim, keepdim=True)
    return (total / seeing.clamp(min=1.0)).masked_fill(seeing == 0, -torch.inf)


class AttentionScore(Switchable):
    """The attention that is paid to every patch, of each head or as a mean over heads.

    See the paper's section "Identifying Important Patches". By what all queries pay, Yang et al. select in encoders
    without a class token ("VisionZip: Longer is Better but Not Necessary in Vision Language Models", arXiv 2412.04467).

    Args:
        asking: who pays it.
        prefix, suffix: the numbers of keys before and after the patches.
        heads: heads per sample: the product of all axes except the batch, the queries and the keys.
        each_head: whether heads stay apart.
    """

    def __init__(
        self, asking: Asking, prefix: int, suffix: int, heads: int, each_head: bool = False
    ) -> None:
        super().__init__()
        self.asking = asking
        self.prefix = prefix
        self.suffix = suffix
        self.heads = heads
        self.each_head = each_head

    def of_patches(self, probabilities: Tensor) -> Tensor:
        """``[batch, patches]``, or ``[batch, heads, patches]``, from one row of probabilities ``[..., 1, keys]``."""
        keys = probabilities.shape[-1]
        rows = probabilities.reshape(-1, self.heads, keys)
        return (rows if self.each_head else rows.mean(1))[..., self.prefix : keys - self.suffix]

    def extra_repr(self) -> str:
        return f"asking={self.asking}"


class ScoreByQuery(AttentionScore):
    """Beside a fused attention: ``softmax(q k^T * scale + mask)``.

    The attention itself stays fused. Only one row is computed in addition, except if all queries score: then the whole
    matrix is, here.

    Args:
        scale: of the logits; ``None`` for ``1 / sqrt(channels)``.
        asking, prefix, suffix, heads, each_head: as in :class:`AttentionScore`.
    """

    def __init__(
        self,
        asking: Asking,
        prefix: int,
        suffix: int,
        heads: int,
        scale: float | None,
        each_head: bool = False,
    ) -> None:
        super().__init__(asking, prefix, suffix, heads, each_head)
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
        if self.asking == "all":
            return self.of_patches(_received(query * scale, key, mask))
        if mask is None or self.asking != "mean" or sizes(mask)[-2] == 1:
            logits = (_row(query, -2, self.asking) * scale) @ key.transpose(-2, -1)
        else:
            seeing = (mask > -torch.inf).to(query.dtype).transpose(-2, -1)
            asking = seeing @ query / seeing.sum(-1, keepdim=True).clamp(min=1.0)
            logits = (asking * scale * key).sum(-1).unsqueeze(-2)
        if mask is not None:
            logits = logits + (mask if sizes(mask)[-2] == 1 else _logits_row(mask, -2, self.asking))
        return self.of_patches(_probabilities(logits))


def _received(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """What each key gets of all queries, on average; queries from which all keys are hidden give nothing."""
    logits = query @ key.transpose(-2, -1)
    if mask is None:
        return _probabilities(logits).mean(-2, keepdim=True)
    logits = logits + mask
    blind = (logits == -torch.inf).all(-1, keepdim=True)
    return _probabilities(logits).masked_fill(blind, 0.0).mean(-2, keepdim=True)


class ScoreByWeights(AttentionScore):
    """The same score for a model that spells its attention out: rows of its matrix are read.

    Args:
        query_dim, key_dim: the matrix's query axis and its key axis, counted from the right (negative).
        asking, prefix, suffix, heads, each_head: as in :class:`AttentionScore`.
    """

    def __init__(
        self,
        asking: Asking,
        query_dim: int,
        key_dim: int,
        prefix: int,
        suffix: int,
        heads: int,
        each_head: bool = False,
    ) -> None:
        super().__init__(asking, prefix, suffix, heads, each_head)
        self.query_dim = query_dim
        self.key_dim = key_dim

    @kept_whole
    def forward(self, matrix: Tensor) -> Tensor | None:
        """Scores ``[batch, patches]`` from the weights, or the logits if the mean query asks."""
        if not self.active:
            return None
        if self.asking == "all":
            wide = torch.float32 if _narrow(matrix) else None
            row = matrix.mean(self.query_dim, keepdim=True, dtype=wide)
        else:
            row = _logits_row(matrix, self.query_dim, self.asking)
        row = row.movedim((self.query_dim, self.key_dim), (-2, -1))
        return self.of_patches(_probabilities(row) if self.asking == "mean" else row)


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
    """A function from patch tokens ``[batch, patches, channels]`` to ``[batch, patches]``.

    Args:
        function: what it asks for besides the tokens, it gets by name.
        dim, prefix, suffix: of the stream, as in :class:`ScoreAtRandom`.
        operands: the name of each other argument of ``forward``, and how it lies; ``None`` for attention, which is
            ``[batch, heads, patches]`` already. Those of one name, from parallel attentions, are joined along heads.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        dim: int,
        prefix: int,
        suffix: int,
        operands: tuple[tuple[str, OperandLayout | None], ...] = (),
    ) -> None:
        super().__init__()
        self.function = function
        self.dim = dim
        self.prefix = prefix
        self.suffix = suffix
        self.operands = operands

    @kept_whole
    def forward(self, stream: Tensor, *operands: Tensor) -> Tensor | None:
        """Scores ``[batch, patches]`` from a stream as in :class:`ScoreAtRandom`.

        Raises:
            ValueError: the function returned another shape.
        """
        if not self.active:
            return None
        tokens = stream if self.dim == 1 else stream.transpose(0, 1)
        patches = tokens[:, self.prefix : tokens.shape[1] - self.suffix]
        parts: dict[str, list[Tensor]] = {}
        for (name, layout), operand in zip(self.operands, operands, strict=True):
            part = operand if layout is None else layout.patches(operand)
            parts.setdefault(name, []).append(part)
        named = {
            name: heads[0] if len(heads) == 1 else torch.cat(heads, 1)
            for name, heads in parts.items()
        }
        scores = self.function(patches, **named)
        if sizes(scores) != sizes(patches)[:2]:
            raise ValueError(
                f"the score function returned shape {tuple(scores.shape)}, expected {tuple(patches.shape[:2])}"
            )
        return scores

    def extra_repr(self) -> str:
        named = ", ".join(["tokens", *dict.fromkeys(name for name, _ in self.operands)])
        return f"{getattr(self.function, '__name__', 'function')}({named})"
