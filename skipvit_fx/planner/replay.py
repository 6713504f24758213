"""Run a plan on images whose first layers are computed already."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from skipvit_fx.author.code import AuthorError, author_code
from skipvit_fx.errors import TraceError
from skipvit_fx.graph.inputs import Inputs
from skipvit_fx.graph.module_paths import module_path
from skipvit_fx.graph.nodes import attribute, callee, leading_to
from skipvit_fx.planner.shared_graph import SharedGraph
from skipvit_fx.torch_internals import pytree, tensor_leaves

MOST_KEPT = 1 << 31
"""The most bytes of the residual stream that are kept for all batches together."""


@dataclass
class Begun:
    """A batch, with what the unmodified model computed on it.

    Attributes:
        outputs: the model's own.
        kept: by layer, the values that this layer and those after it read: its input, and what is shared with earlier
            layers.
    """

    outputs: Any
    kept: dict[int, dict[fx.Node, Any]]


class Replay:
    """Computes the outputs of plans, each from the input of the layer of its first stage on.

    The layers before are those of the unmodified model, so they are computed once per batch, for all plans. The inputs
    of all layers are kept, or of every second one, third one, ..., if they would take more than :data:`MOST_KEPT`.
    """

    def __init__(self, shared: SharedGraph) -> None:
        self.shared = shared
        self._module = shared.capture.module
        self._parts = dict(self._module.named_modules(remove_duplicate=False))
        order = {node: i for i, node in enumerate(shared.graph.nodes)}
        self._live = {
            layer.index: [
                node
                for node, at in order.items()
                if at <= order[layer.input]
                and any(order[user] > order[layer.input] for user in node.users)
                and node.op != "get_attr"
            ]
            for layer in shared.stream.layers
        }
        self._layers = list(self._live)

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any], batches: int) -> Begun:
        """Run the model itself on a batch; ``batches``: how many there will be like this one.

        Raises:
            GuardError: the graph was not made for such a call.
            TraceError: the model's code fails on it.
        """
        inputs = Inputs(self.shared.model.forward, args, kwargs).taken()
        given = {id(tensor) for tensor in tensor_leaves(list(inputs.values()))}
        ends = {self.shared.stream.layers[layer - 1].input: layer for layer in self._layers}
        kept: dict[int, dict[fx.Node, Any]] = {}
        values: dict[fx.Node, Any] = {}

        def see(node: fx.Node) -> None:
            if node in ends:
                live = {n: values[n] for n in self._live[ends[node]]}
                kept[ends[node]] = _copied(live, spare=given)

        values |= {
            node: inputs[str(node.target)]
            for node in self.shared.graph.find_nodes(op="placeholder")
        }
        for node in list(values):
            see(node)  # a model may be called with its first layer's input
        outputs = self._run(self.shared.graph.nodes, values, see)
        size = sum(t.numel() * t.element_size() for t in tensor_leaves(list(kept.values())))
        step = max(1, math.ceil(size * batches / MOST_KEPT))
        self._layers = self._layers[::step]
        return Begun(outputs, {layer: kept[layer] for layer in self._layers})

    def run(self, begun: Begun, first: int) -> Any:
        """The outputs for a batch with the plan that is on the graph now, whose first stage is at layer ``first``.

        Raises:
            TraceError: the model's code fails on fewer tokens.
        """
        start = max(layer for layer in begun.kept if layer <= max(first, 1))
        values = _copied(begun.kept[start])
        graph = self.shared.graph
        (output,) = graph.find_nodes(op="output")
        needed = leading_to([output], lambda argument: argument not in values)
        return self._run([n for n in graph.nodes if n in needed], values)

    def _run(
        self,
        nodes: Iterable[fx.Node],
        values: dict[fx.Node, Any],
        see: Callable[[fx.Node], None] = lambda _: None,
    ) -> Any:
        """Compute the nodes that have no value yet, in order; values are forgotten after their last use."""
        pending = [node for node in nodes if node not in values]
        last = {argument: node for node in pending for argument in node.all_input_nodes}
        for node in pending:
            values[node] = value = self._compute(node, values)
            see(node)
            for argument in node.all_input_nodes:
                if last[argument] is node:
                    values.pop(argument, None)
        return value

    def _compute(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        if node.op == "get_attr":
            return attribute(self._module, str(node.target))
        inputs: Any = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        args, kwargs = inputs
        if node.op == "output":
            return args[0]
        try:
            with author_code():
                return callee(node, self._part)(*args, **kwargs)
        except AuthorError as error:
            raise TraceError(
                f"node {node.name!r} in module {module_path(node) or '<root>'!r} does not run: {error.message}",
                hint="check that the batches are what the model is called with",
            ) from error

    def _part(self, path: str) -> Any:
        part = self._parts.get(path)
        return self._module.get_submodule(path) if part is None else part


def _copied(values: dict[fx.Node, Any], spare: Iterable[int] = ()) -> dict[fx.Node, Any]:
    """Copies of the tensors in these values, since an in-place operator may change them; equal ones stay one."""
    known: dict[int, Tensor] = {}
    spare = set(spare)

    def copied(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or id(leaf) in spare:
            return leaf
        if id(leaf) not in known:
            known[id(leaf)] = leaf.detach().clone()
        return known[id(leaf)]

    return {node: pytree.tree_map(copied, value) for node, value in values.items()}
