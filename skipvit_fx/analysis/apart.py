"""Whether a node keeps tokens apart, as far as this can be told without a plan."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from skipvit_fx.analysis.axes import Axes, Batch, axes_of, lengths, mark_data, set_axes, tensors_in
from skipvit_fx.analysis.leaves import computes_with_counts, described, structure
from skipvit_fx.analysis.tokens import TokenAnalysis, carries_tokens
from skipvit_fx.author.code import AuthorError
from skipvit_fx.errors import TraceError
from skipvit_fx.graph.sizes import PICKS, RESHAPES, SPLITS
from skipvit_fx.torch_internals import pytree


def why_not_apart(analysis: TokenAnalysis, node: fx.Node) -> str:
    """Why ``node`` may not see fewer tokens than in the author's model; empty if it treats each row independently."""
    if node not in analysis.mixes:
        analysis.mixes[node] = _how_it_mixes(analysis, node)
    return analysis.mixes[node]


def _how_it_mixes(analysis: TokenAnalysis, node: fx.Node) -> str:
    facts = analysis[node]
    if facts.mixing or not takes_tokens(analysis, node) or not tensors_in(facts.value):
        return facts.mixing
    is_code = _is_code(node)
    if is_code and facts.positions:
        return "a module holds values of fixed token length"
    if not is_code and not _takes_numbers(analysis, node):
        return ""
    callee = analysis.callee(node)
    own = structure(callee) if isinstance(callee, nn.Module) else node.target
    key = (own, tuple(map(described, pytree.tree_leaves(analysis.inputs(node)))))
    if key not in analysis.judged:
        judge = _judge if is_code else _counting
        analysis.judged[key] = judge(analysis, node)
    return analysis.judged[key]


def takes_tokens(analysis: TokenAnalysis, node: fx.Node) -> bool:
    """Whether any input of the node has a token axis."""
    return any(carries_tokens(analysis[argument]) for argument in node.all_input_nodes)


def _is_code(node: fx.Node) -> bool:
    """Whether the node calls Python code as a whole: a module, or a function that is not torch's."""
    if node.op == "call_function" and isinstance(node.target, types.FunctionType):
        return not node.target.__module__.startswith("torch.")
    return node.op == "call_module"


def _takes_numbers(analysis: TokenAnalysis, node: fx.Node) -> bool:
    """Whether an operator takes numbers that may count tokens and that no pass adapts to its input."""
    if node.op == "output" or node.target in RESHAPES | SPLITS | PICKS:
        return False
    return any(type(leaf) is int for leaf in pytree.tree_leaves(analysis.inputs(node)))


def _judge(analysis: TokenAnalysis, node: fx.Node) -> str:
    """How the node's code mixes tokens under conditions other than those it was watched in; empty if it does not.

    These are the other mode, a single sample, and any other number of tokens and samples.
    """
    callee = analysis.callee(node)
    if isinstance(callee, nn.Module) and _is_torchs_own(callee):
        return _in_other_mode(analysis, node, callee)
    with analysis.fake_mode:
        alone = pytree.tree_map(_of_one_sample, analysis.inputs(node))
    if reason := _otherwise(analysis, node, alone):
        return f"a module treats one sample differently from several: {reason}"
    if reason := _counting(analysis, node):
        return reason
    if not isinstance(callee, nn.Module):
        return ""
    if reason := _in_other_mode(analysis, node, callee):
        return reason
    with _other_mode(callee, analysis.inputs(node)):
        return _counting(analysis, node)


def _is_torchs_own(module: nn.Module) -> bool:
    """Whether all of its code is torch's, which does not ask for counts: its operators show what it does to tokens."""
    return all(type(part).__module__.startswith("torch.nn.") for part in module.modules())


def _in_other_mode(analysis: TokenAnalysis, node: fx.Node, module: nn.Module) -> str:
    with _other_mode(module, analysis.inputs(node)):
        reason = _otherwise(analysis, node, analysis.inputs(node))
    return f"a module behaves differently in train and eval mode: {reason}" if reason else ""


def _otherwise(analysis: TokenAnalysis, node: fx.Node, inputs: Any) -> str:
    """How the node treats the tokens of these inputs differently from its own; empty if it does not."""
    try:
        with analysis.fake_mode, torch.no_grad():
            other = analysis.execute(node, *inputs)
    except TraceError as error:
        return error.message
    if other.mixing:
        return other.mixing
    here, there = (
        [_unbatched(axes_of(tensor)) for tensor in tensors_in(value)]
        for value in (analysis[node].value, other.value)
    )
    if here != there or other.positions:
        return "the number or order of tokens changes"
    return ""


def _counting(analysis: TokenAnalysis, node: fx.Node) -> str:
    try:
        return computes_with_counts(
            analysis.fake_mode, analysis.callee(node), *analysis.inputs(node)
        )
    except AuthorError:
        return "a module works for one number of tokens only"


@contextlib.contextmanager
def _other_mode(module: nn.Module, inputs: Any) -> Iterator[None]:
    """Switch a module, and the modules among its inputs that tell it the mode, to the other mode."""
    owners = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, nn.Module)]
    modes = {part: part.training for whole in (module, *owners) for part in whole.modules()}
    for whole in (module, *owners):
        whole.train(not module.training)
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def _of_one_sample(leaf: Any) -> Any:
    """A tensor with tokens, reduced to one sample."""
    axes = axes_of(leaf) if isinstance(leaf, Tensor) else None
    if axes is None:
        return leaf
    its = tuple(tuple(Batch(1) if isinstance(f, Batch) else f for f in dim) for dim in axes)
    first = torch.empty(lengths(its), dtype=leaf.dtype, device=leaf.device)
    mark_data(first)
    set_axes(first, its)
    return first


def _unbatched(axes: Axes | None) -> Axes | None:
    """The axes without the number of samples."""
    return axes and tuple(
        tuple(Batch(0) if isinstance(f, Batch) else f for f in dim) for dim in axes
    )
