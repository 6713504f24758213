"""The second front end: ``torch.export``, for forwards that proxies cannot pass through.

It opens the same modules as the symbolic one: those that run attention are traced through, all others stay calls of the
author's modules, live in train and eval. While ``torch.export`` runs, each of these is a call of one opaque operator;
afterwards the operator's nodes become ``call_module`` nodes again.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.nn import functional as F

from skipvit_fx.author.attributes import CONSTANT
from skipvit_fx.author.code import author_code
from skipvit_fx.author.questions import (
    OF_GRADIENTS,
    modes_allowed,
    not_known_before_training,
    spelled_place,
)
from skipvit_fx.author.side_effects import stays_as_it_is
from skipvit_fx.capture.mutations import WatchWrites, refuse_lost_writes
from skipvit_fx.capture.outputs import KeepsOutputClass
from skipvit_fx.capture.repeated import Alone
from skipvit_fx.errors import TraceError
from skipvit_fx.graph.inputs import Inputs, parts_of
from skipvit_fx.graph.source import without_files
from skipvit_fx.names import LEAF
from skipvit_fx.ops.guard import guard
from skipvit_fx.torch_internals import (
    PythonReferenceAnalysis,
    aten,
    pytree,
    schema_arguments,
    storage_of,
    symbol_of,
    sympy_interp,
)

_LIBRARY = torch.library.Library("skipvit_fx", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "leaf(Tensor[] tensors, SymInt[] sizes, int call) -> Tensor[]"
)


_NOT_THE_AUTHORS = tuple(
    f"{folder}{os.sep}" for folder in (Path(torch.__file__).parent, Path(__file__).parents[1])
)
"""Folders with code that is not the author's."""

TENSOR = object()
"""Stands for a tensor in the output of a module."""


@dataclass
class _LeafCall:
    """One call of a leaf module while ``torch.export`` runs.

    Attributes:
        path: the module's path.
        forward: the module's forward.
        spec, constants: structure of its arguments, and those of its leaves that are neither tensors nor symbolic
            sizes.
        tensors, sizes: places of the leaves that are.
        out_spec, out_leaves: the same for its output; ``TENSOR`` stands for a tensor.
        writes: whether it writes into one of the tensors.
        handed_on: for every tensor that it returned, the place of the argument whose memory it shares, or None.
    """

    path: str
    forward: Callable[..., Any]
    spec: pytree.TreeSpec
    constants: list[Any]
    tensors: list[int]
    sizes: list[int]
    out_spec: pytree.TreeSpec | None = None
    out_leaves: list[Any] = field(default_factory=list)
    writes: bool = False
    handed_on: list[int | None] = field(default_factory=list)

    def arguments(self, tensors: list[Any], sizes: list[Any]) -> tuple[Any, Any]:
        """Positional and keyword arguments, put together again."""
        leaves = list(self.constants)
        for place, value in zip([*self.tensors, *self.sizes], [*tensors, *sizes], strict=True):
            leaves[place] = value
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return args, kwargs


_CALLS: list[_LeafCall] = []
"""Leaf calls of the running export; the operator refers to them by index."""


