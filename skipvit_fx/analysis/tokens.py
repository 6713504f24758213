"""Follow the token axis through a graph: one interpretation on fake tensors, operator by operator."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
import torch
from torch import Tensor, fx, nn

from skipvit_fx.analysis import rules
from skipvit_fx.analysis.axes import (
    Axes,
    Batch,
    MixesTokens,
    PoolsTokens,
    Tokens,
    axes_of,
    batch_of,
    has_tokens,
    is_data,
    is_lost,
    lengths,
    mark_data,
    mark_lost,
    merge_ints,
    set_axes,
    tensors_in,
)
from skipvit_fx.author.code import AuthorError, author_code
from skipvit_fx.capture.capture import Capture
from skipvit_fx.capture.cloning import fake_structure
from skipvit_fx.capture.fakes import fake_inputs
from skipvit_fx.errors import TraceError, UnsupportedModelError
from skipvit_fx.graph.attention_ops import SDPA, AttentionArguments
from skipvit_fx.graph.module import SkipViTModule
from skipvit_fx.graph.module_paths import module_path
from skipvit_fx.graph.nodes import attribute, callee, leading_to
from skipvit_fx.names import OWN_CHILD
from skipvit_fx.torch_internals import TorchDispatchMode, aten, is_writing, pytree


@dataclass
class NodeFacts:
    """What the interpretation found at one node.

    Attributes:
        value: the node's value on fake tensors; its tensors carry their axes.
        mixing: why the node does not keep tokens apart; empty if it does.
        positions: operands of fixed token length that meet the token axis here.
        softmax_over: the key axis, if a softmax over tokens runs here (or inside a fused attention).
        sums_weights: whether attention weights are summed with their values here.
        pools: whether ``mixing`` is merely a reduction over all tokens.
        reads: if prefix rows are taken out, the end of these rows, counted from the first patch.
    """

    value: Any = None
    mixing: str = ""
    positions: list[rules.Position] = field(default_factory=list)
    softmax_over: Tokens | None = None
    sums_weights: bool = False
    pools: bool = False
    reads: int | None = None

    @property
    def axes(self) -> Axes | None:
        return axes_of(self.value) if isinstance(self.value, Tensor) else None


class AxisMode(TorchDispatchMode):
    """Labels the outputs of every operator with their axes, and notes what the rules say in ``facts``."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.facts = NodeFacts()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        outputs = tensors_in(out)
        inputs = tensors_in((args, kwargs)) if outputs else []
        if not any(is_data(t) for t in inputs):
            return out
        for tensor in outputs:
            mark_data(tensor)
        if any(axes_of(t) is not None for t in inputs):
            self._apply(rules.Call(func, args, kwargs, out), outputs)
        elif any(is_lost(t) for t in inputs):
            for tensor in outputs:
                mark_lost(tensor)
        elif func.overloadpacket is aten.cat:
            _see_prefix(args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0), out)
        return out

    def _apply(self, call: rules.Call, outputs: list[Tensor]) -> None:
        rule = rules.find_rule(call.func)
        try:
            if rule is None:
                raise MixesTokens(f"{call.func} is not known to keep tokens apart")
            if is_writing(call.func) and any(axes_of(t) is None for t in outputs):
                raise MixesTokens(f"{call.func} writes tokens into a tensor of fixed shape")
            results = rule(call)
            check_results(call, results)
        except MixesTokens as reason:
            if not self.facts.mixing:
                self.facts.mixing = str(reason)
                self.facts.pools = isinstance(reason, PoolsTokens)
            for tensor in outputs:
                set_axes(tensor, None)
                mark_lost(tensor)
            return
        self.note(call)
        for tensor, axes in zip(outputs, results, strict=True):
            set_axes(tensor, axes)

    def note(self, call: rules.Call) -> None:
        self.facts.positions += call.positions
        self.facts.softmax_over = self.facts.softmax_over or call.softmax_over
        self.facts.sums_weights |= call.sums_weights
        if call.reads is not None:
            self.facts.reads = max(call.reads, self.facts.reads or call.reads)


def check_results(call: rules.Call, results: list[Axes | None]) -> None:
    """Check that the axes from a rule fit the operator's results, and keep the samples apart.

    Raises:
        MixesTokens: a result has tokens, but not their batch axis.
        RuntimeError: the rule is wrong.
    """
    shapes = [tuple(out.shape) for out in call.outs]
    claimed = [None if axes is None else lengths(axes) for axes in results]
    fits = len(shapes) == len(claimed) and all(
        ours is None or ours == theirs for ours, theirs in zip(claimed, shapes, strict=True)
    )
    if not fits:
        raise RuntimeError(f"the rule of {call.func} says {claimed} of results {shapes}")
    for axes in results:
        if has_tokens(axes) and sum(isinstance(f, Batch) for dim in axes or () for f in dim) != 1:
            raise MixesTokens(
                f"{call.name} mixes the samples of a batch: they have no axis any more"
            )


