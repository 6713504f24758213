"""The symbolic front end: torch.fx traces through the modules that run attention; all others are leaves."""

from __future__ import annotations

import builtins
import functools
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import fx, nn
from torch.fx.proxy import Attribute, Proxy
from torch.nn import functional as F

from skipvit_fx.author.code import AuthorError, author_code, author_frames
from skipvit_fx.author.questions import (
    OF_GRADIENTS,
    asked_by_a_library,
    asks_class,
    author_frame,
    compares_identity,
    modes_allowed,
    not_known_before_training,
    place_of,
)
from skipvit_fx.author.side_effects import lost_context, stays_as_it_is
from skipvit_fx.author.this_thread import Checkpoints
from skipvit_fx.capture.fakes import TracelessFakeMode, fake_inputs
from skipvit_fx.capture.mutations import AUGMENTED, WatchWrites, augmented, refuse_lost_writes
from skipvit_fx.capture.outputs import KeepsOutputClass
from skipvit_fx.errors import TraceError
from skipvit_fx.graph.inputs import Inputs, parts_of
from skipvit_fx.graph.nodes import attribute, callee, leading_to
from skipvit_fx.graph.sizes import dimension_of, sizes_of
from skipvit_fx.graph.source import Frame, spelled_trace
from skipvit_fx.names import CHECKPOINT
from skipvit_fx.ops.guard import READS, guard, kind_of
from skipvit_fx.torch_internals import FakeTensor, pytree

_OF_IDENTITY = ("device", "dtype", "layout")
"""Attributes of a tensor whose values Python may compare with ``is``."""

_ASK_FOR_OTHERS = ("skipvit_fx.author.questions", "torch", "torch.nn.parameter")
"""Modules that call ``isinstance`` on behalf of the author's code, for ``torch.is_tensor`` or a parameter check."""

_RANK = ("dim", "ndim", "ndimension", "is_nested")
"""Attributes that are the same in every call that the graph can run."""


class _Witnessed:
    """Proxy behaviour where Python needs a value: a length, a number, a class."""

    tracer: SymbolicTracer
    node: fx.Node

    def __len__(self) -> int:
        return int(self.tracer.concrete(self.node, "len"))

    def __int__(self) -> int:
        return int(self.tracer.concrete(self.node, "int"))

    def __index__(self) -> int:
        return int(self.tracer.concrete(self.node, "int"))

    def __float__(self) -> float:
        return float(self.tracer.concrete(self.node, "float"))

    def __hash__(self) -> int:
        """Hash a size by its value, a tensor by its identity."""
        if issubclass(self.tracer.kind(self.node), torch.Tensor):
            return object.__hash__(self)
        return hash(self.tracer.concrete(self.node, "value"))

    def __setitem__(self, place: Any, value: Any) -> None:
        del place, value
        _, (path, _) = [("", ("", None)), *self.tracer.module_stack.items()][-1]
        raise TraceError(
            f"module {path or '<root>'!r} writes into a part of a tensor (x[...] = y), which a graph does not show",
            hint="build the tensor with torch.cat or torch.where, or do it in a module that runs no attention",
        )

    def __getattr__(self, name: str) -> Any:
        if not hasattr(self.tracer.outline(self.node), name):
            raise AttributeError(f"{self.tracer.kind(self.node).__name__} has no {name!r}")
        attribute = _WitnessedAttribute(cast(Proxy, self), name)
        if name in _OF_IDENTITY and compares_identity(sys._getframe(1)):
            return self.tracer.concrete(attribute.node, "value")
        return attribute

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """What ``isinstance`` checks besides the type. Not for torch's own code, which passes tensors on to C++."""
        frame = sys._getframe(1)
        by_library = asked_by_a_library(frame, but=_ASK_FOR_OTHERS)
        if by_library or not asks_class(frame.f_code, frame.f_lasti):
            return type(self)
        if self.node.op == "call_module":
            self.tracer.concrete(self.node, "class")
        return self.tracer.kind(self.node)


