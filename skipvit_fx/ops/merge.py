"""Similar patches become one token (Bolya et al., "Token Merging: Your ViT But Faster", arXiv 2210.09461)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from fractions import Fraction

import torch
from torch import Tensor, nn

from skipvit_fx.ops.following import kept_whole, recorded, sizes
from skipvit_fx.ops.operands import OperandLayout
from skipvit_fx.ops.rows import inverse_order, rows_of, sequence_rows, take_rows
from skipvit_fx.ops.select import Amount, partition
from skipvit_fx.ops.skip import OnStream
from skipvit_fx.ops.switch import Switchable


class Match(Amount, Switchable):
    """Chooses the patches that are merged, and those that they are merged into, by the similarity of their keys.

    Of the patches that are present, those at odd places may be merged into those at even places (section 3, "Bipartite
    Soft Matching"): each into the one whose key, as a mean over heads, is at the smallest angle to its own. The pairs
    with the highest similarity merge, at most half of the patches. Ties are broken in favour of the earlier patch. No
    gradient flows through the choice.

    Args:
        amount, multiple_of, others: as in :class:`skipvit_fx.ops.select.Amount`.
        layouts: of the keys of each attention of the layer.
    """

    def __init__(
        self,
        amount: Fraction | int,
        multiple_of: int,
        others: int,
        layouts: tuple[OperandLayout, ...],
    ) -> None:
        super().__init__(amount, multiple_of, others)
        self.layouts = layouts

    def most(self, n: int) -> int:
        """Half of the patches: those at odd places."""
        return n // 2

    @kept_whole
    def forward(
        self, *keys: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor] | tuple[None, None, None, None]:
        """What stays, what is merged, and into what: int32 indices; and how similar they are.

        Returns:
            ``[batch, k]`` indices of the patches that stay, in their order in the shorter sequence: first the others at
            odd places, then those at even places; ``[batch, n - k]`` of those that are merged, ascending; for each of
            these, the place among those that stay of the one that it is merged into; ``[batch, n // 2]`` the highest
            similarity of each patch at an odd place. ``None`` for each if nothing is merged.
        """
        return self.choose(self.metric(*keys)) if self.active else (None, None, None, None)

    def choose(
        self, metric: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor] | tuple[None, None, None, None]:
        """The same from what patches are compared by, ``[batch, n, channels]``."""
        n = sizes(metric)[1]
        merged = self.dropped(n)
        if merged == 0:
            return None, None, None, None
        sources, destinations = n // 2, n - n // 2
        metric = metric / metric.norm(dim=-1, keepdim=True).clamp(
            min=torch.finfo(metric.dtype).tiny
        )
        similarity = metric[:, 1::2] @ metric[:, ::2].transpose(1, 2)
        best, nearest = similarity.max(-1)  # the first of equal ones
        chosen, others = partition(best, merged)
        even = torch.arange(0, n, 2, dtype=chosen.dtype, device=chosen.device)
        kept = torch.cat([others * 2 + 1, even.expand(chosen.shape[0], destinations)], 1)
        into = rows_of(nearest.to(torch.int32), chosen) + (sources - merged)
        return kept, chosen * 2 + 1, into, best

    def metric(self, *keys: Tensor) -> Tensor:
        """The mean of the keys over heads, ``[batch, patches, channels]``.

        In float32 if the keys are narrower, so that close ones stay apart.
        """
        parts = [
            layout.patches(key.detach()) for key, layout in zip(keys, self.layouts, strict=True)
        ]
        heads = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        narrow = heads.dtype in (torch.float16, torch.bfloat16)
        return heads.mean(1, dtype=torch.float32 if narrow else None)


class Merge(OnStream):
    """Merged patches become part of others: the mean of the patches in each, as every one of them counts the same."""

    @kept_whole
    def forward(  # type: ignore[override]
        self,
        stream: Tensor,
        kept: Tensor | None,
        merged: Tensor | None,
        into: Tensor | None,
        sizes: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The shorter sequence, and how many patches are in each of its tokens.

        Args:
            stream: with its tokens at ``dim`` 0 or 1, the batch at the other.
            kept, merged, into: what :class:`Match` chose.
            sizes: ``[batch, n]`` float32, the number of patches in each token; ``None`` for one in each.

        Returns:
            The stream ``[batch, prefix + k + suffix, channels]``, or its transpose, in the order of ``kept``; and the
            sizes ``[batch, k]``.
        """
        if kept is None or merged is None or into is None:
            return stream, sizes
        tokens, sizes = self.on_tokens(self.batch_first(stream), kept, merged, into, sizes)
        return self.batch_first(tokens), sizes

    def on_tokens(  # type: ignore[override]
        self, tokens: Tensor, kept: Tensor, merged: Tensor, into: Tensor, before: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The same with the batch first.

        The sums are small matrix products, without a scatter: deterministic on every device, and known to every tool.
        """
        n = self.patch_count(tokens)
        start, stop = self.prefix, self.prefix + n
        if before is None:
            before = torch.ones(tokens.shape[0], n, device=tokens.device)
        others = kept.shape[1] - (n - n // 2)  # as many stay at odd places
        odd = torch.cat([kept[:, :others], merged], 1)
        sizes, rows = rows_of(before, odd), take_rows(tokens, odd + start)
        places = torch.arange(others, kept.shape[1], dtype=into.dtype, device=into.device)
        joins = into.unsqueeze(1) == places.unsqueeze(-1)
        parts = joins * sizes[:, others:].unsqueeze(1)
        even = before[:, ::2]
        total = even + parts.sum(-1)
        with full_precision(tokens):
            shares = (parts / total.unsqueeze(-1)).to(tokens.dtype)
            own = (even / total).unsqueeze(-1).to(tokens.dtype)
            joined = torch.bmm(shares, rows[:, others:])
            means = torch.addcmul(joined, tokens[:, start:stop:2], own)
        sequence = [rows[:, :others], means]
        if self.prefix:
            sequence.insert(0, tokens[:, :start])
        if self.suffix:
            sequence.append(tokens[:, stop:])
        return torch.cat(sequence, 1), torch.cat([sizes[:, :others], total], 1)


class Unmerge(OnStream):
    """Every patch gets the state of the token that it is part of, at its original position."""

    def on_tokens(self, tokens: Tensor, kept: Tensor, merged: Tensor, into: Tensor) -> Tensor:
        """``[batch, prefix + k + suffix, channels]`` to ``[batch, tokens, channels]``."""
        rows = sequence_rows(owners(kept, merged, into), self.prefix, kept.shape[1], self.suffix)
        return rows_of(
            tokens, rows
        )  # a row is taken for each of its patches, and gets the gradients of all


def owners(kept: Tensor, merged: Tensor, into: Tensor) -> Tensor:
    """For each of the n patches before a merge, the place among those that stay of the one that it is part of now.

    ``[batch, n]`` of ``[batch, k]`` and twice ``[batch, n - k]``.
    """
    places = torch.arange(kept.shape[1], dtype=into.dtype, device=into.device).expand(kept.shape)
    order = inverse_order(torch.cat([kept, merged], 1))
    return rows_of(torch.cat([places, into], 1), order)


class LogSizes(nn.Module):
    """What is added to the logits of every key: the logarithm of its size (section 3, "Proportional Attention").

    A token of s patches then gets the weight of s equal tokens.

    Args:
        shape: the rank of the logits, and their batch axis and key axis.
        repeat: how often each sample repeats in succession along the batch axis (heads in one axis with the batch).
        prefix, suffix: the numbers of keys before and after the patches, which are of size 1.
    """

    def __init__(self, shape: tuple[int, int, int], repeat: int, prefix: int, suffix: int) -> None:
        super().__init__()
        self.shape = shape
        self.repeat = repeat
        self.prefix = prefix
        self.suffix = suffix

    @kept_whole
    def forward(self, sizes: Tensor | None, like: Tensor) -> Tensor | None:
        """From ``[batch, k]``: as many axes as the logits have, of length 1 except two, and the dtype of ``like``."""
        if sizes is None:
            return None
        logs = self._with_others(sizes.log().to(like.dtype))
        logs = logs.repeat_interleave(self.repeat, 0) if self.repeat > 1 else logs
        rank, batch_dim, key_dim = self.shape
        batch, keys = logs.shape
        shape = [1] * rank
        shape[batch_dim], shape[key_dim] = batch, keys
        return (logs if batch_dim < key_dim else logs.T).reshape(shape)

    def _with_others(self, patches: Tensor) -> Tensor:
        """With zeros for the keys before and after the patches; ATC is not known to accept padding."""
        if not self.prefix + self.suffix:
            return patches
        before, after = (
            torch.zeros(patches.shape[0], n, dtype=patches.dtype, device=patches.device)
            for n in (self.prefix, self.suffix)
        )
        return torch.cat([before, patches, after], 1)

    def extra_repr(self) -> str:
        return f"rank={self.shape[0]}, batch={self.shape[1]}, keys={self.shape[2]}"


@recorded
def weighed(logits: Tensor, log_sizes: Tensor | None) -> Tensor:
    """Logits, or a mask, with the logarithm of each key's size added; unchanged if nothing is merged."""
    if log_sizes is None:
        return logits
    if logits.dtype == torch.bool:
        return torch.where(logits, log_sizes, -torch.inf)
    return logits + log_sizes


@contextlib.contextmanager
def full_precision(like: Tensor) -> Iterator[None]:
    """A context without autocast, which would compute the product in half precision, and the mean with it."""
    kind = like.device.type
    if not torch.is_autocast_enabled(kind):
        yield
        return
    with torch.autocast(kind, enabled=False):
        yield
