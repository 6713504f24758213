"""Sizes: a reshape under a drop follows its input, everything else still sees the full token count."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, fx

from skipvit_fx.analysis.axes import Axes, Batch, Dim, size, tokens_of
from skipvit_fx.errors import UnsupportedModelError
from skipvit_fx.graph.module_paths import module_path
from skipvit_fx.graph.sizes import RESHAPES, SIZE_FREE, dimension_of, sizes_of
from skipvit_fx.ops.following import as_shape
from skipvit_fx.ops.guard import OF_KIND, guard
from skipvit_fx.rewriting.conditions import SIZES_FOLLOW
from skipvit_fx.rewriting.context import Context
from skipvit_fx.rewriting.passes import Condition
from skipvit_fx.rewriting.sizes import follow_input, is_live, sizes_argument


@dataclass(frozen=True)
class FollowTokenSizes:
    """Two kinds of size come from one expression; this pass tells them apart.

    Before::

        getitem_6 = getattr_4[1]                                # the length of blocks_1_q
        mul_1 = blocks_1_q * getitem_6                          # a number that the author computes with
        reshape_1 = mul_1.reshape(getitem_7, 17, 2, 4)          # a length under the drop

    After::

        getitem_6 = getattr_4[1]
        mul_1 = blocks_1_q * 17
        mul_1_tokens = mul_1.size(1)
        reshape_1 = mul_1.reshape(getitem_7, mul_1_tokens, 2, 4)

    A drop never changes what the author computes from a token count, such as a position table or a scale: if such a
    size was read from the shortened sequence, its use gets the full count. That is a constant, since every input is
    bound to its size in the example.
    """

    name: ClassVar[str] = "follow-token-sizes"
    requires: ClassVar[tuple[Condition, ...]] = ()
    ensures: ClassVar[tuple[Condition, ...]] = (SIZES_FOLLOW,)

    def run(self, context: Context) -> None:
        """Rewrite the sizes under every drop.

        Raises:
            UnsupportedModelError: a number is read from a sequence in a way that the pass does not know.
        """
        nodes = list(context.spans.nodes())
        for node in nodes:
            follow_input(context, node)
        for node in nodes:
            _fix_to_full(context, node)


def _fix_to_full(context: Context, node: fx.Node) -> None:
    """Let users of a size read under a drop see the full count instead, unless they follow their input."""
    value = context.analysis[node].value
    if isinstance(value, Tensor) or node.op == "output":
        return
    if node.target is guard and node.args[1] in OF_KIND:
        return
    source = node.args[0] if node.args else None
    facts = context.analysis.facts
    if not isinstance(source, fx.Node) or source not in facts:
        return  # a number computed from numbers, including inserted ones
    if not isinstance(facts[source].value, Tensor):
        return
    axes = context.analysis.axes(source)
    if (
        axes is None
        or node.target in SIZE_FREE
        or (node.target is getattr and node.args[1] in SIZE_FREE)
    ):
        return
    found = dimension_of(node, context.analysis.rank)
    if found is not None:
        if tokens_of(axes[found[1]]):
            _redirect(context, node, axes[found[1]])
        return
    if sizes_of(node) is None:
        if isinstance(value, (tuple, list)):
            return  # several tensors
        raise UnsupportedModelError(
            "a number is read from a sequence of tokens, and may depend on how many there are",
            node=node.name,
            module_path=module_path(node),
            hint="compute it from the shape of a tensor before the first layer instead",
        )
    _redirect_shape(context, node, axes)


def _redirect_shape(context: Context, node: fx.Node, axes: Axes) -> None:
    """Redirect ``x.shape`` or a slice of it, element by element."""
    found = sizes_of(node)
    assert found is not None
    dims = list(range(len(axes)))[found[1]]
    for user in list(node.users):
        if user.target is operator.getitem:
            if isinstance(user.args[1], slice):
                _redirect_shape(context, user, axes)
                continue
            element = dimension_of(user, context.analysis.rank)
            if element is not None and tokens_of(axes[element[1]]):
                _redirect(context, user, axes[element[1]])
            continue
        if not any(tokens_of(axes[d]) for d in dims):
            continue
        editor = context.editor
        parts: Any = tuple(
            _full_size(context, user, axes[d])
            if tokens_of(axes[d])
            else editor.insert_call(
                operator.getitem, (node, i), before=user, name=f"{node.name}_{i}"
            )
            for i, d in enumerate(dims)
        )
        if getattr(user.target, "__module__", None) == "_operator":
            parts = editor.insert_call(as_shape, parts, before=user, name=f"{node.name}_full")
        editor.rewire(user, node, parts)


def _redirect(context: Context, node: fx.Node, dim: Dim) -> None:
    for user in list(node.users):
        if not _follows(context, user, node):
            context.editor.rewire(user, node, _full_size(context, user, dim))


def _follows(context: Context, user: fx.Node, size_node: fx.Node) -> bool:
    """Whether the user is a reshape that uses the size only for a token axis under the same drops."""
    axes = context.analysis.axes(user) if user in context.analysis.facts else None
    if user.target not in RESHAPES or axes is None:
        return False
    _, sizes, _ = sizes_argument(context, user)
    if isinstance(sizes, fx.Node):
        return False
    uses = [axes[d] for d, slot in enumerate(sizes) if slot is size_node]
    return bool(uses) and all(
        tokens_of(dim) and is_live(context, user, size_node, dim) for dim in uses
    )


def _full_size(context: Context, reader: fx.Node, dim: Dim) -> int:
    """The length of a token axis without any drop.

    Raises:
        UnsupportedModelError: there is no such number, or it would no longer have its meaning.
    """
    if any(isinstance(factor, Batch) for factor in dim):
        reason = "the size of an axis that merges tokens with samples is used in a computation"
        hint = "compute it from the batch size and the token count separately"
    elif context.spans.is_after_the_layers(reader):
        reason = "the number of tokens is used after the last layer, where some of them have left for good"
        hint = f"let them return: {context.plan}+{len(context.stream.layers) + 1}"
    else:
        return math.prod(map(size, dim))
    raise UnsupportedModelError(
        reason, node=reader.name, module_path=module_path(reader), hint=hint
    )
