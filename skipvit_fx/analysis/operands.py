"""The queries, keys and values of an attention, fused or spelled out."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from skipvit_fx.analysis.axes import (
    Axes,
    Batch,
    Tokens,
    axes_of,
    mark_data,
    plain_token_dim,
    set_axes,
    size,
    tokens_of,
)
from skipvit_fx.analysis.layers import AttentionSite
from skipvit_fx.analysis.tokens import TokenAnalysis
from skipvit_fx.errors import UnsupportedModelError
from skipvit_fx.graph.attention_ops import AttentionArguments
from skipvit_fx.graph.nodes import leading_to
from skipvit_fx.torch_internals import aten

_MATRIX_PRODUCTS: frozenset[Any] = frozenset(
    {"matmul", "bmm", "baddbmm", "__matmul__", operator.matmul}
    | {torch.matmul, torch.bmm, torch.baddbmm, Tensor.matmul, Tensor.bmm, Tensor.baddbmm}
    | {aten.matmul.default, aten.bmm.default, aten.baddbmm.default}
)
_SUMS_OF_PRODUCTS = frozenset({torch.einsum, torch.functional.einsum, aten.einsum.default})


class Operand(NamedTuple):
    """A tensor that an attention multiplies.

    Attributes:
        node: the author's node.
        tokens, channels: the dimensions of its tokens and of its channels, from the right: negative. All others are
            samples and heads.
    """

    node: fx.Node
    tokens: int
    channels: int


class Operands(NamedTuple):
    """What an attention multiplies: ``softmax(query key^T) value``."""

    query: Operand
    key: Operand
    value: Operand

    def named(self, name: str) -> Operand:
        """By a name of ``OPERANDS``."""
        return self[OPERANDS.index(name)]


OPERANDS = ("queries", "keys", "values")
"""What a score calls them."""


def find_operands(analysis: TokenAnalysis, site: AttentionSite) -> Operands:
    """The operands of an attention; the graph must be as it was captured.

    Raises:
        UnsupportedModelError: they cannot be told.
    """
    if site.fused:
        given = AttentionArguments(*site.node.args, **site.node.kwargs)
        return Operands(*(Operand(node, -2, -1) for node in given[:3]))
    product = _product_of(analysis, site)
    both = [_operand(analysis, product, node) for node in _with_tokens(analysis, product)]
    keys = [o for o in both if o and _becomes_keys(analysis, product, o.node, site.node)]
    if len(both) != 2 or None in both or len(keys) != 1:
        raise _unknown(site, "keys", product)
    (key,) = keys
    (query,) = (o for o in both if o and o is not key)
    return Operands(query, key, _value_of(analysis, site))


def heads_of(site: AttentionSite, leading: Axes) -> int:
    """Heads per sample, from the axes of samples and heads.

    Raises:
        UnsupportedModelError: the samples do not come first, alone or with the heads in one axis with them.
    """
    factors = [factor for dim in leading for factor in dim]
    if not factors or not isinstance(factors[0], Batch):
        raise UnsupportedModelError(
            "the batch is not the first axis of this attention",
            node=site.node.name,
            module_path=site.module_path,
            hint="drop tokens by score='random' or by a function of the tokens alone, which do not read the attention",
        )
    return math.prod(size(factor) for factor in factors[1:])


def _product_of(analysis: TokenAnalysis, site: AttentionSite) -> fx.Node:
    """The node that multiplies queries with keys: it makes a tensor with two token axes of two that have one."""
    logits = leading_to([site.node], lambda node: _token_dims(analysis, node) == 2) - {site.node}
    first = [node for node in logits if logits.isdisjoint(node.all_input_nodes)]
    products = [node for node in first if len(_with_tokens(analysis, node)) == 2]
    if len(products) != 1:
        raise _unknown(site, "keys", site.node)
    return products[0]


def _value_of(analysis: TokenAnalysis, site: AttentionSite) -> Operand:
    """What the weights of a softmax are summed with."""
    weights = {site.node}
    node = site.node.next
    while node.op != "root":
        if not weights.isdisjoint(node.all_input_nodes):
            if analysis[node].sums_weights:
                others = [a for a in _with_tokens(analysis, node) if a not in weights]
                value = _operand(analysis, node, others[0]) if len(others) == 1 else None
                if value is None:
                    break
                return value
            weights.add(node)
        node = node.next
    raise _unknown(site, "values", site.node)


def _with_tokens(analysis: TokenAnalysis, node: fx.Node) -> list[fx.Node]:
    return [argument for argument in node.all_input_nodes if _token_dims(analysis, argument)]


def _token_dims(analysis: TokenAnalysis, node: fx.Node) -> int:
    value = analysis.value(node)
    axes = axes_of(value) if isinstance(value, Tensor) else None
    return sum(tokens_of(dim) is not None for dim in axes or ())


def _operand(analysis: TokenAnalysis, product: fx.Node, node: fx.Node) -> Operand | None:
    """An argument of a product, if it has one axis of tokens, and one over which it is summed, or which it gives."""
    rank = analysis.rank(node)
    tokens = plain_token_dim(analysis.axes(node))
    if tokens is None:
        return None
    tokens -= rank
    if product.target in _MATRIX_PRODUCTS and tokens >= -2:
        return Operand(node, tokens, -3 - tokens)
    if product.target in _SUMS_OF_PRODUCTS and isinstance(product.args[0], str):
        names = _names_of_dims(product, node, rank)
        others = [d for d, name in names.items() if d != tokens and _is_alone(product, name)]
        return Operand(node, tokens, others[0]) if len(others) == 1 else None
    return None


def _names_of_dims(product: fx.Node, node: fx.Node, rank: int) -> dict[int, str]:
    """The letters of an operand of an ``einsum``, by dimension from the right; those under an ellipsis have none."""
    terms, _ = _terms(product)
    front, _, back = terms[_arguments(product).index(node)].partition("...")
    names = {i - rank: letter for i, letter in enumerate(front)}
    return names | {i - len(back): letter for i, letter in enumerate(back)}


def _is_alone(product: fx.Node, letter: str) -> bool:
    """Whether a letter is in all terms and not in the result, or in just one and the result: it is the channels."""
    terms, result = _terms(product)
    holders = sum(letter in term for term in terms)
    return holders == (1 if letter in result else len(terms))


def _terms(product: fx.Node) -> tuple[list[str], str]:
    left, _, result = str(product.args[0]).replace(" ", "").partition("->")
    return left.split(","), result


def _arguments(product: fx.Node) -> list[Any]:
    given = product.args[1:]
    return list(given[0]) if len(given) == 1 and isinstance(given[0], (list, tuple)) else [*given]


def _becomes_keys(
    analysis: TokenAnalysis, product: fx.Node, operand: fx.Node, softmax: fx.Node
) -> bool:
    """Whether the softmax runs over the token axis of this operand, which is followed there under another name."""
    value = analysis.value(operand)
    axes = analysis.axes(operand) or ()
    dim = plain_token_dim(axes)
    assert dim is not None
    (tokens,) = axes[dim]
    assert isinstance(tokens, Tokens)
    prefix = 0 if tokens.prefix else 1
    other = Tokens(prefix, size(tokens) - prefix, 0)
    with analysis.fake_mode, torch.no_grad():
        renamed = value.detach()
        mark_data(renamed)
        set_axes(renamed, (*axes[:dim], (other,), *axes[dim + 1 :]))
        values: dict[fx.Node, Any] = {operand: renamed}
        for node in _from(product, softmax):
            if any(argument in values for argument in node.all_input_nodes):
                inputs: Any = fx.node.map_arg(
                    (node.args, node.kwargs), lambda a: values.get(a, analysis.value(a))
                )
                facts = analysis.execute(node, *inputs)
                values[node] = facts.value
    return facts.softmax_over == other


def _from(first: fx.Node, last: fx.Node) -> Iterable[fx.Node]:
    node = first
    while node is not last:
        yield node
        node = node.next
    yield last


def _unknown(site: AttentionSite, what: str, node: fx.Node) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the {what} of this attention cannot be told",
        node=node.name,
        module_path=site.module_path,
        hint="compute it as a matrix product or an einsum of queries and keys, and one of weights and values",
    )