for _name in AUGMENTED:
    setattr(_Witnessed, f"__i{_name}__", augmented(_name))


class _WitnessedProxy(_Witnessed, Proxy):  # type: ignore[misc]
    @classmethod
    def __torch_function__(
        cls, orig_method: Any, types: Any, args: Any = None, kwargs: Any = None
    ) -> Any:
        if orig_method is F.multi_head_attention_forward:  # written in Python: trace through it
            return _looked_into(orig_method)(*args, **(kwargs or {}))
        return super().__torch_function__(orig_method, types, args, kwargs)


def _looked_into(function: Any) -> Callable[..., Any]:
    """``function``, written in Python, without its check whether arguments override torch functions."""
    known = {**function.__globals__, "has_torch_function": lambda tensors: False}
    twin = types.FunctionType(function.__code__, known, argdefs=function.__defaults__)
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin


class _WitnessedAttribute(_Witnessed, Attribute):  # type: ignore[misc]
    pass


@dataclass
class _Witness:
    """An example call on fake tensors, computed as far as needed.

    Attributes:
        values: values of nodes; the contents of their tensors are not known.
        known: values of inputs, with the contents of small integer tensors: only for leaf modules, which stay live.
    """

    values: dict[fx.Node, Any] = field(default_factory=dict)
    known: dict[fx.Node, Any] = field(default_factory=dict)


