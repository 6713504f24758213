"""Follow the token axis through a graph: one interpretation on fake tensors, operator by operator."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from skipvit_fx.analysis import rules
from skipvit_fx.analysis.axes import (
    Axes,
    Batch,
    MixesTokens,
    PoolsTokens,
    Tokens,
    axes_of,
    is_data,
    is_lost,
    mark_data,
    mark_lost,
    merge_ints,
    set_axes,
    tensors_in,
    tokens_of,
)
from skipvit_fx.errors import TraceError
from skipvit_fx.ir.author_code import AuthorError, author_code
from skipvit_fx.ir.capture import Capture
from skipvit_fx.ir.cloning import fake_structure
from skipvit_fx.ir.fakes import fake_inputs
from skipvit_fx.ir.module import OWN_CHILD, SkipViTModule
from skipvit_fx.ir.places import module_path
from skipvit_fx.ir.sdpa import AttentionArguments
from skipvit_fx.ir.symbolic import attribute

SDPA = (scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default)


@dataclass
class NodeFacts:
    """What the interpretation found at one node.

    Attributes:
        value: the node's value on fake tensors; its tensors carry their axes.
        mixing: why the node does not keep tokens apart; empty if it does.
        positions: operands of fixed token length that meet the token axis here.
        softmax_over: the key axis, if a softmax over tokens runs here (also inside a fused attention).
        sums_weights: attention weights are summed with their values here.
        pools: whether ``mixing`` is no more than a reduction over all tokens.
        reads: where prefix rows are taken out, the end of these rows, counted from the first patch.
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
            self._apply(rules.Call(func, args, kwargs, out), inputs, outputs)
        elif any(is_lost(t) for t in inputs):
            for tensor in outputs:
                mark_lost(tensor)
        elif func.overloadpacket is torch.ops.aten.cat:
            _see_prefix(args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0), out)
        return out

    def _apply(self, call: rules.Call, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        rule = rules.find_rule(call.func)
        try:
            if rule is None:
                raise MixesTokens(f"{call.func} is not known to keep tokens apart")
            if call.func._schema.is_mutable and any(axes_of(t) is None for t in outputs):
                raise MixesTokens(f"{call.func} writes tokens into a tensor of fixed shape")
            axes = rule(call)
        except MixesTokens as reason:
            if not self.facts.mixing:
                self.facts.mixing = str(reason)
                self.facts.pools = isinstance(reason, PoolsTokens)
            for tensor in outputs:
                set_axes(tensor, None)
                mark_lost(tensor)
            return
        self.note(call)
        if axes is None:
            return
        if isinstance(axes, list):
            for tensor, own in zip(call.out, axes, strict=True):
                if isinstance(tensor, Tensor):
                    set_axes(tensor, own)
        else:
            set_axes(call.out, axes)

    def note(self, call: rules.Call) -> None:
        self.facts.positions += call.positions
        self.facts.softmax_over = self.facts.softmax_over or call.softmax_over
        self.facts.sums_weights |= call.sums_weights
        if call.reads is not None:
            self.facts.reads = max(call.reads, self.facts.reads or call.reads)


_RESHAPES = ("view", "_unsafe_view", "reshape", "expand", "slice", "split", "split_with_sizes")
_FACTORIES = ("empty", "zeros", "ones", "full", "rand", "randn", "arange")
_NEW = ("new_empty", "new_zeros", "new_ones", "new_full", "as_strided", "repeat")
_SHAPING = frozenset(getattr(torch.ops.aten, name) for name in (*_RESHAPES, *_FACTORIES, *_NEW))


class _Recorder(TorchDispatchMode):
    """The operators that run and their plain arguments, without sizes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Any] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        scalars = []
        if func.overloadpacket not in _SHAPING:
            leaves = pytree.tree_leaves((args, kwargs))
            scalars = [leaf for leaf in leaves if isinstance(leaf, (bool, int, float))]
        self.calls.append((func, scalars))
        return func(*args, **(kwargs or {}))


def _shorter(value: Any, less: int) -> Any:
    """The value with ``less`` patches taken off every token axis that stands alone; strides keep their order."""

    def cut(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or axes_of(leaf) is None:
            return leaf
        shorter = leaf
        for d, dim in enumerate(axes_of(leaf) or ()):
            if tokens_of(dim) and len(dim) == 1:
                shorter = shorter.narrow(d, 0, shorter.shape[d] - less)
        return torch.empty_like(shorter)

    return pytree.tree_map(cut, value)


def _see_prefix(tensors: Any, dim: int, out: Tensor) -> None:
    """Constant rows joined to rows that depend on the image: this is how prefix tokens enter."""
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

    A token axis is known from where a constant prefix is joined to it, or from :meth:`seed`.
    """

    def __init__(self, capture: Capture) -> None:
        self.module: SkipViTModule = capture.module
        self.facts: dict[fx.Node, NodeFacts] = {}
        self.fake_mode = capture.fake_mode
        self._fake = fake_structure(self.module, self.fake_mode)
        inputs = iter(_fake_arguments(self.fake_mode, capture))
        with self.fake_mode, torch.no_grad():
            for node in self.module.graph.nodes:
                self.facts[node] = self._run(node, inputs)

    def seed(self, node: fx.Node, axes: Axes) -> None:
        """Give ``node`` these axes and follow them to the output."""
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
                    self.facts[later] = self._run(later, iter(()))
                later = later.next

    def __getitem__(self, node: fx.Node) -> NodeFacts:
        return self.facts[node]

    def fake_module(self, path: str) -> nn.Module:
        """The submodule at ``path``, with fake tensors; an inserted one, which has none, as it is."""
        inserted = path.split(".")[0] == OWN_CHILD
        return (self.module if inserted else self._fake).get_submodule(path)

    def fake_attribute(self, path: str) -> Any:
        """What a ``get_attr`` node reads, fake if it is a tensor."""
        return attribute(self._fake, path)

    def value(self, node: fx.Node) -> Any:
        """The value of a node of the author's; ``None`` for an inserted one."""
        facts = self.facts.get(node)
        return None if facts is None else facts.value

    def axes(self, node: fx.Node) -> Axes | None:
        return self.facts[node].axes

    def _run(self, node: fx.Node, inputs: Iterator[Any]) -> NodeFacts:
        inputs_: Any = fx.node.map_arg(
            (node.args, node.kwargs), lambda argument: self.facts[argument].value
        )
        args, kwargs = inputs_
        if node.op == "placeholder":
            return NodeFacts(next(inputs))
        if node.op == "get_attr":
            return NodeFacts(self.fake_attribute(str(node.target)))
        if node.op == "output":
            return NodeFacts(args[0])
        if node.target in SDPA:
            return _attention(AttentionArguments(*args, **kwargs))
        mode = AxisMode()
        try:
            module = self.fake_module(str(node.target)) if node.op == "call_module" else None
            with mode, author_code():
                if module is not None:
                    value = module(*args, **kwargs)
                elif node.op == "call_method":
                    value = getattr(args[0], str(node.target))(*args[1:], **kwargs)
                else:
                    value = node.target(*args, **kwargs)  # type: ignore[operator]
        except AuthorError as error:
            raise TraceError(
                f"node {node.name!r} in module {module_path(node) or '<root>'!r} does not run on fake "
                f"tensors: {error.args[0]}",
                hint="check that the example inputs fit the model",
            ) from error
        mode.facts.value = value
        return mode.facts

    def in_other_mode(self, node: fx.Node) -> str:
        """Whether a leaf module treats tokens otherwise when it trains (or evaluates): how, or nothing."""
        module = self.fake_module(str(node.target))
        modes = {part: part.training for part in module.modules()}
        module.train(not module.training)
        try:
            with self.fake_mode, torch.no_grad():
                other = self._run(node, iter(()))
        except TraceError as error:
            return str(error.args[0])
        finally:
            for part, training in modes.items():
                part.training = training
        if other.mixing:
            return other.mixing
        here, there = (
            [(tensor.shape, axes_of(tensor)) for tensor in tensors_in(value)]
            for value in (self.facts[node].value, other.value)
        )
        return "" if here == there else "the number or order of tokens changes"

    def _shorter_value(self, node: fx.Node, less: int) -> Any:
        return _shorter(self.facts[node].value, less)

    def counts_tokens(self, node: fx.Node) -> str:
        """Whether a leaf module computes with the number of tokens: the reason why it may, or nothing.

        It runs once as it is and once with one patch less; but for sizes, both must be the same operators.
        """
        runs = []
        for less in (0, 1):
            recorder = _Recorder()
            try:
                with self.fake_mode, torch.no_grad():
                    shorter = functools.partial(self._shorter_value, less=less)
                    inputs: Any = fx.node.map_arg((node.args, node.kwargs), shorter)
                    args, kwargs = inputs
                    module = self.fake_module(str(node.target))
                    with recorder, author_code():
                        module(*args, **kwargs)
            except AuthorError:
                return "a module works for one number of tokens only"
            runs.append(recorder.calls)
        return "" if runs[0] == runs[1] else "a module computes with the number of tokens"


def _fake_arguments(mode: Any, capture: Capture) -> list[Any]:
    example = list(capture.inputs.with_tensors().values())
    tensors = [
        leaf for leaf in pytree.tree_leaves(example) if isinstance(leaf, Tensor) and leaf.ndim
    ]
    alone = any(t.shape[0] == 1 for t in tensors)
    values = [fake_inputs(mode, value, more_batch=int(alone)) for value in example]
    for leaf in pytree.tree_leaves(values):
        if isinstance(leaf, Tensor):
            mark_data(leaf)
    return values


def _attention(given: AttentionArguments) -> NodeFacts:
    """The facts of a fused attention, which is not taken apart."""
    query, key, value, mask = given[:4]
    out = query.new_empty((*query.shape[:-1], value.shape[-1]))
    facts = NodeFacts(out)
    operands = [t for t in (query, key, value, mask) if t is not None]
    if any(is_data(t) for t in operands):
        mark_data(out)
    if any(is_lost(t) for t in operands):
        mark_lost(out)
    if any(axes_of(t) is not None for t in operands):
        call = rules.Call(scaled_dot_product_attention, (), {}, out)
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
