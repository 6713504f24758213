"""Operators that only move elements."""

from __future__ import annotations

from skipvit_fx.analysis.axes import (
    Axes,
    Dim,
    MixesTokens,
    Tokens,
    axes_of,
    merge_ints,
    nonzero,
    plain,
    regroup,
    size,
    tokens_of,
)
from skipvit_fx.analysis.rules.call import (
    Call,
    axes_or_plain,
    labelled_self,
    only_tokens,
    refuse_moving,
    refuse_samples,
    rule,
)
from skipvit_fx.analysis.rules.pointwise import align
from skipvit_fx.torch_internals import aten


@rule(
    aten.view,
    aten._unsafe_view,
    aten._reshape_alias,
    aten.reshape,
    aten.squeeze,
    aten.unsqueeze,
    aten.flatten,
)
def _reshape(call: Call) -> list[Axes | None]:
    return [regroup(labelled_self(call), call.out.shape)]


@rule(aten.view_as_complex)
def _view_as_complex(call: Call) -> list[Axes | None]:
    axes = labelled_self(call)
    refuse_moving(axes, [-1], "view_as_complex")
    return [axes[:-1]]


@rule(aten.view_as_real)
def _view_as_real(call: Call) -> list[Axes | None]:
    return [(*labelled_self(call), (2,))]


@rule(aten.expand)
def _expand(call: Call) -> list[Axes | None]:
    axes = labelled_self(call)
    shape = call.out.shape
    fresh = len(shape) - len(axes)
    result = list(plain(shape))
    for d, dim in enumerate(axes):
        if call.self.shape[d] == shape[fresh + d]:
            result[fresh + d] = dim
        else:
            refuse_samples(dim, "expand")
    return [tuple(result)]


@rule(aten.repeat)
def _repeat(call: Call) -> list[Axes | None]:
    axes = labelled_self(call)
    repeats = list(call.argument("repeats"))
    axes = (*((),) * (len(repeats) - len(axes)), *axes)
    result: list[Dim] = []
    for dim, times in zip(axes, repeats, strict=True):
        if times == 1:
            result.append(dim)
        elif any(not isinstance(factor, int) for factor in dim):
            raise MixesTokens("repeat along the token or batch axis")
        else:
            result.append(merge_ints((times, *dim)))
    return [tuple(result)]


@rule(aten.permute)
def _permute(call: Call) -> list[Axes | None]:
    axes = labelled_self(call)
    return [tuple(axes[d] for d in call.argument("dims"))]


@rule(aten.transpose)
def _transpose(call: Call) -> list[Axes | None]:
    axes = list(labelled_self(call))
    a, b = call.argument("dim0"), call.argument("dim1")
    axes[a], axes[b] = axes[b], axes[a]
    return [tuple(axes)]


@rule(aten.t)
def _t(call: Call) -> list[Axes | None]:
    return [tuple(reversed(labelled_self(call)))]


@rule(aten.select)
def _select(call: Call) -> list[Axes | None]:
    axes = list(labelled_self(call))
    d = call.argument("dim") % len(axes)
    refuse_samples(axes[d], "select")
    tokens = only_tokens(axes[d], "select")
    if tokens:
        index = call.argument("index") % size(tokens)
        if tokens.weights:
            raise MixesTokens(_PICKED)
        if tokens.prefix <= index < tokens.prefix + tokens.patches:
            raise MixesTokens("a patch token is picked out by its position")
        call.reads = index + 1 - tokens.prefix
    del axes[d]
    return [tuple(axes)]


_PICKED = "single weights are picked out of an attention, and each depends on all tokens"


def _cut(tokens: Tokens, start: int, stop: int) -> Dim:
    """The rows ``start:stop`` of a token axis: all patches with part of the rest, or none of them."""
    first, last = tokens.prefix, tokens.prefix + tokens.patches
    if start <= first and stop >= last:
        return (tokens._replace(prefix=first - start, suffix=stop - last),)
    if tokens.weights and not start <= first <= last <= stop:
        raise MixesTokens(_PICKED)
    if stop <= first or start >= last:
        return merge_ints((stop - start,))
    raise MixesTokens("a slice cuts the patch tokens in two by position")


