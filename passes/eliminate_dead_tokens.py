"""Compute only the rows that are read: after the last attention, often only the class token."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor, fx, nn

from skipvit_fx.analysis.apart import why_not_apart
from skipvit_fx.analysis.axes import Axes, Tokens, axes_of, plain_token_dim, tensors_in, tokens_of
from skipvit_fx.analysis.tokens import NodeFacts, TokenAnalysis, carries_tokens
from skipvit_fx.graph.attention_ops import SDPA, AttentionArguments
from skipvit_fx.graph.sizes import SIZE_FREE, dimension_of, sizes_of
from skipvit_fx.names import INSERTED_BY
from skipvit_fx.ops.dead_tokens import Narrow
from skipvit_fx.ops.score import ScoreByQuery
from skipvit_fx.ops.skip import PutBack
from skipvit_fx.rewriting.conditions import MERGING, RETURNED, SKIPPING
from skipvit_fx.rewriting.context import Context
from skipvit_fx.rewriting.passes import Condition
from skipvit_fx.rewriting.sizes import follow_input

ALL = math.inf
NONE = -math.inf
"""How far the rows of a token axis are read is counted from the first patch: 0 means the prefix rows only."""


@dataclass(frozen=True)
class EliminateDeadTokens:
    """Leave out rows that are never read, which is exact. Nothing changes where all tokens are read.

    Before::

        blocks_2_norm1 = blocks.2.norm1(stage_1_returned)
        blocks_2_q = blocks.2.q(blocks_2_norm1)
        blocks_2_k = blocks.2.k(blocks_2_norm1)
        add_4 = stage_1_returned + squeeze_2
        getitem_10 = norm[:, 0]                                 # the class token alone

    After::

        stage_1_returned_read = skipvit.dead_tokens.narrow_1(stage_1_returned)
        blocks_2_norm1 = blocks.2.norm1(stage_1_returned)
        blocks_2_norm1_read = skipvit.dead_tokens.narrow_2(blocks_2_norm1)
        blocks_2_q = blocks.2.q(blocks_2_norm1_read)
        blocks_2_k = blocks.2.k(blocks_2_norm1)
        add_4 = stage_1_returned_read + squeeze_2
        getitem_10 = norm[:, 0]
    """

    name: ClassVar[str] = "eliminate-dead-tokens"
    requires: ClassVar[tuple[Condition, ...]] = (MERGING, SKIPPING, RETURNED)
    ensures: ClassVar[tuple[Condition, ...]] = ()

    def run(self, context: Context) -> None:
        """Narrow every edge from a node that is computed in full to one that is read in part."""
        context = context.knowing(_facts_of_inserted(context))
        liveness = _Liveness(context)
        editor = context.editor
        nodes = list(editor.graph.nodes)
        context.narrow |= {node: liveness.rows(node) for node in nodes if node in liveness.narrow}
        for node in nodes:
            if liveness.passes_through(node):
                editor.rewire_all(node.users, node, node.all_input_nodes[0])
        edges = {node: liveness.edges_to_narrow(node) for node in nodes}
        narrowed = _insert_narrow(context, [edge for of_node in edges.values() for edge in of_node])
        for node in nodes:
            for edge in edges[node]:
                editor.rewire(node, edge.argument, narrowed[edge])
            if node in liveness.narrow:
                follow_input(context, node, always=True)


class _Edge(NamedTuple):
    """What a node reads of an argument that is computed in full: the first ``rows`` along ``dim``."""

    argument: fx.Node
    dim: int
    rows: int


def _insert_narrow(context: Context, edges: Iterable[_Edge]) -> dict[_Edge, fx.Node]:
    """The rows that are read, one node for all edges that are alike; numbered in graph order."""
    facts = context.analysis.facts
    narrowed: dict[_Edge, fx.Node] = {}
    last: dict[fx.Node, fx.Node] = {}
    for edge in sorted(dict.fromkeys(edges)):
        argument, dim, rows = edge
        path = f"dead_tokens.narrow_{len(narrowed) + 1}"
        node = context.editor.insert_module(
            path,
            Narrow(dim, rows),
            (argument,),
            after=last.get(argument, argument),
            name=f"{argument.name}_read",
        )
        narrowed[edge] = last[argument] = node
        if argument in facts:
            facts[node] = facts[argument]
    return narrowed


class _Liveness:
    """Which rows of every node are read (``need``), and which nodes can compute only these."""

    def __init__(self, context: Context) -> None:
        self.analysis = context.analysis
        facts = self.analysis.facts.items()
        self.with_tokens = {node for node, known in facts if carries_tokens(known)}
        self.shortened = {skip.kept_tokens for skip in context.skips.values()}
        self.need: dict[fx.Node, float] = {}
        for node in reversed(context.editor.graph.nodes):
            for argument, need in self._reads(node):
                self.need[argument] = max(self.need.get(argument, NONE), need)
        self.narrow: set[fx.Node] = set()
        for node in context.editor.graph.nodes:
            if self._can_be_narrow(node):
                self.narrow.add(node)

    def passes_through(self, node: fx.Node) -> bool:
        """Whether a node puts tokens back of which only prefix rows are read: these never left."""
        return (
            isinstance(_inserted(self.analysis, node), PutBack) and self.need.get(node, NONE) <= 0
        )

    def rows(self, node: fx.Node) -> int:
        """How many rows a narrow node computes."""
        axes = axes_of(tensors_in(self.analysis.value(node))[0])
        dim = len(axes or ()) - 2 if node.target in SDPA else plain_token_dim(axes)
        assert axes is not None
        assert dim is not None
        return _rows(axes, dim, self.need[node])

    def edges_to_narrow(self, node: fx.Node) -> list[_Edge]:
        """The arguments of a node that are computed in full and read in part."""
        if node not in self.narrow:
            return []
        need = self.need[node]
        edges = []
        arguments = node.all_input_nodes
        if node.target in SDPA:
            given = AttentionArguments.of(node)
            arguments, mask = [given.query], given.attn_mask
            if mask is not None and any(
                p.dim - p.operand.ndim == -2 for p in self.analysis[node].positions
            ):
                axes = self.analysis.axes(node)
                assert axes is not None
                edges.append(_Edge(mask, -2, _rows(axes, len(axes) - 2, need)))
        for argument in arguments:
            if argument in self.narrow or argument not in self.with_tokens:
                continue
            axes = self.analysis.axes(argument)
            dim = plain_token_dim(axes)
            if dim is not None and axes is not None:
                edges.append(_Edge(argument, dim, _rows(axes, dim, need)))
        return edges

    def _reads(self, node: fx.Node) -> list[tuple[fx.Node, float]]:
        """The rows that a node reads of its arguments, given the rows that are read of it."""
        arguments = [a for a in node.all_input_nodes if a in self.with_tokens]
        need = self.need.get(node, NONE)
        op = _inserted(self.analysis, node)
        if isinstance(op, PutBack) and need <= 0:
            return [(node.all_input_nodes[0], need)]
        if isinstance(op, ScoreByQuery) and isinstance(op.asking, int):
            query = node.all_input_nodes[0]
            row = op.asking + 1 - _tokens(self.analysis.axes(query)).prefix
            return [(a, row if a is query else ALL) for a in arguments]
        facts = self.analysis.facts.get(node)
        if facts is None:
            is_size = node.op == "call_method" and node.target == "size"
            return [] if is_size else [(a, ALL) for a in arguments]
        if facts.reads is not None and node not in self.with_tokens:
            return [
                (a, self._up_to(a, facts.reads) if self._apart(node) else ALL) for a in arguments
            ]
        if not tensors_in(facts.value):
            return [(a, ALL) for a in arguments if self._reads_token_size(node)]
        unread = need == NONE and node in self.with_tokens
        if node.op != "output" and (unread or (need < ALL and self._row_by_row(node, need))):
            if node.target in SDPA:
                query = AttentionArguments.of(node).query
                return [(a, need if a is query else ALL) for a in arguments]
            return [(a, need) for a in arguments]
        return [(a, ALL) for a in arguments]

    def _up_to(self, argument: fx.Node, reads: float) -> float:
        """This many rows of an argument, or all of them if they end after the patches, of which there may be fewer."""
        tokens = _single_tokens(self.analysis.axes(argument))
        if tokens is None or reads > tokens.patches:
            return ALL
        return max(reads, 1 - tokens.prefix)  # one row is kept where none is read

    def _reads_token_size(self, node: fx.Node) -> bool:
        """Whether the size of a token axis is read, and not just passed on as part of ``x.shape``."""
        found = dimension_of(node, self.analysis.rank)
        if found is not None:
            axes = self.analysis.axes(found[0])
            return axes is not None and tokens_of(axes[found[1]]) is not None
        if sizes_of(node) is None:
            attribute = node.args[1] if node.target is getattr else node.target
            return attribute not in SIZE_FREE
        return not all(
            user.target is operator.getitem and not self._reads_token_size(user)
            for user in node.users
        )

    def _row_by_row(self, node: fx.Node, need: float) -> bool:
        """Whether row i of the value needs only row i of every argument (of the query, for an attention).

        In a module, it may also need prefix rows that are needed anyway.
        """
        facts = self.analysis[node]
        if facts.mixing or node.op in ("placeholder", "output"):
            return False
        if facts.reads is not None and facts.reads > need:
            return False
        own = {_single_tokens(axes_of(t)) for t in tensors_in(facts.value)}
        if len(own) != 1 or None in own:
            return False
        if node.target in SDPA:
            return facts.axes is not None and tokens_of(facts.axes[-2]) is not None
        if facts.positions or facts.softmax_over or facts.sums_weights:
            return False
        for argument in node.all_input_nodes:
            for tensor in tensors_in(self.analysis.value(argument)):
                if axes_of(tensor) is not None and _single_tokens(axes_of(tensor)) not in own:
                    return False
        return self._apart(node)

    def _apart(self, node: fx.Node) -> bool:
        """Whether the node may see fewer rows; this cannot be tried with an inserted argument, which has no value."""
        known = all(argument in self.analysis.facts for argument in node.all_input_nodes)
        return known and not why_not_apart(self.analysis, node)

    def _can_be_narrow(self, node: fx.Node) -> bool:
        need = self.need.get(node, NONE)
        if (
            node not in self.analysis.facts
            or need in (ALL, NONE)
            or isinstance(_inserted(self.analysis, node), PutBack)
        ):
            return False
        if node in self.shortened:
            return False
        if not self._row_by_row(node, need):
            return False
        tokens = {_single_tokens(axes_of(t)) for t in tensors_in(self.analysis.value(node))}
        if any(t is None or t.prefix + need < 1 for t in tokens):
            return False
        if node.target in SDPA:
            return True
        return all(
            argument in self.narrow or isinstance(self.analysis.value(argument), Tensor)
            for argument in node.all_input_nodes
            if argument in self.with_tokens
        )


def _facts_of_inserted(context: Context) -> dict[fx.Node, NodeFacts]:
    """Facts of the inserted nodes that hold the residual stream: its axes are those of the author's nodes."""
    facts = {skip.kept_tokens: context.analysis[stage.cut] for stage, skip in context.stages()}
    stream = context.analysis[context.stream.layers[0].input]
    for node in context.editor.graph.find_nodes(op="call_module"):
        if isinstance(_inserted(context.analysis, node), PutBack):
            facts[node] = stream
    return facts


def _inserted(analysis: TokenAnalysis, node: fx.Node) -> nn.Module | None:
    """The inserted module that a node calls; ``None`` for other nodes."""
    if node.op != "call_module" or INSERTED_BY not in node.meta:
        return None
    return analysis.module.get_submodule(str(node.target))


def _single_tokens(axes: Axes | None) -> Tokens | None:
    dim = plain_token_dim(axes)
    return None if dim is None or axes is None else tokens_of(axes[dim])


def _tokens(axes: Axes | None) -> Tokens:
    tokens = _single_tokens(axes)
    assert tokens is not None
    return tokens


def _rows(axes: Axes, dim: int, need: float) -> int:
    tokens = tokens_of(axes[dim])
    assert tokens is not None
    return int(tokens.prefix + need)
