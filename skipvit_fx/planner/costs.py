"""Multiply-adds of a plan, from the numbers of tokens that it leaves."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from skipvit_fx.analysis.axes import Batch, Tokens, axes_of, has_tokens, lengths
from skipvit_fx.analysis.leaves import described, structure
from skipvit_fx.author.code import AuthorError, author_code
from skipvit_fx.author.side_effects import contained
from skipvit_fx.errors import TraceError, UnsupportedModelError
from skipvit_fx.graph.attention_ops import SDPA, AttentionArguments
from skipvit_fx.graph.editor import is_erasable
from skipvit_fx.graph.module_paths import module_path
from skipvit_fx.graph.nodes import authors_node
from skipvit_fx.names import INSERTED_BY
from skipvit_fx.ops.merge import Match
from skipvit_fx.ops.score import AttentionScore, ScoreByFunction, ScoreByQuery
from skipvit_fx.planner.shared_graph import SharedGraph
from skipvit_fx.reports.macs import ATTENTION, attention_flops, count_macs
from skipvit_fx.rewriting.context import Context
from skipvit_fx.torch_internals import pytree, tensor_leaves


class Costs:
    """Multiply-adds of one image, for plan after plan; equal to ``inspect(rewrite(model, plan)).macs``.

    Every node of the model is counted once with all tokens. What it does on fewer tokens is a polynomial of their
    number, found by running it on fake tensors of a few lengths, once for all nodes that are alike: a model has only a
    few that differ.

    Attributes:
        baseline: multiply-adds of the unmodified model.
    """

    def __init__(self, shared: SharedGraph) -> None:
        """Count the unmodified model.

        Raises:
            TraceError: it does not run without data.
        """
        self.shared = shared
        self._analysis = shared.analysis
        capture = shared.capture
        count = count_macs(capture.module, capture.args, capture.kwargs)
        self.baseline = count.total
        self._whole = {n: count.nodes[n.name] for n in shared.graph.nodes if count.nodes[n.name]}
        self._on_tokens = {
            node
            for node in self._whole
            if any(has_tokens(axes_of(t)) for t in tensor_leaves(shared.inputs(node)))
        }
        self._erasable = {node for node in shared.graph.nodes if is_erasable(node)}
        self._keys: dict[fx.Node, int] = {}
        self._numbers: dict[Hashable, int] = {}  # of keys: these are long, and slow to look up by
        self._known: dict[Hashable, int] = {}
        self._polynomials: dict[Hashable, Polynomial | None] = {}

    def macs(self, context: Context) -> int:
        """Those of the plan that is on the graph now.

        Raises:
            UnsupportedModelError: they do not follow from the numbers of tokens.
        """
        read = self._read(context.editor.graph)
        nodes = sum(self._of_node(context, node) for node in self._whole if node in read)
        inserted = [n for n in read if INSERTED_BY in n.meta and n.op == "call_module"]
        return nodes + sum(self._of_inserted(context, node) for node in inserted)

    def _read(self, graph: fx.Graph) -> dict[fx.Node, None]:
        """The nodes that would be left if those that nothing reads were erased; in reverse order."""
        read: dict[fx.Node, None] = {}
        for node in reversed(graph.nodes):
            erasable = node in self._erasable or INSERTED_BY in node.meta
            if not erasable or any(user in read for user in node.users):
                read[node] = None
        return read

    def _of_node(self, context: Context, node: fx.Node) -> int:
        patches, rows = self._patches(context, node), context.narrow.get(node)
        every = context.stream.tokens.patches
        if node not in self._on_tokens or (rows is None and patches == every):
            return self._whole[node]
        if (
            node.target in SDPA
        ):  # in proportion, as the samples of a query without tokens have no known axis
            ours, theirs = (
                self._of_attention(node, *at) for at in ((patches, rows), (every, None))
            )
            return self._whole[node] * ours // theirs
        key = self._checked(node)
        if rows is None:
            return self._by_count(key, patches, lambda n: self._count(node, n, None))
        if (key, "rows", rows) not in self._known:
            self._known[key, "rows", rows] = self._count(node, patches, rows)
        return self._known[key, "rows", rows]

    def _checked(self, node: fx.Node) -> int:
        """The number of the key of a node, for which the count with all tokens was found to be the right one."""
        if node not in self._keys:
            key = self._numbers.setdefault(self._key(node), len(self._numbers))
            whole = self.shared.stream.tokens.patches
            if (
                self._by_count(key, whole, lambda n: self._count(node, n, None))
                != self._whole[node]
            ):
                raise UnsupportedModelError(
                    "what it multiplies does not follow from the number of tokens",
                    node=node.name,
                    module_path=module_path(node),
                    hint="choose a plan for this model by hand: rewrite and inspect count it",
                )
            self._keys[node] = key
        return self._keys[node]

    def _by_count(self, key: Hashable, patches: int, count: Callable[[int], int]) -> int:
        """What ``count`` says for so many patches: by a polynomial if it is one, else by counting."""
        if key not in self._polynomials:
            with contained(self.shared.model):  # once for all points: it takes longer than they do
                self._polynomials[key] = fitted(count, self.shared.stream.tokens.patches)
        if (key, patches) not in self._known:
            self._known[key, patches] = (self._polynomials[key] or count)(patches)
        return self._known[key, patches]

    def _patches(self, context: Context, node: fx.Node) -> int:
        return context.patches_at(node, context.stream.tokens.patches)

    def _key(self, node: fx.Node) -> Hashable:
        """Equal for nodes that do the same to inputs of the same kind."""
        called = self._analysis.callee(node)
        own = structure(called) if isinstance(called, nn.Module) else node.target
        return own, tuple(map(described, pytree.tree_leaves(self.shared.inputs(node))))

    def _of_attention(self, node: fx.Node, patches: int, rows: int | None) -> int:
        """Those of a fused attention, from the shapes of what it reads."""
        args, kwargs = self.shared.inputs(node)
        given = AttentionArguments(*args, **kwargs)
        key, value = (torch.Size(_shape(t, patches)) for t in (given.key, given.value))
        query = torch.Size(_shape(given.query, patches, rows))
        return attention_flops(query, key, value) // 2

    def _count(self, node: fx.Node, patches: int, rows: int | None) -> int:
        """Those of any other node for this many patches, or for this many rows if it works on each row by itself."""
        inputs = self.shared.inputs(node)
        return self._run(self._analysis.callee(node), inputs, patches, rows)

    def _run(
        self, called: Callable[..., Any], inputs: Any, patches: int, rows: int | None = None
    ) -> int:
        flops = FlopCounterMode(display=False, custom_mapping=ATTENTION)
        try:
            with contained(self.shared.model), self._analysis.fake_mode, torch.no_grad():
                args, kwargs = pytree.tree_map(lambda leaf: _resized(leaf, patches, rows), inputs)
                with flops, author_code():
                    called(*args, **kwargs)
        except AuthorError as error:
            raise TraceError(
                f"{type(called).__name__} cannot be counted without computing: {error.message}",
                hint="a score function must not read the contents of tensors",
            ) from error
        total: int = flops.get_total_flops() // 2
        return total

    # -- what the passes inserted ---------------------------------------------------------------------------------

    def _of_inserted(self, context: Context, node: fx.Node) -> int:
        op = context.editor.module.get_submodule(str(node.target))
        if isinstance(op, Match):
            return self._of_merge(context, node, op)
        if not isinstance(op, ScoreByQuery | ScoreByFunction):
            return 0
        patches = self._patches(context, authors_node(node.all_input_nodes[0]))
        key = (str(op), self._key_of_inputs(node))

        def count(n: int) -> int:
            return self._run(op, (self._inputs(context, node, n), {}), n)

        return self._by_count(key, patches, count)

    def _of_merge(self, context: Context, node: fx.Node, op: Match) -> int:
        """The similarities of all pairs, and the shares of those that are merged in those that they merge into."""
        keys = self._analysis[authors_node(node.all_input_nodes[0])].value
        stream = self._analysis[context.stream.layers[0].input].value
        patches = self._patches(context, authors_node(node.all_input_nodes[0]))
        merged, into = op.dropped(patches), patches - patches // 2
        if not merged:
            return 0
        channels = keys.shape[op.layouts[0].channels]
        total: int = into * (patches // 2 * channels + merged * stream.shape[-1])
        return total

    def _key_of_inputs(self, node: fx.Node) -> Hashable:
        values = [self._analysis.value(authors_node(argument)) for argument in node.all_input_nodes]
        return tuple(map(described, values))

    def _inputs(self, context: Context, node: fx.Node, patches: int) -> tuple[Any, ...]:
        """What an inserted score reads, for so many patches."""
        read = [argument for argument in node.args if isinstance(argument, fx.Node)]
        values = [self._input(context, argument, patches) for argument in read]
        op = context.editor.module.get_submodule(str(node.target))
        if isinstance(op, ScoreByQuery) and len(values) == 3:
            query, key, mask = values
            values[2] = self._mask_like(mask, query, key, patches)
        return tuple(values)

    def _mask_like(self, mask: Tensor, query: Tensor, key: Tensor, patches: int) -> Tensor:
        """A mask for so many patches; its rows are gathered by position, so its axes do not say which these are."""
        lengths = [
            1 if own == 1 else _shape(of, patches)[-2]
            for own, of in zip(mask.shape[-2:], (query, key), strict=True)
        ]
        with self._analysis.fake_mode:
            shape = [1] * (mask.ndim - 2) + lengths
            return torch.empty(shape, dtype=mask.dtype, device=mask.device)

    def _input(self, context: Context, node: fx.Node, patches: int) -> Any:
        if node.op == "call_module" and INSERTED_BY in node.meta:
            op = context.editor.module.get_submodule(str(node.target))
            if isinstance(op, AttentionScore):  # read by a score that is a function
                inputs = self._inputs(context, node, patches)
                with self._analysis.fake_mode, torch.no_grad():
                    return op(*(_resized(tensor, patches) for tensor in inputs))
        return self._analysis.value(authors_node(node))


def _shape(tensor: Tensor, patches: int, rows: int | None = None) -> tuple[int, ...]:
    """The shape for one sample, with this many patches along its token axes, or this many rows in all."""

    def length(factor: Any) -> Any:
        if isinstance(factor, Batch):
            return Batch(1)
        if isinstance(factor, Tokens):
            return factor._replace(patches=patches) if rows is None else rows
        return factor

    axes = axes_of(tensor)
    if axes is None:
        return tuple(tensor.shape)
    return lengths(tuple(tuple(length(factor) for factor in dim) for dim in axes))


def _resized(leaf: Any, patches: int, rows: int | None = None) -> Any:
    """A fake tensor of that shape; other values as they are."""
    if not isinstance(leaf, Tensor) or axes_of(leaf) is None:
        return leaf
    return torch.empty(_shape(leaf, patches, rows), dtype=leaf.dtype, device=leaf.device)


@dataclass(frozen=True)
class Polynomial:
    """Of degree two at most, through three points."""

    points: tuple[tuple[int, int], ...]

    def __call__(self, x: int) -> int:
        total = Fraction(0)
        for i, (xi, yi) in enumerate(self.points):
            others = [xj for j, (xj, _) in enumerate(self.points) if j != i]
            total += yi * Fraction(
                math.prod(x - xj for xj in others), math.prod(xi - xj for xj in others)
            )
        return int(total)


def fitted(count: Callable[[int], int], most: int) -> Polynomial | None:
    """The polynomial that says what ``count`` does; ``None`` if it is none, or ``most`` is too small to tell."""
    places = sorted({most, most * 3 // 4, most // 2, most // 4} - {0})
    if len(places) < 4:
        return None
    values = [count(place) for place in places]
    *points, (last, value) = zip(places, values, strict=True)
    found = Polynomial(tuple(points))
    return found if found(last) == value else None
