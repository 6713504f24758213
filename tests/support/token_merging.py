"""What a model with merged tokens must compute, worked out twice without the compiler.

`merging_reference` runs the *original* model with all of its tokens in place, as `masked_reference` does. A token that
was merged away stays in its row and is masked out of attention as a key; the row of its destination holds the mean of
both. A row is a position, so tables of positions need no change. Any model fits that can say where its layers are.

`tome_vit` follows the paper (Token Merging, arXiv 2210.09461) to the letter for timm's plain `VisionTransformer`: one
image after the other, each a sequence that really gets shorter, by loops over lists.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from support.reference import (
    Cut,
    Layout,
    MaskedRun,
    Ratio,
    ReferenceResult,
    StageResult,
    Stages,
    assert_same_tokens,
    drop_count,
)

aten = torch.ops.aten


def merge_count(amount: Ratio, present: int) -> int:
    """How many of the patches that are present are merged away: at most every source, which is every second one."""
    return min(drop_count(amount, present), present // 2)


@dataclass(frozen=True)
class MergeResult:
    """One merging of tokens, `[B, ...]` each.

    Attributes:
        layer: counted from 1.
        kept: the positions of the tokens that are left, in the order of the new sequence.
        dropped: the positions of those that are merged away, in the order of the sequence before.
        owner: for each original patch the row of the new sequence, prefix counted, in which it is.
        sizes: of how many patches each token that is left consists.
        margin: by how much the closest choice was decided; 0 is a tie.
    """

    layer: int
    kept: Tensor
    dropped: Tensor
    owner: Tensor
    sizes: Tensor
    margin: float


# -- for any model: all rows in place ---------------------------------------------------------------------------------


class _Products(TorchDispatchMode):
    """Notes the factors of the last product that has the shape of attention logits, however an author spells it."""

    def __init__(self, run: MergingRun) -> None:
        super().__init__()
        self.run = run

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (aten.bmm.default, aten.baddbmm.default):
            n = self.run.n_rows
            if self.run.layer and out.shape[1:] == (n, n):
                self.run.factors = (args[-2].detach(), args[-1].detach())
        return out


class _Heads(TorchFunctionMode):
    """Behind the last layer the sequence is short: there, attention gets sizes of the tokens that are left."""

    def __init__(self, run: MergingRun) -> None:
        super().__init__()
        self.run = run

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.run.ended is not None and not self.run.layer:
            assert func is not F.multi_head_attention_forward, "not spelled out here"
            if func is F.scaled_dot_product_attention:
                return self.run.attend_in_head(*args, **kwargs)
            if func in (torch.softmax, Tensor.softmax, F.softmax, torch.special.softmax):
                logits = args[0]
                axis = int(kwargs["dim"] if "dim" in kwargs else args[1]) % logits.dim()
                sizes = self.run.head_sizes(logits.shape[axis])
                if logits.dim() >= 3 and sizes is not None:
                    return func(_plus_log(logits, sizes, axis), *args[1:], **kwargs)
        return func(*args, **kwargs)


def _plus_log(logits: Tensor, sizes: Tensor, axis: int) -> Tensor:
    """Logits, with the logarithm of the sizes `[B, N]` of the keys at `axis` added."""
    heads = logits.shape[0] // sizes.shape[0]  # where batch and heads are one axis
    shape = [1] * logits.dim()
    shape[0], shape[axis] = logits.shape[0], logits.shape[axis]
    return logits + sizes.log().to(logits.dtype).repeat_interleave(heads, dim=0).view(shape)


class MergingRun(MaskedRun):
    """One run of `merging_reference`; its small methods are there for tests to break."""

    def __init__(
        self, *args: Any, merging: Collection[int], proportional: bool, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        assert set(merging) <= set(self.stages)
        self.merging, self.proportional = merging, proportional
        self.factors: tuple[Tensor, Tensor] | None = None
        self.keys: list[Tensor] = []  # [B, H, N, D] of each attention of a layer that merges
        self.order: Tensor | None = None  # positions of the patches that are left, as they stand
        self.sizes: Tensor | None = None  # [B, patches], by position
        self.owner: Tensor | None = None  # [B, patches], a position
        self.ended: Tensor | None = None  # sizes of the tokens behind the last layer, as they stand

    @property
    def n_rows(self) -> int:
        return self._tokens()

    # What may be broken on purpose.

    def weights_of(self, sizes: Tensor) -> Tensor:
        """By what the tokens of these sizes are averaged."""
        return sizes

    def following(self, kept_sources: Tensor, destinations: Tensor) -> Tensor:
        """The new order, given the positions of both."""
        return torch.cat([kept_sources, destinations])

    def logits_sizes(self) -> Tensor | None:
        """The sizes that attention sees, of the patches by position."""
        return self.sizes if self.proportional else None

    # Attention.

    def _with_rows(self, patches: Tensor, fill: float) -> Tensor:
        """`[B, patches]` to `[B, N]`."""
        return F.pad(patches, (self.layout.prefix, self.layout.suffix), value=fill)

    def softmax(
        self, func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """Also of logits whose queries come after their keys."""
        logits, rest = args[0], args[1:]
        axis = int(kwargs["dim"] if "dim" in kwargs else rest[0]) % logits.dim()
        square = axis and logits.shape[axis] == self.n_rows
        queries_last = square and logits.shape[axis + 1 : axis + 2] == (self.n_rows,)
        if not queries_last or logits.shape[axis - 1] == self.n_rows:
            return super().softmax(func, args, kwargs)
        assert self.factors is not None
        self.factors = (self.factors[1].mT, self.factors[0].mT)  # the transposed product
        dtype = kwargs.get("dtype")
        logits = logits if dtype is None else logits.to(dtype)
        return self._weights(logits.transpose(axis, axis + 1), axis + 1).transpose(axis, axis + 1)

    def _weights(self, logits: Tensor, axis: int) -> Tensor:
        n = self.n_rows
        if logits.shape[axis] == n and logits.shape[axis - 1] == n:
            if self.layer in self.merging:
                assert self.factors is not None, "no product before this softmax"
                assert self.gone is not None
                keys = self.factors[1].mT  # [B * heads, N, D]
                self.keys.append(keys.reshape(self.gone.shape[0], -1, *keys.shape[1:]))
                self.factors = None
            sizes = self.logits_sizes()
            if sizes is not None:
                logits = _plus_log(logits, self._with_rows(sizes, 1.0), axis)
        return super()._weights(logits, axis)

    def head_sizes(self, length: int) -> Tensor | None:
        """Sizes of the keys of an attention behind the layers; None if these many are not the tokens."""
        assert self.ended is not None
        before, after = self.layout.prefix, self.layout.suffix
        more = length - self.ended.shape[1]
        if not self.proportional or more < 0:
            return None
        if more == before + after:
            return F.pad(self.ended, (before, after), value=1.0)
        if more == 0:
            return self.ended
        if more == 1 and before + after == 0:  # a class token that joins there
            return F.pad(self.ended, (1, 0), value=1.0)
        return None

    def attend_in_head(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> Tensor:
        """`scaled_dot_product_attention` behind the layers."""
        assert dropout_p == 0.0
        assert not is_causal
        sizes = self.head_sizes(key.shape[-2])
        if sizes is not None:
            bias = query.new_zeros(key.shape[0], 1, query.shape[-2], key.shape[-2])
            if attn_mask is not None and attn_mask.dtype == torch.bool:
                bias = bias.masked_fill(~attn_mask, -math.inf)
            elif attn_mask is not None:
                bias = bias + attn_mask
            attn_mask = _plus_log(bias, sizes, 3)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, **options)

    # The residual stream.

    def _decide(self, layer: int, state: Tensor) -> None:
        if layer not in self.merging:
            super()._decide(layer, state)

    def _at_mid(self, state: Tensor) -> Tensor:
        if self.cut == "attention" and self.layer in self.merging:
            # in place, as the residual of the FFN passes no module; it must be read from this tensor, and later
            return state.copy_(self._merge(self.layer, state))
        return super()._at_mid(state)

    def _at_end(self, state: Tensor) -> Tensor:
        if self.cut == "block" and self.layer in self.merging:
            return state.copy_(self._merge(self.layer, state))
        return super()._at_end(state)

    def _at_border(self, layer: int, state: Tensor) -> Tensor:
        elsewhere = self.layout.ends or self.layout.marked
        if self.cut == "block" and layer - 1 in self.merging and not elsewhere:
            state = self._merge(layer - 1, state)
        if self.owner is not None and layer in self.returns:
            state = self._take(state, self.owner)
            self.order = self.sizes = self.owner = None
        state = super()._at_border(layer, state)
        if layer == self.depth + 1 and self.order is not None:
            assert self.sizes is not None
            state = self._take(state, self.order)
            self.ended = self.sizes.gather(1, self.order)
        return state

    def _take(self, state: Tensor, positions: Tensor) -> Tensor:
        """The rows of these patches, with what stands before and after them."""
        state = self._batch_first(state)
        first, last = self.layout.prefix, state.shape[1] - self.layout.suffix
        patches = torch.stack(
            [rows[at] for rows, at in zip(state[:, first:last], positions, strict=True)]
        )
        return self._batch_first(torch.cat([state[:, :first], patches, state[:, last:]], dim=1))

    def _batch_first(self, state: Tensor) -> Tensor:
        """`[B, N, C]`, and the way back."""
        return state.transpose(0, 1) if self.layout.token_dim == 0 else state

    def _merge(self, layer: int, state: Tensor) -> Tensor:
        """The state of all, in which the rows of destinations hold means."""
        assert self.gone is not None
        assert self.keys, "no attention was seen"
        layout = self.layout
        batch, n = self.gone.shape
        patches = n - layout.prefix - layout.suffix
        if self.order is None or self.sizes is None or self.owner is None:
            self.order = torch.arange(patches, device=state.device).expand(batch, -1)
            self.owner = self.order.clone()
            self.sizes = torch.ones(batch, patches, dtype=state.dtype, device=state.device)
        keys = torch.cat(self.keys, dim=1).mean(1)[:, layout.prefix : layout.prefix + patches]
        self.keys, self.seen = [], []  # nothing is dropped here, so nothing scores
        amount = merge_count(self.stages[layer], self.order.shape[1])
        mix = torch.eye(n).to(state).repeat(batch, 1, 1)  # new rows from old ones
        orders, leavers, margins = [], [], [math.inf]
        sizes, owner, gone = self.sizes.clone(), self.owner.clone(), self.gone.clone()
        for b in range(batch):
            sources, destinations = self.order[b, 1::2], self.order[b, 0::2]
            unit = F.normalize(keys[b], dim=-1)
            similar = unit[sources] @ unit[destinations].T
            best, nearest = similar.max(dim=1)  # of equal ones the first
            ranked = best.argsort(descending=True, stable=True)
            leaving = ranked[:amount].sort().values
            margins += _margins(similar, best[ranked], leaving, amount)
            for source, to in zip(
                sources[leaving].tolist(), nearest[leaving].tolist(), strict=True
            ):
                destination = int(destinations[to])
                owner[b][owner[b] == source] = destination
                gone[b, layout.prefix + source] = True
            for destination in set(owner[b, sources[leaving]].tolist()):
                came = [s for s in sources[leaving].tolist() if owner[b, s] == destination]
                members = torch.tensor([destination, *came], device=state.device)
                weights = self.weights_of(sizes[b, members])
                row = layout.prefix + destination
                mix[b, row] = 0.0
                mix[b, row, layout.prefix + members] = weights / weights.sum()
                sizes[b, destination] = sizes[b, members].sum()
            staying = torch.ones_like(sources, dtype=torch.bool)
            staying[leaving] = False
            orders.append(
                self.following(sources[staying], destinations) if amount else self.order[b]
            )
            leavers.append(sources[leaving])
        self.order, self.sizes, self.owner, self.gone = torch.stack(orders), sizes, owner, gone
        place = self.order.argsort(dim=1)  # of each position that is left, among those left
        of_position = torch.zeros_like(owner).scatter(1, self.order.sort(dim=1).values, place)
        self.results.append(
            MergeResult(  # type: ignore[arg-type]
                layer,
                self.order,
                torch.stack(leavers),
                of_position.gather(1, owner) + layout.prefix,
                sizes.gather(1, self.order),
                min(margins),
            )
        )
        return self._batch_first(mix @ self._batch_first(state))

    def __call__(self, *args: Any, **kwargs: Any) -> ReferenceResult:
        with _Heads(self), _Products(self):
            return super().__call__(*args, **kwargs)


def _margins(similar: Tensor, ranked: Tensor, leaving: Tensor, amount: int) -> list[float]:
    """By how much the choice of sources was decided, and that of the destination of each that leaves."""
    margins = [float(ranked[amount - 1] - ranked[amount])] if 0 < amount < len(ranked) else []
    if amount and similar.shape[1] > 1:
        first, second = similar[leaving].topk(2, dim=1).values.unbind(1)
        margins.append(float((first - second).min()))
    return margins


def merging_reference(
    model: nn.Module,
    x: Any,
    layout: Layout,
    *,
    stages: Stages,
    merging: Collection[int] | None = None,
    return_layer: int | tuple[int, ...] | None = None,
    cut: Cut = "attention",
    proportional: bool = True,
    run: type[MergingRun] = MergingRun,
) -> ReferenceResult:
    """The original model with tokens merged in place; see the module docstring.

    Args:
        model: the model as its author wrote it, in eval mode.
        x: its input.
        layout: where its layers are.
        stages: layer (from 1) and the number or the share of the patches still present that are merged away there.
        merging: the layers of `stages` that merge, the others drop; None is all of them.
        return_layer: as in `masked_reference`. A span merges or drops, so spans of both kinds are told apart by it.
        cut: after the attention residual or after the whole layer.
        proportional: whether attention sees sizes.
        run: a broken `MergingRun`, for the tests of the tests.
    """
    merging = [layer for layer, _ in stages] if merging is None else merging
    options: dict[str, Any] = {"stages": stages, "return_layer": return_layer, "cut": cut}
    return run(model, layout, merging=merging, proportional=proportional, **options)(x)


def assert_same_merges(got: Sequence[Any], wanted: Sequence[StageResult | MergeResult]) -> None:
    """What `trace_tokens` says of each stage is what the reference did; of stages that drop, as there."""
    assert [stage.layer for stage in got] == [stage.layer for stage in wanted]
    for mine, theirs in zip(got, wanted, strict=True):
        if isinstance(theirs, StageResult):
            assert_same_tokens([mine], [theirs])
            assert mine.owner is None
            continue
        for name in ("kept", "dropped", "owner"):
            a, b = getattr(mine, name), getattr(theirs, name)
            assert a.dtype == torch.int64, name
            assert torch.equal(a, b), (
                f"layer {theirs.layer}: {name} differ: {a.tolist()} != {b.tolist()}"
            )
        assert mine.scores.shape == (
            len(theirs.kept),
            theirs.kept.shape[1] + theirs.dropped.shape[1],
        )


# -- for timm's plain VisionTransformer: to the letter ----------------------------------------------------------------


Tokens = list[list[int]]
"""The tokens of an image, each a list of the patches in it."""


@dataclass(frozen=True)
class MergedImages:
    """What `tome_vit` returns: the output, and after each layer the tokens of each image as lists of their patches.

    The first patch of a token is the one whose place it stands in.
    """

    output: Tensor
    tokens: list[list[Tokens]]


def tome_vit(
    model: Any, x: Tensor, r_per_layer: Sequence[int], return_layer: int | None = None
) -> MergedImages:
    """timm's plain `VisionTransformer` with tokens merged, as the paper says it.

    Args:
        model: in eval mode.
        x: images.
        r_per_layer: how many tokens each layer merges away; 0 is none.
        return_layer: at whose input every patch gets the state of the token that it is part of.
    """
    assert not model.training
    prefix = model.num_prefix_tokens
    embedded = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    ends = [_one_image(model, sample, r_per_layer, return_layer) for sample in embedded]
    states = model.norm(torch.stack([state for state, _, _ in ends]))
    if model.attn_pool is None:
        output = model.forward_head(states)
    else:
        pooled = [
            _attention_pool(model.attn_pool, state, _sizes(tokens, prefix))
            for state, (_, tokens, _) in zip(states, ends, strict=True)
        ]
        output = model.head(model.fc_norm(torch.stack(pooled)))
    per_layer = [list(images) for images in zip(*(history for _, _, history in ends), strict=True)]
    return MergedImages(output, per_layer)


def _one_image(
    model: Any, state: Tensor, r_per_layer: Sequence[int], return_layer: int | None
) -> tuple[Tensor, Tokens, list[Tokens]]:
    """Its state `[N, C]` behind the last layer, its tokens there, and its tokens after each layer."""
    prefix = model.num_prefix_tokens
    n_patches = len(state) - prefix
    tokens = [[patch] for patch in range(n_patches)]
    history = []
    for layer, (block, r) in enumerate(zip(model.blocks, r_per_layer, strict=True), 1):
        if layer == return_layer:
            state, tokens = _unmerged(state, tokens, prefix, n_patches)
        y, keys = _proportional_attention(block.attn, block.norm1(state), tokens, prefix)
        state = state + block.ls1(y)
        if r:
            state, tokens = _bipartite_merge(state, tokens, keys, prefix, r)
        state = state + block.ls2(block.mlp(block.norm2(state)))
        history.append(tokens)
    if return_layer == len(model.blocks) + 1:
        state, tokens = _unmerged(state, tokens, prefix, n_patches)
    return state, tokens, history


def _sizes(tokens: Tokens, prefix: int) -> Tensor:
    return torch.tensor([1.0] * prefix + [float(len(token)) for token in tokens])


def _attention_pool(pool: Any, x: Tensor, sizes: Tensor) -> Tensor:
    """timm's pooling by the attention of one latent query."""
    assert pool.pos_embed is None
    q = pool.q_norm(pool.q(pool.latent[0]).reshape(1, pool.num_heads, -1).transpose(0, 1))
    k, v = pool.kv(x).reshape(len(x), 2, pool.num_heads, -1).permute(1, 2, 0, 3)
    logits = q @ pool.k_norm(k).transpose(1, 2) / math.sqrt(q.shape[-1]) + torch.log(sizes)
    y = pool.proj((torch.softmax(logits, dim=-1) @ v).reshape(-1))
    out: Tensor = y + pool.mlp(pool.norm(y))
    return out