def _see_prefix(tensors: Any, dim: int, out: Tensor) -> None:
    """Note constant rows joined to rows that depend on the image: this is how prefix tokens enter."""
    dim %= out.ndim
    data = [i for i, tensor in enumerate(tensors) if is_data(tensor)]
    if len(data) != 1 or len(tensors) == 1 or out.ndim != 3:
        return
    (at,) = data
    lengths = [t.shape[dim] for t in tensors]
    tokens = Tokens(sum(lengths[:at]), lengths[at], sum(lengths[at + 1 :]))
    set_axes(out, stream_axes(out, dim, tokens))


def stream_axes(stream: Tensor, dim: int, tokens: Tokens) -> Axes:
    """Axes of a residual stream: tokens at ``dim``, the batch at the first other axis, channels elsewhere."""
    batch = 1 if dim == 0 else 0
    return tuple(
        (tokens,) if d == dim else (Batch(s),) if d == batch else merge_ints((s,))
        for d, s in enumerate(stream.shape)
    )


class TokenAnalysis:
    """The facts of every node of a graph.

    A token axis is known from the point where a constant prefix is joined to it, or from :meth:`seed`.

    Attributes:
        judged: how code mixes tokens, by what it is and what it is called with.
        mixes: the same by node, in the graph as it was captured: kept for the next plan.
    """

    def __init__(self, capture: Capture) -> None:
        self.module: SkipViTModule = capture.module
        self.facts: dict[fx.Node, NodeFacts] = {}
        self.fake_mode = capture.fake_mode
        self.judged: dict[Hashable, str] = {}
        self.mixes: dict[fx.Node, str] = {}
        self._below: dict[fx.Node, frozenset[fx.Node]] = {}
        self._above: dict[fx.Node, frozenset[fx.Node]] = {}
        self._fake = fake_structure(self.module, self.fake_mode)
        self._more_samples = _placeholders(capture, 1)
        given = _placeholders(capture, 0)
        with self.fake_mode, torch.no_grad():
            for node in self.module.graph.nodes:
                if node in given:
                    self.facts[node] = NodeFacts(given[node])
                else:
                    self.facts[node] = self.execute(node, *self.inputs(node))

    def seed(self, node: fx.Node, axes: Axes) -> None:
        """Give ``node`` these axes and follow them to the output.

        Raises:
            UnsupportedModelError: the samples do not lie where these axes say.
        """
        batch = self.batch_dim(node)
        if batch is None or not batch_of(axes[batch]):
            raise UnsupportedModelError(
                "the samples of a batch do not lie along an axis of their own in the residual stream",
                node=node.name,
                module_path=module_path(node),
                hint="rewrite a model that takes [batch, ...] and keeps the batch as one axis",
            )
        self.mixes.clear()
        facts = self.facts[node]
        changed = {node}
        with self.fake_mode, torch.no_grad():
            facts.value = facts.value.detach()
            mark_data(facts.value)
            set_axes(facts.value, axes)
            later = node.next
            while later.op != "root":
                if changed & set(later.all_input_nodes):
                    changed.add(later)
                    self.facts[later] = self.execute(later, *self.inputs(later))
                later = later.next

    @functools.cached_property
    def _readers(self) -> nx.DiGraph[fx.Node]:
        """An edge from every node to each of its readers, in the graph as it was captured."""
        nodes = self.module.graph.nodes
        readers: nx.DiGraph[fx.Node] = nx.DiGraph()
        readers.add_nodes_from(nodes)
        readers.add_edges_from((node, user) for node in nodes for user in node.users)
        return readers

    def below(self, node: fx.Node) -> frozenset[fx.Node]:
        """All nodes that are computed from ``node`` in the graph as it was captured."""
        if node not in self._below:
            self._below[node] = frozenset(nx.descendants(self._readers, node))
        return self._below[node]

    def above(self, node: fx.Node) -> frozenset[fx.Node]:
        """All nodes that ``node`` is computed from in the graph as it was captured."""
        if node not in self._above:
            self._above[node] = frozenset(nx.ancestors(self._readers, node))
        return self._above[node]

    def __getitem__(self, node: fx.Node) -> NodeFacts:
        return self.facts[node]

    def fake_module(self, path: str) -> nn.Module:
        """The submodule at ``path``, with fake tensors; an inserted one, which has no tensors, as it is."""
        inserted = path.split(".")[0] == OWN_CHILD
        return (self.module if inserted else self._fake).get_submodule(path)

    def fake_attribute(self, path: str) -> Any:
        """What a ``get_attr`` node reads; a fake tensor for a tensor."""
        return attribute(self._fake, path)

    def value(self, node: fx.Node) -> Any:
        """The value of an author's node; ``None`` for an inserted one."""
        facts = self.facts.get(node)
        return None if facts is None else facts.value

    def axes(self, node: fx.Node) -> Axes | None:
        return self.facts[node].axes

    def rank(self, node: fx.Node) -> int:
        """Number of dimensions of a tensor node."""
        value = self.facts[node].value
        assert isinstance(value, Tensor)
        return value.ndim

    def inputs(self, node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The fake arguments of a node."""
        given: Any = fx.node.map_arg(
            (node.args, node.kwargs), lambda argument: self.facts[argument].value
        )
        args, kwargs = given
        return args, kwargs

    def callee(self, node: fx.Node) -> Callable[..., Any]:
        """What a node calls."""
        return callee(node, self.fake_module)

    def execute(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NodeFacts:
        """The facts of a node for these fake arguments; call it under the fake mode.

        Raises:
            TraceError: its code does not run on them.
        """
        if node.op == "get_attr":
            return NodeFacts(self.fake_attribute(str(node.target)))
        if node.op == "output":
            return NodeFacts(args[0])
        if node.target in SDPA:
            return _attention(AttentionArguments(*args, **kwargs))
        mode = AxisMode()
        try:
            called = self.callee(node)
            with mode, author_code():
                mode.facts.value = called(*args, **kwargs)
        except AuthorError as error:
            raise TraceError(
                f"node {node.name!r} in module {module_path(node) or '<root>'!r} does not run on fake "
                f"tensors: {error.message}",
                hint="check that the example inputs fit the model",
            ) from error
        return mode.facts

    def batch_dim(self, node: fx.Node) -> int | None:
        """The dimension of a tensor node whose length changes with the number of samples; ``None`` unless just one."""
        here, there = self.facts[node].value.shape, self._with_more_samples(node).shape
        if len(here) != len(there):
            return None
        changed = [d for d, (a, b) in enumerate(zip(here, there, strict=True)) if a != b]
        return changed[0] if len(changed) == 1 else None

    def _with_more_samples(self, node: fx.Node) -> Any:
        values = self._more_samples
        needed = leading_to([node], lambda argument: argument not in values)
        with self.fake_mode, torch.no_grad():
            for pending in self.module.graph.nodes:
                if pending in needed and pending not in values:
                    inputs: Any = fx.node.map_arg(
                        (pending.args, pending.kwargs), values.__getitem__
                    )
                    values[pending] = self.execute(pending, *inputs).value
        return values[node]


def _placeholders(capture: Capture, more_samples: int) -> dict[fx.Node, Any]:
    """The example inputs as fake tensors, of at least two samples, marked as data."""
    examples = capture.inputs.taken()
    alone = any(
        leaf.ndim and leaf.shape[0] == 1
        for leaf in pytree.tree_leaves(list(examples.values()))
        if isinstance(leaf, Tensor)
    )
    found = {}
    for node in capture.module.graph.find_nodes(op="placeholder"):
        value = fake_inputs(
            capture.fake_mode, examples[str(node.target)], more_batch=alone + more_samples
        )
        for tensor in tensors_in(value):
            mark_data(tensor)
        found[node] = value
    return found


def _attention(given: AttentionArguments) -> NodeFacts:
    """The facts of a fused attention, which is not decomposed."""
    query, key, value, mask = given[:4]
    out = query.new_empty((*query.shape[:-1], value.shape[-1]))
    facts = NodeFacts(out)
    operands = [t for t in (query, key, value, mask) if t is not None]
    if any(is_data(t) for t in operands):
        mark_data(out)
    if any(is_lost(t) for t in operands):
        mark_lost(out)
    if any(axes_of(t) is not None for t in operands):
        call = rules.Call(aten.scaled_dot_product_attention.default, (), {}, out)
        try:
            set_axes(out, rules.attend(call, query, key, value, mask, causal=given.is_causal))
            facts.positions = call.positions
            facts.softmax_over, facts.sums_weights = call.softmax_over, call.sums_weights
        except MixesTokens as reason:
            facts.mixing = str(reason)
            mark_lost(out)
    return facts


def carries_tokens(facts: NodeFacts) -> bool:
    """Whether any tensor of the node's value has a token axis."""
    return any(axes_of(t) is not None for t in tensors_in(facts.value))
