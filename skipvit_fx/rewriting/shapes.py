"""Check that the rewritten graph runs, and that every tensor in it has the shape that the plan gives it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from skipvit_fx.analysis.axes import Dim, Tokens, axes_of, size
from skipvit_fx.author.code import AuthorError, author_code
from skipvit_fx.errors import UnsupportedModelError
from skipvit_fx.graph.module_paths import module_path
from skipvit_fx.names import INSERTED_BY
from skipvit_fx.ops.score import ScoreByFunction
from skipvit_fx.rewriting.context import Context


def check_shapes(context: Context) -> None:
    """Run everything that the drops reach once more on fake tensors, from the first edit on.

    This is the last line of defence: whatever the passes overlooked, a wrong token count does not leave the compiler.

    Raises:
        UnsupportedModelError: a node does not run on fewer tokens, or does not have the expected shape.
    """
    known = context.analysis.facts
    values: dict[fx.Node, Any] = {}
    for node in context.editor.graph.nodes:
        arguments = node.all_input_nodes
        authors = node in known and INSERTED_BY not in node.meta
        if node.op == "output" or (authors and not any(a in values for a in arguments)):
            continue
        values[node] = value = _run(context, node, values)
        if authors:
            _compare(context, node, value)


def _run(context: Context, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    def value(argument: fx.Node) -> Any:
        return values[argument] if argument in values else context.analysis[argument].value

    inputs: Any = fx.node.map_arg((node.args, node.kwargs), value)
    args, kwargs = inputs
    if node.op == "get_attr":
        return context.analysis.fake_attribute(str(node.target))
    called: Any = context.analysis.callee(node)
    if isinstance(called, ScoreByFunction):  # the user's own code may need real numbers
        stream, dim = args[0], called.dim
        patches = stream.shape[dim] - called.prefix - called.suffix
        with context.analysis.fake_mode:
            return stream.new_empty(stream.shape[1 - dim], patches)
    try:
        with context.analysis.fake_mode, torch.no_grad(), author_code():
            return called(*args, **kwargs)
    except AuthorError as error:
        raise UnsupportedModelError(
            f"does not run on fewer tokens: {error.message}",
            node=node.name,
            module_path=module_path(node),
            hint="this place fixes the number of tokens in a way that the compiler does not know",
        ) from error


def _compare(context: Context, node: fx.Node, value: Any) -> None:
    before = context.analysis[node].value
    if not isinstance(value, Tensor) or not isinstance(before, Tensor):
        return
    axes = axes_of(before)
    expected = (
        tuple(before.shape) if axes is None else tuple(_length(context, node, dim) for dim in axes)
    )
    narrow = node in context.narrow
    fits = value.ndim == len(expected) and all(
        have == want or (narrow and axes is not None and have < want)
        for have, want in zip(value.shape, expected, strict=True)
    )
    if not fits:
        raise UnsupportedModelError(
            f"has shape {list(value.shape)} on fewer tokens, where {list(expected)} was expected",
            node=node.name,
            module_path=module_path(node),
            hint="this place fixes the number of tokens in a way that the compiler does not know",
        )


def _length(context: Context, node: fx.Node, dim: Dim) -> int:
    return math.prod(
        size(factor._replace(patches=context.patches_at(node, factor.patches)))
        if isinstance(factor, Tokens)
        else size(factor)
        for factor in dim
    )