@rule(aten.slice)
def _slice(call: Call) -> list[Axes | None]:
    axes = list(labelled_self(call))
    d = call.argument("dim") % len(axes)
    length = call.self.shape[d]
    step = call.argument("step")
    start, stop, _ = slice(call.argument("start"), call.argument("end")).indices(length)
    tokens = tokens_of(axes[d])
    if (start, stop, step) == (0, length, 1):
        return [tuple(axes)]
    refuse_samples(axes[d], "a slice")
    if tokens is None:
        axes[d] = merge_ints((call.out.shape[d],))
        return [tuple(axes)]
    only_tokens(axes[d], "a slice")
    if step != 1:
        raise MixesTokens("a slice with a step picks tokens by their position")
    axes[d] = _cut(tokens, start, stop)
    if not tokens_of(axes[d]):
        call.reads = stop - tokens.prefix
    return [tuple(axes)]


@rule(aten.split, aten.split_with_sizes, aten.split_copy, aten.split_with_sizes_copy)
def _split(call: Call) -> list[Axes | None]:
    axes = labelled_self(call)
    d = call.argument("dim") % len(axes)
    if len(call.outs) == 1:
        return [axes]
    refuse_samples(axes[d], "split")
    tokens = only_tokens(axes[d], "split")
    result: list[Axes | None] = []
    start = 0
    for part in call.out:
        length = part.shape[d]
        dim = _cut(tokens, start, start + length) if tokens else merge_ints((length,))
        result.append((*axes[:d], dim, *axes[d + 1 :]))
        start += length
    return result


@rule(aten.unbind)
def _unbind(call: Call) -> list[Axes | None]:
    axes = labelled_self(call)
    (d,) = refuse_moving(axes, [call.argument("dim")], "unbind")
    return call.same((*axes[:d], *axes[d + 1 :]))


@rule(aten.index_select)
def _index_select(call: Call) -> list[Axes | None]:
    axes = labelled_self(call)
    if axes_of(call.argument("index")) is not None:
        raise MixesTokens("index_select by an index that is made of tokens")
    (d,) = refuse_moving(axes, [call.argument("dim")], "index_select")
    return [(*axes[:d], merge_ints((call.out.shape[d],)), *axes[d + 1 :])]


@rule(aten.cat)
def _cat(call: Call) -> list[Axes | None]:
    tensors = [t for t in call.argument("tensors") if t.shape != (0,)]
    rank = tensors[0].ndim
    d = call.argument("dim") % rank
    tensors = [t for t in tensors if t.shape[d]] or tensors[:1]  # a prefix may be empty
    along = [axes_or_plain(t)[d] for t in tensors]
    for dim in along:
        refuse_samples(dim, "cat")
    carriers = [i for i, dim in enumerate(along) if tokens_of(dim)]
    # the parts must line up everywhere except along d, where they are joined
    parts = [
        (t.narrow(d, 0, 1), None if (own := axes_of(t)) is None else (*own[:d], (), *own[d + 1 :]))
        for t in tensors
    ]
    across = align(call, parts, [1 if i == d else s for i, s in enumerate(call.out.shape)])
    if call.positions:
        raise MixesTokens("tokens are joined to a tensor of fixed token length")
    if not carriers:
        joined: Dim = merge_ints((call.out.shape[d],))
    elif len(carriers) > 1:
        raise MixesTokens("two token sequences are joined into one")
    else:
        (at,) = carriers
        tokens = only_tokens(along[at], "cat")
        assert tokens is not None
        before = sum(t.shape[d] for t in tensors[:at])
        after = sum(t.shape[d] for t in tensors[at + 1 :])
        joined = (tokens._replace(prefix=tokens.prefix + before, suffix=tokens.suffix + after),)
    return [(*across[:d], joined, *across[d + 1 :])]


@rule(aten.stack)
def _stack(call: Call) -> list[Axes | None]:
    tensors = call.argument("tensors")
    d = call.argument("dim") % call.out.ndim
    shape = [s for i, s in enumerate(call.out.shape) if i != d]
    axes = align(call, [(t, axes_of(t)) for t in tensors], shape)
    if call.positions:
        raise MixesTokens("tokens are stacked with a tensor of fixed token length")
    return [(*axes[:d], merge_ints((len(tensors),)), *axes[d:])]


@rule(aten.constant_pad_nd)
def _pad(call: Call) -> list[Axes | None]:
    axes = list(labelled_self(call))
    pad = call.argument("pad")
    for i in range(len(pad) // 2):
        if pad[2 * i] or pad[2 * i + 1]:
            refuse_moving(tuple(axes), [-1 - i], "padding")
            axes[-1 - i] = merge_ints((call.out.shape[-1 - i],))
    return [tuple(axes) if call.argument("value") == 0 else nonzero(tuple(axes))]
