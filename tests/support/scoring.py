"""Scores of patches, worked out on the original model from the factors of its own matrix products."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from support.reference import MaskedRun, ReferenceResult, Stages

aten = torch.ops.aten

Kind = Literal["received", "values", "keys", "all"]


def of_everything(
    tokens: Tensor, *, keys: Tensor, queries: Tensor, values: Tensor, attention: Tensor
) -> Tensor:
    """A score function that reads all there is, and that no constant factor of queries or keys changes."""
    own = F.cosine_similarity(queries.mean(1), keys.mean(1), dim=-1)
    lengths = values.norm(dim=-1).mean(1)
    return attention.mean(1) * lengths + 0.1 * own + 0.01 * tokens.norm(dim=-1)


class _Factors(TorchDispatchMode):
    """Notes what attention multiplies, however an author spells it."""

    def __init__(self, run: ScoringRun) -> None:
        super().__init__()
        self.run = run

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (aten.bmm.default, aten.baddbmm.default) and self.run.layer:
            self.run.note(args[-2], args[-1], out)
        return out


class ScoringRun(MaskedRun):
    """A masked run that scores in another way; ``kind`` is set before it is called."""

    kind: Kind

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.product: tuple[Tensor, Tensor] | None = None  # the last one that may be logits
        self.queries: list[Tensor] = []  # [B, H, N, D] of each attention of the layer
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.matrices: list[Tensor] = []  # [B, H, N, N]

    def note(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        """A product in an attention; ``[B * H, ...]`` each."""
        square = (self._tokens(),) * 2
        if len(self.values) < len(self.matrices):  # a softmax waits for its values
            if left.shape[1:] == square:
                self.values.append(self._heads(right))
            elif right.shape[1:] == square:
                self.values.append(self._heads(left.mT))
        elif out.shape[1:] == square:
            self.product = left, right

    def _heads(self, x: Tensor) -> Tensor:
        assert self.gone is not None
        return x.reshape(self.gone.shape[0], -1, *x.shape[1:])

    def _weights(self, logits: Tensor, axis: int) -> Tensor:
        weights = super()._weights(logits, axis)
        n = self._tokens()
        if self.layer in self.stages and logits.shape[axis - 1] == logits.shape[axis] == n:
            assert self.product is not None
            query, key = self.product
            self.queries.append(self._heads(query))
            self.keys.append(self._heads(key.mT))
            flat = weights.movedim((axis - 1, axis), (-2, -1))
            assert self.gone is not None
            self.matrices.append(flat.reshape(self.gone.shape[0], -1, n, n))
        return weights

    def _decide(self, layer: int, state: Tensor) -> None:
        assert self.gone is not None
        assert len(self.keys) == len(self.values) == len(self.seen)
        attention = torch.stack(self.seen).mean(0)
        tokens = state if self.layout.token_dim == 1 else state.transpose(0, 1)
        scores = torch.zeros_like(attention)
        for b, gone in enumerate(self.gone):
            there = (~gone).nonzero()[:, 0].tolist()
            last = len(gone) - self.layout.suffix
            patches = [i for i in there if self.layout.prefix <= i < last]
            for i in patches:
                scores[b, i] = self._score(b, i, patches, there, attention[b, i], tokens[b, i])
        self.seen = [scores]
        super()._decide(layer, state)
        self.queries, self.keys, self.values, self.matrices = [], [], [], []

    def _score(
        self, b: int, i: int, patches: list[int], there: list[int], attention: Tensor, token: Tensor
    ) -> Tensor:
        """Of patch ``i`` of sample ``b``."""
        query, key, value = (torch.cat(x, 1)[b] for x in (self.queries, self.keys, self.values))
        length = value[:, i].square().sum(-1).sqrt().mean()
        if self.kind == "received":
            paid = [matrix[b, :, there, i].mean() for matrix in self.matrices]
            return torch.stack(paid).mean()
        if self.kind == "values":
            return length
        key = key.mean(0)
        if self.kind == "keys":
            others = [F.cosine_similarity(key[i], key[j], dim=0) for j in patches if j != i]
            return -torch.stack(others).mean()
        own = F.cosine_similarity(query[:, i].mean(0), key[i], dim=0)
        return attention * length + 0.1 * own + 0.01 * token.norm()

    def __call__(self, *args: Any, **kwargs: Any) -> ReferenceResult:
        with _Factors(self):
            return super().__call__(*args, **kwargs)


def scored_reference(
    kind: Kind,
    model: Any,
    x: Any,
    layout: Any,
    *,
    stages: Stages,
    **options: Any,
) -> ReferenceResult:
    """As `masked_reference`, with another score."""
    run = ScoringRun(model, layout, stages=stages, **options)
    run.kind = kind
    with torch.no_grad():
        return run(x)