class SymbolicTracer(KeepsOutputClass, fx.Tracer):
    """Traces through the modules named in ``open_paths``; every other module stays one ``call_module`` node.

    Where Python needs a value (a branch, a length), the node is evaluated on fake tensors of two batch sizes. If both
    agree, tracing continues with that value, and the graph gets a :func:`guard` that checks it at every call; if not,
    the model's control flow depends on the batch and cannot be captured.
    """

    proxy_buffer_attributes = True

    def __init__(
        self,
        open_paths: frozenset[str],
        mode: TracelessFakeMode,
        inputs: Inputs,
        checkpoints: Checkpoints,
    ) -> None:
        super().__init__()
        self._checkpoints = checkpoints
        self.open_paths = open_paths
        self._inputs = inputs
        self._mode = mode
        self._witnesses = (_Witness(), _Witness())
        self._evaluating = False
        self._state: dict[str, torch.Tensor] = {}
        self._names: dict[int, str] = {}
        self._writing_leaves: set[fx.Node] = set()
        self._guarded: set[tuple[fx.Node, str]] = set()

    # -- capture ----------------------------------------------------------------------------------------------

    def trace(self, root: nn.Module, concrete_args: None = None) -> fx.Graph:  # type: ignore[override]
        self._state = dict(_state(root))
        self._names = {id(tensor): name for name, tensor in _state(root)}
        with author_code():
            graph = super().trace(root)
        self._compute(graph.find_nodes(op="call_module"), self._witnesses[0])
        refuse_lost_writes(graph, self.example, self._written_by_leaf)
        return graph

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        if kind.startswith("call") and not torch.is_grad_enabled():
            raise lost_context("torch.no_grad")
        node = super().create_node(kind, *args, **kwargs)
        running = [
            Frame(f.f_code.co_filename, f.f_lineno, f.f_code.co_qualname)
            for f in author_frames(SymbolicTracer.trace.__code__)
        ]
        if running:
            node.stack_trace = spelled_trace(tuple(reversed(running)))
        if self._checkpoints.current is not None:
            node.meta[CHECKPOINT] = self._checkpoints.current
        return node

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self.open_paths

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Placeholders for the arguments that the example passes; the others keep their defaults."""
        del root_fn, is_module, concrete_args
        root: Any = self.root
        args, kwargs = self._inputs.with_stand_ins(self._placeholder)
        # not the class's forward: it may be a method of the instance
        return (lambda: root.forward(*args, **kwargs)), []

    def _placeholder(self, name: str, example: Any) -> Any:
        proxy = self.create_proxy("placeholder", name, (), {})
        for more_batch, witness in enumerate(self._witnesses):
            values = functools.partial(fake_inputs, self._mode, example, more_batch=more_batch)
            witness.values[proxy.node] = values(known=False)
            witness.known[proxy.node] = values()
        return parts_of(example, proxy)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        if self._evaluating:
            return forward(*args, **kwargs)
        out = super().call_module(m, forward, args, kwargs)
        return self._without_nothing(out) if issubclass(type(out), _WitnessedProxy) else out

    def _without_nothing(self, out: Proxy) -> Any:
        """The output of a module, with None where it returned None, so that ``is None`` works."""
        value = self.example(out.node)
        if not any(leaf is None for leaf in pytree.tree_leaves(value)):
            return out
        self.concrete(out.node, "nothing")
        some = torch.empty(0)
        return parts_of(pytree.tree_map(lambda leaf: None if leaf is None else some, value), out)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Parameters and buffers become ``get_attr`` nodes, one per tensor."""
        if self._evaluating or not isinstance(attr_val, torch.Tensor):
            return attr_val
        name = self._names.get(id(attr_val))
        if name is None:
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def create_arg(self, a: Any) -> Any:
        if issubclass(type(a), Proxy):  # whatever its __class__ says
            return a.node
        if isinstance(a, torch.Tensor) and id(a) in self._names:
            return self.create_node("get_attr", self._names[id(a)], (), {})
        if isinstance(a, FakeTensor):
            raise TraceError(
                "the model keeps a tensor of an earlier call in a place that could not be restored",
                hint="keep tables in a buffer, or in a dict or list of the module that uses them",
            )
        parameter = isinstance(a, torch.Tensor) and a.requires_grad and a.is_leaf
        if parameter and not isinstance(a, nn.Parameter):
            raise TraceError(
                "the model computes with a parameter that tracing cannot see, so it would be frozen at its value",
                hint="read parameters as attributes of the module that owns them",
            )
        return super().create_arg(a)

    # -- values -----------------------------------------------------------------------------------------------

    def proxy(self, node: fx.Node) -> Proxy:
        return _WitnessedProxy(node, self)

    def to_bool(self, obj: Proxy) -> bool:
        return bool(self.concrete(obj.node, "bool"))

    def iter(self, obj: Proxy) -> Iterator[Any]:
        sequence: Any = obj
        return iter([sequence[i] for i in range(self.concrete(obj.node, "len"))])

    def keys(self, obj: Proxy) -> Any:
        return self.concrete(obj.node, "keys")

    def concrete(self, node: fx.Node, read: str) -> Any:
        """The node's value, read as one of :data:`READS`, if it is the same for two batch sizes.

        The graph gets a :func:`guard` on it, unless it cannot change.

        Raises:
            TraceError: it is not, or it depends on the contents of tensors.
        """
        if _asks_for_gradients(node):
            raise not_known_before_training(_asked(node))
        try:
            values = [self._value(node, witness) for witness in self._witnesses]
            reader = (
                bool if read == "bool" else READS[read]
            )  # not READS["bool"], whose frame would be ours
            with author_code():
                first, second = map(reader, values)
        except AuthorError as error:
            raise _needs_value(node, error) from error
        if first != second:
            raise TraceError(
                f"the model's Python code {'branches on' if read == 'bool' else 'takes as a number'} {node.name}, "
                "which differs with the batch size",
                hint="rewrite a model whose Python code does not depend on the batch size; x.shape[0] is not a number "
                "during tracing, len(x) is",
            )
        if (node, read) not in self._guarded and self._varies(node):
            self._guarded.add((node, read))
            self.create_node(
                "call_function", guard, (node, read, first, place_of(author_frame())), {}
            )
        return first

    def _varies(self, node: fx.Node) -> bool:
        """Whether a node's value may differ in another call, given that inputs have the example's sizes."""
        if _asked(node) in _RANK:
            return False
        if found := dimension_of(node, lambda tensor: self.example(tensor).ndim):
            tensor, dim = found
            return tensor.op != "get_attr" and not (tensor.op == "placeholder" and dim > 0)
        if sizes_of(node) is not None:
            return node.all_input_nodes[0].op != "get_attr"
        if node.op in ("call_function", "call_method") and _asked(node) is None:
            return any(map(self._varies, node.all_input_nodes))
        return True

    def example(self, node: fx.Node) -> Any:
        """The node's value in the example call, with fake tensors."""
        return self._value(node, self._witnesses[0])

    def kind(self, node: fx.Node) -> type:
        """The class of a node's value; that of parameters for a parameter."""
        if node.op == "get_attr" and str(node.target) in self._state:
            return kind_of(self._state[str(node.target)])
        return kind_of(self._known(node))

    def outline(self, node: fx.Node) -> Any:
        """An object with the attributes of a node's value: for a tensor its class, as a fake tensor has extra ones."""
        kind = self.kind(node)
        return kind if issubclass(kind, torch.Tensor) else self._known(node)

    def _known(self, node: fx.Node) -> Any:
        """The example value of a node that Python code asks about.

        Raises:
            TraceError: it depends on the contents of tensors.
        """
        try:
            return self.example(node)
        except AuthorError as error:
            raise _needs_value(node, error) from error

    def _written_by_leaf(self, node: fx.Node) -> list[fx.Node]:
        """All arguments of a module that writes into one of them, as seen when it was evaluated."""
        return node.all_input_nodes if node in self._writing_leaves else []

    def _value(self, node: fx.Node, witness: _Witness) -> Any:
        """The node's value on a witness."""
        self._compute([node], witness)
        return witness.values[node]

    def _compute(self, nodes: Iterable[fx.Node], witness: _Witness) -> None:
        """Fill in values on a witness; missing values that they need are computed first, in graph order."""
        values = witness.values
        missing = (node for node in nodes if node not in values)
        needed = leading_to(missing, lambda argument: argument not in values)
        if not needed:
            return
        self._evaluating = True
        try:
            with stays_as_it_is(), modes_allowed(), self._mode, torch.no_grad():
                for pending in sorted(needed):
                    values[pending] = self._run(pending, witness)
        finally:
            self._evaluating = False

    def _run(self, node: fx.Node, witness: _Witness) -> Any:
        values = witness.values
        if node.op == "call_module":
            args, kwargs = fx.node.map_arg(
                (node.args, node.kwargs), lambda a: witness.known.get(a, values[a])
            )
            module = self.root.get_submodule(str(node.target))
            with WatchWrites() as watch, author_code():
                out = module(*args, **kwargs)
            if watch.wrote_into((args, kwargs)):
                self._writing_leaves.add(node)
            return pytree.tree_map_only(FakeTensor, _forget, out)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        if node.op == "get_attr":
            name = str(node.target)
            value = self._state[name] if name in self._state else attribute(self.root, name)
            if isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor):
                return self._mode.twin(value)
            return value
        with author_code():
            return callee(node, self.root.get_submodule)(*args, **kwargs)


def _state(root: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and buffer; a shared one under its first name."""
    yield from root.named_parameters()
    yield from root.named_buffers()


def _asked(node: fx.Node) -> str | None:
    """The tensor attribute that a node reads, or the method without arguments that it calls."""
    if node.target is builtins.getattr:
        return str(node.args[1])
    alone = len(node.args) + len(node.kwargs) == 1
    return str(node.target) if node.op == "call_method" and alone else None


def _asks_for_gradients(node: fx.Node) -> bool:
    return _asked(node) in OF_GRADIENTS or node.target is torch.is_inference


def _needs_value(node: fx.Node, error: AuthorError) -> TraceError:
    return TraceError(
        f"the model's Python code needs the value of {node.format_node() or node.name}, which depends on "
        f"the contents of tensors: {error.message}",
        hint="move the branch or loop into a module that runs no attention",
    )


def _forget(tensor: FakeTensor) -> FakeTensor:
    """The tensor, with its value no longer known."""
    tensor.constant = None
    return tensor
