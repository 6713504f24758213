"""The exported program in operators that old ONNX opsets have and ATC's fusions look for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from skipvit_fx.graph.attention_ops import SOFTMAX, AttentionArguments
from skipvit_fx.torch_internals import aten


def decompose(program: ExportedProgram, *, norms: bool) -> ExportedProgram:
    """Attention as MatMul, Mul, (Add,) Softmax, MatMul; GELU through Erf.

    With ``norms``, LayerNorm spelled out, and a new axis as a reshape: whether ATC accepts Unsqueeze is less known.
    """
    table: dict[Any, Callable[..., Any]] = {
        aten.scaled_dot_product_attention.default: _attention,
        aten.gelu.default: _gelu,
    }
    if norms:
        table |= {aten.layer_norm.default: _layer_norm, aten.rms_norm.default: _rms_norm}
        table[aten.unsqueeze.default] = _unsqueeze
    decomposed: ExportedProgram = program.run_decompositions(table)
    return decomposed


def _layer_norm(
    x: Tensor,
    shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    dims = list(range(-len(shape), 0))
    centred = x - x.mean(dims, keepdim=True)
    variance = centred.pow(2.0).mean(dims, keepdim=True)
    return _affine(centred / (variance + eps).sqrt(), weight, bias)


def _rms_norm(
    x: Tensor, shape: list[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    dims = list(range(-len(shape), 0))
    power = x.pow(2.0).mean(dims, keepdim=True)
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return _affine(x / (power + eps).sqrt(), weight, None)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _unsqueeze(x: Tensor, dim: int) -> Any:
    if not all(isinstance(size, int) for size in x.shape):
        return NotImplemented
    shape = [*x.shape]
    shape.insert(dim % (x.ndim + 1), 1)
    return x.reshape(shape)


def _gelu(x: Tensor, approximate: str = "none") -> Tensor:
    if approximate == "tanh":
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3.0))
        return x * (torch.tanh(inner) + 1.0) * 0.5
    return x * (torch.erf(x / math.sqrt(2)) + 1.0) * 0.5


def _attention(*args: Any, **kwargs: Any) -> Tensor:
    given = AttentionArguments(*args, **kwargs)
    query, key, value, mask = given[:4]
    if given.enable_gqa and key.shape[-3] != query.shape[-3]:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (_repeat_heads(x, groups) for x in (key, value))
    scale = query.shape[-1] ** -0.5 if given.scale is None else given.scale
    logits = (query @ key.transpose(-2, -1)) * scale
    if given.is_causal:
        rows, columns = logits.shape[-2:]
        mask = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=logits.dtype).masked_fill(~mask, -torch.inf)
        logits = logits + mask
    output: Tensor = logits.softmax(-1) @ value
    return output


def _repeat_heads(x: Tensor, groups: int) -> Tensor:
    sizes = [*x.shape[:-3], x.shape[-3], groups, *x.shape[-2:]]
    return x.unsqueeze(-3).expand(sizes).flatten(-4, -3)


# -- one consumer for every attention matrix -----------------------------------------------------------------------

_BY_ELEMENT = frozenset(
    {aten.add.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.sub.Tensor, aten.where.self}
)
_PASS = frozenset(
    {aten.dropout.default, aten.clone.default, aten.contiguous.default, aten.to.dtype}
)


def free_attention_matrices(program: ExportedProgram) -> None:
    """Compute a row of attention weights from one query if it was read from the whole matrix.

    Before::

        a = softmax(q @ k);  o = a @ v;  row = a[:, :, 0:1]

    After::

        a = softmax(q @ k);  o = a @ v;  row = softmax(q[:, :, 0:1] @ k)

    A matrix that nothing else reads is left alone.
    """
    graph = program.graph
    for node in list(graph.nodes):
        if node.target not in (aten.slice.Tensor, aten.narrow.default):
            continue
        source, dim = node.args[0], _positive(node.args[1], node.args[0])
        softmax = source
        while softmax.target in _PASS:
            softmax = softmax.args[0]
        if softmax.target not in SOFTMAX or _positive(softmax.args[1], softmax) == dim:
            continue
        if len(source.users) > 1 or len(softmax.users) > 1:
            with graph.inserting_before(node):
                node.replace_all_uses_with(_sliced(graph, source, dim, _span(node), {}))
    graph.eliminate_dead_code()
    graph.lint()


def _span(node: fx.Node) -> tuple[Any, ...]:
    """Start and end of a slice."""
    if node.target is not aten.narrow.default:
        return node.args[2:]
    source, dim, start, length = node.args
    assert isinstance(source, fx.Node)
    assert isinstance(dim, int)
    if isinstance(start, int) and start < 0:
        start += source.meta["val"].shape[dim]
    return start, start + length  # type: ignore[operator]


def _rank(node: fx.Node) -> int:
    rank = node.meta["val"].ndim
    assert isinstance(rank, int)
    return rank


def _positive(dim: Any, node: fx.Node) -> int:
    assert isinstance(dim, int)
    return dim % _rank(node)


def _sliced(
    graph: fx.Graph, node: fx.Node, dim: int, span: tuple[Any, ...], made: dict[fx.Node, fx.Node]
) -> fx.Node:
    """``node`` sliced along ``dim``, by slicing its inputs as far up as the rules allow."""
    if node not in made:
        arguments = _sliced_arguments(graph, node, dim, span, made)
        made[node] = (
            _slice(graph, node, dim, span) if arguments is None else _copied(graph, node, arguments)
        )
    return made[node]


def _sliced_arguments(
    graph: fx.Graph, node: fx.Node, dim: int, span: tuple[Any, ...], made: dict[fx.Node, fx.Node]
) -> tuple[Any, ...] | None:
    if node.target in _PASS or (node.target in SOFTMAX and _positive(node.args[1], node) != dim):
        first, *rest = node.args
        assert isinstance(first, fx.Node)
        return (_sliced(graph, first, dim, span, made), *rest)
    if node.target in _BY_ELEMENT:
        arguments: list[Any] = []
        for argument in node.args:
            if isinstance(argument, fx.Node):
                own = dim - _rank(node) + _rank(argument)
                if own >= 0 and argument.meta["val"].shape[own] != 1:
                    argument = _sliced(graph, argument, own, span, made)
            arguments.append(argument)
        return tuple(arguments)
    if node.target is aten.matmul.default and dim == _rank(node) - 2:
        left, right = node.args
        assert isinstance(left, fx.Node)
        if _rank(left) >= 2:
            return _slice(graph, left, _rank(left) - 2, span), right
    return None


def _slice(graph: fx.Graph, node: fx.Node, dim: int, span: tuple[Any, ...]) -> fx.Node:
    made = graph.call_function(aten.slice.Tensor, (node, dim, *span))
    made.meta["val"] = aten.slice.Tensor(node.meta["val"], dim, *span)
    return made


def _copied(graph: fx.Graph, node: fx.Node, args: tuple[Any, ...]) -> fx.Node:
    made = graph.call_function(node.target, args, dict(node.kwargs))  # type: ignore[arg-type]
    values = [a.meta["val"] if isinstance(a, fx.Node) else a for a in args]
    made.meta = dict(node.meta)
    made.meta["val"] = node.target(*values, **node.kwargs)  # type: ignore[operator]
    return made
