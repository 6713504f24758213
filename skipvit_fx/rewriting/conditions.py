"""What passes require and ensure, each checked on the current graph."""

from __future__ import annotations

from torch import fx

from skipvit_fx.analysis.axes import tokens_of
from skipvit_fx.graph.attention_ops import SDPA, AttentionArguments
from skipvit_fx.graph.editor import is_erasable
from skipvit_fx.graph.sizes import RESHAPES
from skipvit_fx.names import INSERTED_BY
from skipvit_fx.rewriting.context import Context
from skipvit_fx.rewriting.passes import Condition
from skipvit_fx.rewriting.sizes import sizes_argument


def _unfollowed_size(context: Context) -> str:
    for node in context.spans.nodes():
        axes = context.analysis.axes(node)
        if node.target not in RESHAPES or axes is None:
            continue
        _, sizes, _ = sizes_argument(context, node)
        if isinstance(sizes, fx.Node) or len(sizes) != len(axes):
            continue
        for size, dim in zip(sizes, axes, strict=True):
            if tokens_of(dim) and isinstance(size, int) and size != -1:
                return f"{node.name} has the number {size} for a length that a drop changes"
    return ""


def _unscored(context: Context) -> str:
    nodes = set(context.editor.graph.nodes)
    for stage in context.spans.stages:
        scores = context.scores.get(stage.index, {})
        if stage.returns.span.merged:
            continue
        if not scores or not nodes.issuperset(scores.values()):
            return f"{stage.name} has no score node"
    return ""


def _unskipped(context: Context) -> str:
    return _unshortened(context, merged=False)


def _unmerged(context: Context) -> str:
    return _unshortened(context, merged=True)


def _unshortened(context: Context, *, merged: bool) -> str:
    for stage in context.spans.stages:
        if stage.returns.span.merged is not merged:
            continue
        if stage.index not in context.skips:
            return f"{stage.name} takes no tokens out of the sequence"
        full = context.full_stream_readers(stage.cut)
        for reader in stage.cut.users:
            if INSERTED_BY not in reader.meta and reader in stage.nodes and reader not in full:
                return f"{reader.name} reads {stage.cut.name}, with all tokens, under the drop"
    return ""


def _unweighed(context: Context) -> str:
    for node in context.spans.nodes():
        if not context.spans.weighs(node):
            continue
        fused = node.target in SDPA
        given = AttentionArguments(*node.args, **node.kwargs).attn_mask if fused else None
        read = given if fused else node.all_input_nodes[0]
        if read is None or INSERTED_BY not in read.meta:
            return f"{node.name} does not know the sizes of its keys"
    return ""


def _ungathered(context: Context) -> str:
    for node in context.spans.nodes():
        operands = [p.operand for p in context.analysis[node].positions]
        for argument in node.all_input_nodes:
            if any(context.analysis.value(argument) is operand for operand in operands):
                return f"{node.name} reads {argument.name}, which has a row for every position"
    return ""


def _unreturned(context: Context) -> str:
    for stage in context.spans.stages:
        returns = stage.returns.node
        if returns is None:
            continue
        taken = context.skips[stage.index].kept_tokens if stage.cut is returns else returns
        for reader in taken.users:
            if INSERTED_BY not in reader.meta and not context.spans.active(reader):
                return f"{reader.name} reads {taken.name}, where tokens have not returned"
    return ""


def _unfilled(context: Context) -> str:
    for node, readers in context.spans.taps.items():
        for reader in readers:
            if context.spans.active(node) and node in reader.all_input_nodes:
                return f"{reader.name} reads {node.name}, where tokens are gone"
    return ""


def _unread(context: Context) -> str:
    for node in context.editor.graph.nodes:
        if not node.users and is_erasable(node):
            return f"nothing reads {node.name}"
    return ""


SIZES_FOLLOW = Condition("sizes-follow", _unfollowed_size)
"""No reshape under a drop has a literal for a length that the drop changes."""

SCORED = Condition("scored", _unscored)
"""Every stage has a score of its patches."""

SKIPPING = Condition("skipping", _unskipped)
"""At every cut, the author's nodes under the drop read the sequence without the dropped tokens."""

MERGING = Condition("merging", _unmerged)
"""The same where tokens are merged."""

KEYS_WEIGHED = Condition("keys-weighed", _unweighed)
"""Every attention over merged tokens adds something to its logits."""

TAPS_FILLED = Condition("taps-filled", _unfilled)
"""Nodes that read the stream off the path to the return read all tokens."""

POSITIONS_GATHERED = Condition("positions-gathered", _ungathered)
"""No node under a drop reads a value with one row per position."""

RETURNED = Condition("returned", _unreturned)
"""After the return every reader gets all tokens."""

NOTHING_DEAD = Condition("nothing-dead", _unread)
"""Every inserted node, and every pure one, is read."""