def _proportional_attention(
    attn: Any, x: Tensor, tokens: Tokens, prefix: int
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(d) + log s) v, and the keys, averaged over the heads."""
    n = len(x)
    q, k, v = attn.qkv(x).reshape(n, 3, attn.num_heads, -1).permute(1, 2, 0, 3)
    q, k = attn.q_norm(q), attn.k_norm(k)
    sizes = torch.log(_sizes(tokens, prefix))
    logits = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]) + sizes
    y = torch.softmax(logits, dim=-1) @ v  # heads, tokens, channels of a head
    return attn.proj(attn.norm(y.transpose(0, 1).reshape(n, -1))), k.mean(dim=0)


def _bipartite_merge(
    state: Tensor, tokens: Tokens, keys: Tensor, prefix: int, r: int
) -> tuple[Tensor, Tokens]:
    """The r most similar pairs of one token of either half become one."""
    n = len(tokens)
    half_a, half_b = list(range(1, n, 2)), list(range(0, n, 2))
    directions = keys[prefix:] / keys[prefix:].norm(dim=-1, keepdim=True)
    cosines = (directions @ directions.T).tolist()

    def nearest(a: int) -> int:
        return max(half_b, key=lambda b: (cosines[a][b], -b))

    edge = {a: nearest(a) for a in half_a}
    closest = sorted(half_a, key=lambda a: (-cosines[a][edge[a]], a))
    merged = closest[:r]

    rows, after = [], []
    for a in half_a:
        if a not in merged:
            rows.append(state[prefix + a])
            after.append(tokens[a])
    for b in half_b:
        parts = [b, *(a for a in half_a if a in merged and edge[a] == b)]
        total = sum(len(tokens[part]) for part in parts)
        rows.append(sum(state[prefix + part] * len(tokens[part]) for part in parts) / total)  # type: ignore[arg-type]
        after.append([patch for part in parts for patch in tokens[part]])
    return torch.cat([state[:prefix], torch.stack(rows)]), after


def _unmerged(state: Tensor, tokens: Tokens, prefix: int, n_patches: int) -> tuple[Tensor, Tokens]:
    """Every patch again, with the state of the token that it is part of."""
    row = {patch: prefix + at for at, token in enumerate(tokens) for patch in token}
    rows = [state[row[patch]] for patch in range(n_patches)]
    return torch.cat([state[:prefix], torch.stack(rows)]), [[p] for p in range(n_patches)]
