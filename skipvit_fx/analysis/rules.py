"""How every known ATen operator treats the token axis. What is not listed here mixes tokens, for all we know.

A rule takes the operator's call and returns the axes of its outputs, or raises :class:`MixesTokens`. Rules are only
asked where some argument has a token axis. They see operators as PyTorch dispatches them, after ``linear``, ``einsum``,
``matmul`` and their like came apart, so the list is short and closed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from skipvit_fx.analysis.axes import (
    Axes,
    Dim,
    MixesTokens,
    PoolsTokens,
    Tokens,
    axes_of,
    merge_ints,
    plain,
    regroup,
    size,
    tokens_of,
)

aten = torch.ops.aten


class Position(NamedTuple):
    """An operand of fixed token length meets the token axis: row i belongs to position i.

    Attributes:
        operand: the tensor.
        dim: its dimension of token length.
        tokens: the token axis it meets.
        rank: rank of the result it is broadcast to.
        batch_dim: the result's batch axis; ``None`` if it has none.
        per_sample: whether the operand has a batch axis of its own there.
        repeat: how often each sample repeats along the batch axis (heads merged into it).
    """

    operand: Tensor
    dim: int
    tokens: Tokens
    rank: int
    batch_dim: int | None
    per_sample: bool
    repeat: int


@dataclass
class Call:
    """One dispatched operator, and what its rule has to say besides the axes.

    ``reads``: where the operator takes prefix rows out, the first row it does not take, counted from the first patch
    (so 0 for all prefix rows, -1 for all but the last).
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    positions: list[Position] = field(default_factory=list)
    softmax_over: Tokens | None = None
    sums_weights: bool = False
    reads: int | None = None

    def argument(self, index: int, name: str, default: Any = None) -> Any:
        if index < len(self.args):
            return self.args[index]
        return self.kwargs.get(name, default)

    @property
    def self(self) -> Tensor:
        tensor = self.argument(0, "self")
        assert isinstance(tensor, Tensor)
        return tensor


Rule: TypeAlias = Callable[[Call], "Axes | list[Axes | None] | None"]
RULES: dict[Any, Rule] = {}


def rule(*packets: Any) -> Callable[[Rule], Rule]:
    """Register a function as the rule of these operators."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(packets, function))
        return function

    return register


def find_rule(func: Any) -> Rule | None:
    """The rule of an operator overload; operators that PyTorch tags as pointwise share one."""
    known = RULES.get(func.overloadpacket)
    if known is None and torch.Tag.pointwise in func.tags:
        return pointwise
    return known


def _axes(tensor: Tensor) -> Axes:
    return axes_of(tensor) or plain(tensor.shape)


def _labelled_self(call: Call) -> Axes:
    axes = axes_of(call.self)
    if axes is None:
        raise MixesTokens(f"{call.func.overloadpacket} looks things up by token")
    return axes


def _whole(dim: Dim, what: str) -> Tokens | None:
    """The token factor of a dimension that is nothing but tokens."""
    tokens = tokens_of(dim)
    if tokens is not None and len(dim) != 1:
        raise MixesTokens(f"{what} on an axis that merges tokens with others")
    return tokens


def _refuse_tokens(axes: Axes, dims: Sequence[int], what: str) -> list[int]:
    normal = [d % len(axes) for d in dims]
    if any(tokens_of(axes[d]) for d in normal):
        raise MixesTokens(f"{what} runs over the token axis")
    return normal


# -- pointwise ------------------------------------------------------------------------------------------------


def pointwise(call: Call) -> Axes:
    """Token axes that line up stay; an operand of fixed token length is noted as a :class:`Position`."""
    out = call.out[0] if isinstance(call.out, (tuple, list)) else call.out
    operands = [t for t in tensors_in((call.args, call.kwargs)) if t.ndim]
    return align(call, [(t, axes_of(t)) for t in operands], tuple(out.shape))


def align(call: Call, operands: Sequence[tuple[Tensor, Axes | None]], shape: Sequence[int]) -> Axes:
    """The axes of operands that are broadcast to ``shape``; notes operands of fixed token length in the call.

    Every operand comes with its axes, ``None`` for one without tokens.

    Raises:
        MixesTokens: token axes meet that are out of step.
    """
    rank = len(shape)
    result: list[Dim] = []
    noted: dict[tuple[int, int], Tokens] = {}
    for d in range(rank):
        present = []
        for i, (tensor, axes) in enumerate(operands):
            own = d - rank + tensor.ndim
            if own >= 0 and tensor.shape[own] != 1:
                present.append((i, own, (axes or plain(tensor.shape))[own]))
        with_tokens = {dim for _, _, dim in present if tokens_of(dim)}
        if len(with_tokens) > 1:
            raise MixesTokens(f"token axes that are out of step meet in {call.func.overloadpacket}")
        if not with_tokens:
            labelled = [dim for i, _, dim in present if operands[i][1] is not None]
            result.append(next(iter(labelled), merge_ints((shape[d],))))
            continue
        (dim,) = with_tokens
        result.append(dim)
        for i, own, other in present:
            if not tokens_of(other):
                tokens = _whole(dim, "an operand of fixed length")
                assert tokens is not None
                if operands[i][1] is not None:
                    raise MixesTokens(
                        "a token axis meets an axis of fixed length that moves with tokens"
                    )
                noted[i, own] = tokens
    batch = next((d for d, dim in enumerate(result) if _is_batch(dim)), None)
    for (i, own), tokens in noted.items():
        operand = operands[i][0]
        per_sample, repeat = False, 1
        if batch is not None:
            at = batch - rank + operand.ndim
            per_sample = at >= 0 and operand.shape[at] != 1
            repeat = math.prod(size(factor) for factor in result[batch][1:])
        call.positions.append(Position(operand, own, tokens, rank, batch, per_sample, repeat))
    return tuple(result)


def _is_batch(dim: Dim) -> bool:
    return bool(dim) and not isinstance(dim[0], (int, Tokens))


def tensors_in(tree: Any) -> list[Tensor]:
    """Every tensor in nested tuples, lists and dicts, in order."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        return [t for value in tree.values() for t in tensors_in(value)]
    if isinstance(tree, (tuple, list)):
        return [t for value in tree for t in tensors_in(value)]
    return []