@torch.library.register_fake("skipvit_fx::leaf", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _leaf(tensors: list[Tensor], sizes: list[Any], call: int) -> list[Tensor]:
    """The output of a leaf module: fresh tensors with the shapes that its forward gives."""
    leaf = _CALLS[call]
    args, kwargs = leaf.arguments(tensors, sizes)
    with stays_as_it_is(), modes_allowed():
        with WatchWrites() as watch:
            leaves, leaf.out_spec = pytree.tree_flatten(leaf.forward(*args, **kwargs))
        leaf.writes = watch.wrote_into(tensors)
    if any(isinstance(out, (torch.SymInt, torch.SymFloat, torch.SymBool)) for out in leaves):
        raise TraceError(
            f"module {leaf.path!r} returns a number that depends on the batch size",
            hint="let it return tensors",
        )
    leaf.out_leaves = [TENSOR if isinstance(out, Tensor) else out for out in leaves]
    outs = [out for out in leaves if isinstance(out, Tensor)]
    memory = {storage_of(tensor): place for place, tensor in enumerate(tensors)}
    leaf.handed_on = [memory.get(storage_of(out)) for out in outs]
    return [
        torch.empty_strided(out.shape, out.stride(), dtype=out.dtype, device=out.device)
        for out in outs
    ]


def _opaque(path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that calls the opaque operator in place of ``forward``."""

    def call(*args: Any, **kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        sizes = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.SymInt)]
        moving = {*tensors, *sizes}
        constants = [None if i in moving else leaf for i, leaf in enumerate(leaves)]
        record = _LeafCall(path, forward, spec, constants, tensors, sizes)
        _CALLS.append(record)
        made = iter(
            torch.ops.skipvit_fx.leaf(
                [leaves[i] for i in tensors], [leaves[i] for i in sizes], len(_CALLS) - 1
            )
        )
        assert record.out_spec is not None
        outs = [next(made) if out is TENSOR else out for out in record.out_leaves]
        return pytree.tree_unflatten(outs, record.out_spec)

    setattr(call, LEAF, forward)
    return call


def export_graph(
    model: nn.Module, open_paths: frozenset[str], inputs: Inputs, alone: Alone
) -> fx.Graph:
    """The graph of ``model`` in its current mode, with every module that is not open as one node.

    What ``torch.export`` assumes of the batch size becomes a :func:`guard`.

    Args:
        model: a structural clone that nothing else uses: the forwards of its leaf modules are replaced, and constants
            of the graph become its attributes.
        open_paths: paths of the modules to trace through.
        inputs: those of an example call.
        alone: what a batch of one shows, which ``torch.export`` never looks at.

    Raises:
        TraceError: a part of the result cannot be expressed as a graph over the model's modules, or the author's code
            asks for something that only a real call can tell.
    """
    for asked in sorted(alone.asked & OF_GRADIENTS):
        raise not_known_before_training(asked)
    for path, module in model.named_modules():
        if path not in open_paths and path.rpartition(".")[0] in open_paths:
            forward = getattr(module.forward, LEAF, module.forward)
            module.forward = _opaque(path, forward)
    args, kwargs = inputs.several_samples()
    batches = inputs.by_parameter(
        lambda leaf: {0: Dim.DYNAMIC} if isinstance(leaf, Tensor) and leaf.ndim else None
    )
    try:
        with author_code():
            program = torch.export.export(model, args, kwargs, dynamic_shapes=batches)
        return _Translation(program, inputs, model, alone).graph
    finally:
        _CALLS.clear()


class _Tracer(KeepsOutputClass, fx.proxy.GraphAppendingTracer):
    """Appends nodes to a graph."""


class _OfProxies(PythonReferenceAnalysis):
    """Arithmetic with sizes that also works on proxies."""

    truediv = int_truediv = staticmethod(operator.truediv)
    pow = pow_by_natural = staticmethod(operator.pow)


class _Translation:
    """An exported program as a graph in the vocabulary of the symbolic front end.

    Parameters and buffers become attributes; operators whose arguments passes edit become the ``torch`` methods and
    functions that they come from; the model's arguments, leaf modules and output class are restored.

    Before::

        view = aten.view.default(linear, [sym_size, 197, 3, 6, 64])
        leaf = torch.ops.skipvit_fx.leaf.default([view], [], 7)
        getitem = leaf[0]

    After::

        view = linear.view([size, 197, 3, 6, 64])
        norm = model.blocks.0.norm1(view)
    """

    def __init__(
        self, program: ExportedProgram, inputs: Inputs, root: nn.Module, alone: Alone
    ) -> None:
        self.graph = fx.Graph()
        self._tracer = _Tracer(self.graph)
        self._program = program
        self._root = root
        self._twins: dict[fx.Node, Any] = {}
        self._written_by_leaf: dict[fx.Node, list[fx.Node]] = {}
        self._constant_count = 0
        self._place_inputs(inputs)
        self._place_guards(alone)
        for node in program.graph.nodes:
            if node.op == "call_function":
                self._place_call(node)
            elif node.op not in ("placeholder", "output"):
                raise TraceError(
                    f"torch.export keeps a part of the model as {node.format_node()}",
                    hint="move what the model does under autocast or without gradients into a module of its own",
                )
        self._place_output()
        refuse_lost_writes(self.graph, self._values().get, self._written_by_leaf.__getitem__)

    # -- inputs and state -------------------------------------------------------------------------------------

    def _place_inputs(self, inputs: Inputs) -> None:
        names = {node.name: node for node in self._program.graph.nodes if node.op == "placeholder"}
        leaves = iter(pytree.tree_leaves(inputs.with_stand_ins(self._placeholder)))
        for spec in self._program.graph_signature.input_specs:
            if spec.kind is InputKind.USER_INPUT:
                leaf = next(leaves)
                if isinstance(leaf, fx.Proxy):
                    self._twins[names[spec.arg.name]] = leaf.node
            elif spec.kind is InputKind.CONSTANT_TENSOR:
                self._twins[names[spec.arg.name]] = self._constant(str(spec.target))
            elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
                if names[spec.arg.name].users:
                    self._twins[names[spec.arg.name]] = self.graph.get_attr(str(spec.target))
            else:
                raise TraceError(
                    f"the model needs {spec.arg.name!r} from outside its graph, which is not a tensor",
                    hint="keep such an object in a module that runs no attention",
                )

    def _placeholder(self, name: str, example: Any) -> Any:
        node = self.graph.placeholder(name)
        return parts_of(example, fx.Proxy(node, self._tracer))

    def _place_guards(self, alone: Alone) -> None:
        """Guard what was assumed of the batch size, and what a graph of fixed operators no longer asks."""
        inputs = [
            (node, twin)
            for node, twin in self._twins.items()
            if twin.op != "get_attr" and isinstance(node.meta["val"], Tensor)
        ]
        sizes: dict[Any, Any] = {}
        for node, twin in inputs:
            for size in node.meta["val"].shape[:1]:
                if isinstance(size, torch.SymInt):
                    sizes[symbol_of(size)] = fx.Proxy(twin, self._tracer).size(0)
            self._guard_attributes(twin, node.meta["val"], alone)
        if not sizes:
            return
        fake: Any = inputs[0][0].meta["val"]
        for assumed in fake.fake_mode.shape_env.guards:
            frame = assumed.sloc.maybe_user_loc or assumed.sloc.framework_loc
            place = spelled_place(frame.filename, frame.lineno, frame.name)
            try:
                holds = sympy_interp(_OfProxies, dict(sizes), assumed.expr)
            except (TypeError, fx.proxy.TraceError) as error:
                raise TraceError(
                    f"the model depends on the batch size in {place}, where {assumed.expr} cannot be checked",
                    hint="move the branch into a module that runs no attention",
                ) from error
            self._guard(holds, True, place)
        if alone.differs:
            several = next(iter(sizes.values())) > 1
            self._guard(several, True, "the model, which computes differently for one sample,")

    def _guard_attributes(self, node: fx.Node, value: Tensor, alone: Alone) -> None:
        """Guard the dtype or device of inputs if the author's code asks for it, as the answers are built in."""
        for name in ("dtype", "device"):
            if alone.asked & _ASKED[name]:
                found = getattr(fx.Proxy(node, self._tracer), name)
                self._guard(
                    found, getattr(value, name), f"the model, which asks for a {name},", "value"
                )

    def _guard(self, found: Any, assumed: Any, place: str, read: str = "bool") -> None:
        if isinstance(found, fx.Proxy):
            self.graph.call_function(guard, (found.node, read, assumed, place))

    def _constant(self, name: str) -> fx.Node:
        """A tensor that the model builds in every call, such as ``torch.tensor([1.0])``."""
        attribute = f"{CONSTANT}{self._constant_count}"
        self._constant_count += 1
        setattr(self._root, attribute, self._program.constants[name])
        return self.graph.get_attr(attribute)

    # -- calls ------------------------------------------------------------------------------------------------

    def _place_call(self, node: fx.Node) -> None:
        if node.target in _CHECKS:
            return
        if node.target is aten.contiguous.default:
            self._twins[node] = self._twins[node.args[0]]  # type: ignore[index]
            return
        if node.target is operator.getitem and _is_leaf(node.args[0]):
            source, index = node.args
            self._twins[node] = self._twins[source][index]  # type: ignore[index]
            return
        if _is_leaf(node):
            self._place_leaf(node)
            return
        target: Any = node.target
        args, kwargs = self._twin_of((node.args, node.kwargs))
        if target in _METHODS:
            twin = self.graph.call_method(_METHODS[target], args, kwargs)
        elif target in _FUNCTIONS:
            # an argument left out in only one of the two modes has its default there
            missing = schema_arguments(target)[len(args) :]
            args += tuple(a.default_value for a in missing if not a.kwarg_only)
            twin = self.graph.call_function(_FUNCTIONS[target], args, kwargs)
        else:
            twin = self.graph.call_function(target, args, kwargs)
        self._remember(twin, node)
        self._twins[node] = twin

    def _place_leaf(self, node: fx.Node) -> None:
        tensors, sizes, index = node.args
        leaf = _CALLS[index]  # type: ignore[index]
        args, kwargs = leaf.arguments(self._twin_of(tensors), self._twin_of(sizes))
        twin = self.graph.call_module(leaf.path, args, kwargs)
        self._written_by_leaf[twin] = twin.all_input_nodes if leaf.writes else []
        self._remember(twin, node)
        assert leaf.out_spec is not None
        example = pytree.tree_unflatten(
            [torch.empty(0) if out is TENSOR else out for out in leaf.out_leaves], leaf.out_spec
        )
        leaves = pytree.tree_leaves(parts_of(example, fx.Proxy(twin, self._tracer)))
        parts = [part.node for part in leaves if isinstance(part, fx.Proxy)]
        for part in parts:
            self._remember(part, node)
        self._twins[node] = parts

    def _values(self) -> dict[fx.Node, Any]:
        """The fake tensors that the nodes compute."""
        found: dict[fx.Node, Any] = {}
        for node, twin in self._twins.items():
            value = node.meta["val"]
            if isinstance(twin, fx.Node):
                found.setdefault(twin, value)
            elif _is_leaf(node):
                given: Any = node.args[0]
                aliases = _CALLS[node.args[2]].handed_on  # type: ignore[index]
                for part, fresh, place in zip(twin, value, aliases, strict=True):
                    found[part] = fresh if place is None else given[place].meta["val"]
        return found

    def _twin_of(self, argument: Any) -> Any:
        return fx.node.map_arg(argument, self._twins.__getitem__)

    def _remember(self, twin: fx.Node, node: fx.Node) -> None:
        """Record where the node was made, in which modules and lines, as the symbolic front end does."""
        stack = node.meta.get("nn_module_stack", {})
        calls = {}
        for key, (place, kind) in stack.items():  # either tells apart the calls of one module
            path, _, number = place.partition("@")
            number = number or key.partition("@")[2]
            calls[f"{path}@{number}" if number else path] = (path, kind)
        twin.meta["nn_module_stack"] = calls
        if trace := without_files(node.stack_trace or "", _NOT_THE_AUTHORS):
            twin.stack_trace = trace

    # -- output -----------------------------------------------------------------------------------------------

    def _place_output(self) -> None:
        for spec in self._program.graph_signature.output_specs:
            if spec.kind is not OutputKind.USER_OUTPUT:
                raise TraceError(
                    f"the model changes its own state ({spec.target}) in a module that runs attention",
                    hint="keep state that changes in a module of its own",
                )
        outs = [
            fx.Proxy(self._twins[out], self._tracer) if isinstance(out, fx.Node) else out
            for out in self._program.graph.output_node().args[0]
        ]
        whole = pytree.tree_unflatten(outs, self._program.call_spec.out_spec)
        self.graph.output(self._tracer.create_arg(whole))


def _is_leaf(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is torch.ops.skipvit_fx.leaf.default


_ASKED = {
    "dtype": frozenset({"dtype", "is_floating_point"}),
    "device": frozenset({"device", "is_cuda"}),
}
"""Attributes and methods of a tensor whose result depends on its dtype, or its device."""

_CHECKS = frozenset({aten._assert_tensor_metadata.default, aten._assert_scalar.default})
"""Checks that ``torch.export`` adds itself; the shapes of inputs are checked at the inputs."""

# The strides of a tensor, and so whether it must be copied, may differ between the two modes and
# between devices. A copy for the sake of strides is left out, and a view that relied on it copies
# where it must.
_METHODS: dict[Any, str] = {
    aten.chunk.default: "chunk",
    aten.expand.default: "expand",
    aten.flatten.using_ints: "flatten",
    aten.permute.default: "permute",
    aten.reshape.default: "reshape",
    aten.select.int: "select",
    aten.softmax.int: "softmax",
    aten.split.Tensor: "split",
    aten.split_with_sizes.default: "split",
    aten.sym_size.int: "size",
    aten.transpose.int: "transpose",
    aten.unbind.int: "unbind",
    aten.unflatten.int: "unflatten",
    aten.view.default: "reshape",
}
_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    aten.linear.default: F.linear,
    aten.scaled_dot_product_attention.default: F.scaled_dot_product_attention,
}