@rule(
    aten._to_copy,
    aten.alias,
    aten.bernoulli,
    aten.copy,
    aten.copy_,
    aten.detach,
    aten.dropout,
    aten.hardswish,
    aten.native_dropout,
    aten.rsub,
    aten.floor_divide,
    aten._prelu_kernel,
    aten.rrelu_with_noise,
)
def _pointwise_untagged(call: Call) -> Axes:
    return pointwise(call)


@rule(
    aten.bernoulli_,
    aten.fill_,
    aten.normal_,
    aten.random_,
    aten.uniform_,
    aten.zero_,
    aten.empty_like,
    aten.full_like,
    aten.lift_fresh_copy,
    aten.ones_like,
    aten.rand_like,
    aten.randn_like,
    aten.zeros_like,
)
def _same_as_self(call: Call) -> Axes:
    return _labelled_self(call)


@rule(aten.new_empty, aten.new_zeros, aten.new_ones, aten.new_full, aten.sym_size, aten.sym_numel)
def _unrelated(call: Call) -> None:
    return None


# -- shape ----------------------------------------------------------------------------------------------------


@rule(
    aten.view,
    aten._unsafe_view,
    aten._reshape_alias,
    aten.reshape,
    aten.squeeze,
    aten.unsqueeze,
    aten.flatten,
)
def _reshape(call: Call) -> Axes:
    return regroup(_labelled_self(call), call.out.shape)


@rule(aten.view_as_complex)
def _view_as_complex(call: Call) -> Axes:
    axes = _labelled_self(call)
    _refuse_tokens(axes, [-1], "view_as_complex")
    return axes[:-1]


@rule(aten.view_as_real)
def _view_as_real(call: Call) -> Axes:
    return (*_labelled_self(call), (2,))


@rule(aten.expand)
def _expand(call: Call) -> Axes:
    axes = _labelled_self(call)
    shape = call.out.shape
    fresh = len(shape) - len(axes)
    grown = plain(shape)
    return tuple(
        grown[d] if d < fresh or call.self.shape[d - fresh] == 1 else axes[d - fresh]
        for d in range(len(shape))
    )


@rule(aten.repeat)
def _repeat(call: Call) -> Axes:
    axes = _labelled_self(call)
    repeats = list(call.argument(1, "repeats"))
    axes = (*((),) * (len(repeats) - len(axes)), *axes)
    result: list[Dim] = []
    for dim, times in zip(axes, repeats, strict=True):
        if times == 1:
            result.append(dim)
        elif any(not isinstance(factor, int) for factor in dim):
            raise MixesTokens("repeat along the token or batch axis")
        else:
            result.append(merge_ints((times, *dim)))
    return tuple(result)


@rule(aten.permute)
def _permute(call: Call) -> Axes:
    axes = _labelled_self(call)
    return tuple(axes[d] for d in call.argument(1, "dims"))


@rule(aten.transpose)
def _transpose(call: Call) -> Axes:
    axes = list(_labelled_self(call))
    a, b = call.argument(1, "dim0"), call.argument(2, "dim1")
    axes[a], axes[b] = axes[b], axes[a]
    return tuple(axes)


@rule(aten.t)
def _t(call: Call) -> Axes:
    return tuple(reversed(_labelled_self(call)))


@rule(aten.select)
def _select(call: Call) -> Axes:
    axes = list(_labelled_self(call))
    d = call.argument(1, "dim") % len(axes)
    tokens = _whole(axes[d], "select")
    if tokens:
        index = call.argument(2, "index") % size(tokens)
        if tokens.lead <= index < tokens.lead + tokens.patches:
            raise MixesTokens("a patch token is picked out by its position")
        call.reads = index + 1 - tokens.lead
    del axes[d]
    return tuple(axes)


def _cut(tokens: Tokens, start: int, stop: int) -> Dim:
    """The rows ``start:stop`` of a token axis: all patches with part of the rest, or none of them."""
    first, last = tokens.lead, tokens.lead + tokens.patches
    if start <= first and stop >= last:
        return (tokens._replace(lead=first - start, tail=stop - last),)
    if stop <= first or start >= last:
        return merge_ints((stop - start,))
    raise MixesTokens("a slice cuts the patch tokens in two by position")


@rule(aten.slice)
def _slice(call: Call) -> Axes:
    axes = list(_labelled_self(call))
    d = call.argument(1, "dim", 0) % len(axes)
    length = call.self.shape[d]
    start, stop = call.argument(2, "start"), call.argument(3, "end")
    step = call.argument(4, "step", 1)
    start, stop, _ = slice(start, stop).indices(length)
    tokens = tokens_of(axes[d])
    if (start, stop, step) == (0, length, 1):
        return tuple(axes)
    if tokens is None:
        axes[d] = merge_ints((call.out.shape[d],))
        return tuple(axes)
    _whole(axes[d], "a slice")
    if step != 1:
        raise MixesTokens("a slice with a step picks tokens by their position")
    axes[d] = _cut(tokens, start, stop)
    if not tokens_of(axes[d]):
        call.reads = stop - tokens.lead
    return tuple(axes)


@rule(aten.split, aten.split_with_sizes, aten.split_copy, aten.split_with_sizes_copy)
def _split(call: Call) -> list[Axes | None]:
    axes = _labelled_self(call)
    d = call.argument(2, "dim", 0) % len(axes)
    tokens = _whole(axes[d], "split")
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
    axes = _labelled_self(call)
    (d,) = _refuse_tokens(axes, [call.argument(1, "dim", 0)], "unbind")
    return [(*axes[:d], *axes[d + 1 :])] * len(call.out)


@rule(aten.cat)
def _cat(call: Call) -> Axes:
    tensors = [t for t in call.argument(0, "tensors") if t.shape != (0,)]
    rank = tensors[0].ndim
    d = call.argument(1, "dim", 0) % rank
    tensors = [t for t in tensors if t.shape[d]] or tensors[:1]  # a prefix may be empty
    along = [_axes(t)[d] for t in tensors]
    carriers = [i for i, dim in enumerate(along) if tokens_of(dim)]
    # everywhere but along d, the parts must line up; there they are joined
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
        raise MixesTokens("two token sequences are joined to one")
    else:
        (at,) = carriers
        tokens = _whole(along[at], "cat")
        assert tokens is not None
        before = sum(t.shape[d] for t in tensors[:at])
        after = sum(t.shape[d] for t in tensors[at + 1 :])
        joined = (tokens._replace(lead=tokens.lead + before, tail=tokens.tail + after),)
    return (*across[:d], joined, *across[d + 1 :])


@rule(aten.stack)
def _stack(call: Call) -> Axes:
    tensors = call.argument(0, "tensors")
    d = call.argument(1, "dim", 0) % call.out.ndim
    shape = [s for i, s in enumerate(call.out.shape) if i != d]
    axes = align(call, [(t, axes_of(t)) for t in tensors], shape)
    if call.positions:
        raise MixesTokens("tokens are stacked with a tensor of fixed token length")
    return (*axes[:d], merge_ints((len(tensors),)), *axes[d:])


@rule(aten.constant_pad_nd)
def _pad(call: Call) -> Axes:
    axes = list(_labelled_self(call))
    pad = call.argument(1, "pad")
    for i in range(len(pad) // 2):
        if pad[2 * i] or pad[2 * i + 1]:
            _refuse_tokens(tuple(axes), [-1 - i], "padding")
            axes[-1 - i] = merge_ints((call.out.shape[-1 - i],))
    return tuple(axes)


# -- along one dimension --------------------------------------------------------------------------------------


@rule(
    aten.cumsum,
    aten.cumprod,
    aten.sort,
    aten.topk,
    aten.glu,
    aten.flip,
    aten.roll,
    aten._log_softmax,
)
def _along(call: Call) -> list[Axes | None] | Axes:
    """Operators that run along dimensions which are not the token axis, and may change their length."""
    axes = _labelled_self(call)
    names = {aten.topk: (2, "dim"), aten.flip: (1, "dims"), aten.roll: (2, "dims")}
    dims = call.argument(*names.get(call.func.overloadpacket, (1, "dim")), -1)
    dims = list(dims) if isinstance(dims, (list, tuple)) else [dims]
    if not dims:
        raise MixesTokens(f"{call.func.overloadpacket} runs over all axes")
    normal = _refuse_tokens(axes, dims, str(call.func.overloadpacket))
    outs = call.out if isinstance(call.out, (tuple, list)) else [call.out]
    results: list[Axes | None] = [
        tuple(merge_ints((out.shape[d],)) if d in normal else dim for d, dim in enumerate(axes))
        for out in outs
    ]
    return results if isinstance(call.out, (tuple, list)) else results[0] or ()


@rule(aten._softmax, aten._safe_softmax)
def _softmax(call: Call) -> Axes:
    axes = list(_labelled_self(call))
    d = call.argument(1, "dim") % len(axes)
    tokens = _whole(axes[d], "softmax")
    if tokens:
        axes[d] = (tokens._replace(weights=True),)
        call.softmax_over = tokens
    return tuple(axes)


_REDUCTION_DIM = {
    aten.linalg_vector_norm: 2,
    aten.norm: 2,
}


@rule(
    aten.all,
    aten.amax,
    aten.amin,
    aten.any,
    aten.argmax,
    aten.argmin,
    aten.linalg_vector_norm,
    aten.logsumexp,
    aten.max,
    aten.mean,
    aten.min,
    aten.norm,
    aten.prod,
    aten.std,
    aten.std_mean,
    aten.sum,
    aten.var,
    aten.var_mean,
)
def _reduce(call: Call) -> list[Axes | None] | Axes:
    axes = _labelled_self(call)
    outs = call.out if isinstance(call.out, (tuple, list)) else [call.out]
    other = call.argument(1, "other")
    if isinstance(other, Tensor):  # max(x, y), min(x, y)
        return pointwise(call)
    dims = call.argument(_REDUCTION_DIM.get(call.func.overloadpacket, 1), "dim")
    if dims is None or dims == []:
        raise MixesTokens(f"{call.func.overloadpacket} runs over all axes")
    dims = list(dims) if isinstance(dims, (list, tuple)) else [dims]
    normal = [d % len(axes) for d in dims]
    if any(tokens_of(axes[d]) for d in normal):
        raise PoolsTokens(f"{call.func.overloadpacket} runs over the token axis")
    keeps = outs[0].ndim == len(axes)
    reduced = tuple(
        () if d in normal else dim for d, dim in enumerate(axes) if keeps or d not in normal
    )
    return [reduced] * len(outs) if isinstance(call.out, (tuple, list)) else reduced


@rule(aten.native_layer_norm, aten._fused_rms_norm)
def _layer_norm(call: Call) -> list[Axes | None]:
    axes = _labelled_self(call)
    normalized = len(call.argument(1, "normalized_shape"))
    _refuse_tokens(axes, range(-normalized, 0), "normalisation")
    return [axes, *[None] * (len(call.out) - 1)]


@rule(aten.embedding)
def _embedding(call: Call) -> Axes:
    axes = axes_of(call.argument(1, "indices"))
    if axes is None:
        raise MixesTokens("an embedding table made of tokens")
    return (*axes, merge_ints((call.out.shape[-1],)))


# -- sums of products -----------------------------------------------------------------------------------------


def contract(call: Call, a: Axes, b: Axes, a_dim: int, b_dim: int) -> None:
    """Check that what is summed over are channels, or attention weights with their values."""
    left, right = tokens_of(a[a_dim]), tokens_of(b[b_dim])
    if left is None and right is None:
        return
    if left is None or right is None:
        raise MixesTokens("a matrix of fixed size is multiplied over the token axis")
    same = left._replace(weights=False) == right._replace(weights=False)
    if not (
        same and left.weights != right.weights and a[a_dim] == (left,) and b[b_dim] == (right,)
    ):
        raise MixesTokens("a sum over the token axis that is not attention weights times values")
    call.sums_weights = True


def _mm(call: Call, a: Tensor, b: Tensor) -> Axes:
    left, right = _axes(a), _axes(b)
    contract(call, left, right, -1, -2)
    batch: tuple[Dim, ...] = ()
    if len(left) == 3:
        # a matrix that is expanded over the batch (stride 0) is one matrix, whatever the length
        dims = [ax[0] for ax, t in ((left, a), (right, b)) if t.stride(0) != 0 or t.shape[0] == 1]
        if any(tokens_of(dim) for dim in dims) and len(set(dims)) > 1:
            raise MixesTokens("a batch of matrices per token meets one of fixed length")
        candidates = [dim for dim in dims if any(not isinstance(f, int) for f in dim)]
        batch = (max(candidates or dims or [left[0]], key=len),)
    return (*batch, left[-2], right[-1])


@rule(aten.mm, aten.bmm)
def _matrix_product(call: Call) -> Axes:
    return _mm(call, call.args[0], call.args[1])


@rule(aten.mv)
def _matrix_vector(call: Call) -> Axes:
    a, b = _axes(call.args[0]), _axes(call.args[1])
    contract(call, a, b, -1, -1)
    return (a[0],)


@rule(aten.addmm, aten.baddbmm)
def _add_matrix_product(call: Call) -> Axes:
    bias, a, b = call.args[:3]
    axes = _mm(call, a, b)
    return (
        align(call, [(bias, axes_of(bias)), (call.out, axes)], call.out.shape)
        if bias.ndim
        else axes
    )


@rule(aten.linear)
def _linear(call: Call) -> Axes:
    axes = _labelled_self(call)
    _refuse_tokens(axes, [-1], "a linear layer")
    return (*axes[:-1], merge_ints((call.out.shape[-1],)))


@rule(aten.convolution)
def _convolution(call: Call) -> Axes:
    """A convolution whose kernel has length 1 along the token axis treats every token alone."""
    axes = _labelled_self(call)
    weight = call.args[1]
    stride, padding, _, transposed = call.args[3:7]
    for d in range(2, len(axes)):
        kernel = (weight.shape[d], stride[d - 2], padding[d - 2], transposed)
        if tokens_of(axes[d]) and kernel != (1, 1, 0, False):
            raise MixesTokens("a convolution runs over the token axis")
    _refuse_tokens(axes, [1], "a convolution's sum over channels")
    spatial = tuple(
        axes[d] if tokens_of(axes[d]) else merge_ints((call.out.shape[d],))
        for d in range(2, len(axes))
    )
    return (axes[0], merge_ints((call.out.shape[1],)), *spatial)


# -- attention ------------------------------------------------------------------------------------------------


def attend(
    call: Call, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, causal: bool
) -> Axes:
    """``scaled_dot_product_attention``: ``[..., queries, channels]`` from keys and values ``[..., keys, channels]``."""
    q, k, v = _axes(query), _axes(key), _axes(value)
    for name, axes in (("queries", q), ("keys", k), ("values", v)):
        _refuse_tokens(axes, [-1], f"attention over the channels of its {name}")
        if any(tokens_of(dim) for dim in axes[:-2]):
            raise MixesTokens("attention among the heads or channels of each token")
    keys = _whole(k[-2], "attention")
    _whole(q[-2], "attention")
    if keys != _whole(v[-2], "attention"):
        raise MixesTokens("keys and values of an attention are out of step")
    if causal:
        raise MixesTokens("causal attention depends on the order of all tokens")
    leading = tuple(next((d for d in dims if d), ()) for dims in zip(q[:-2], k[:-2], strict=False))
    if mask is not None:
        logits = query.new_empty((*query.shape[:-1], key.shape[-2]))
        its_axes = (*leading, q[-2], k[-2])
        align(call, [(logits, its_axes), (mask, axes_of(mask))], logits.shape)
    if keys:
        call.softmax_over = keys
        call.sums_weights = True
    return (*leading, q[-2], v[-1])
