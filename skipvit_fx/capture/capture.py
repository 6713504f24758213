"""From a model to a graph that computes exactly the same, in train and in eval mode."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from skipvit_fx.author.attributes import (
    CONSTANT,
    kept_of_a_call,
    warn_of_kept,
    watch_attributes,
)
from skipvit_fx.author.code import AuthorError, author_code
from skipvit_fx.author.questions import Recorded, modes_asked
from skipvit_fx.author.side_effects import followed
from skipvit_fx.author.this_thread import Checkpoints
from skipvit_fx.capture.cloning import clone_structure, copy_to_trace
from skipvit_fx.capture.exported import export_graph
from skipvit_fx.capture.fakes import TracelessFakeMode
from skipvit_fx.capture.live_numbers import refuse_other_uses
from skipvit_fx.capture.modes import keep_both_modes
from skipvit_fx.capture.repeated import Alone, call_alone, refuse_calls_that_remember
from skipvit_fx.capture.symbolic import SymbolicTracer
from skipvit_fx.capture.watch import watch_calls
from skipvit_fx.errors import TraceError
from skipvit_fx.graph.author_class import own, refuse_taken_names
from skipvit_fx.graph.inputs import LIVE, Inputs
from skipvit_fx.graph.module import SkipViTModule
from skipvit_fx.graph.module_paths import naming_parts
from skipvit_fx.graph.nodes import attribute
from skipvit_fx.graph.source import trace_every_node
from skipvit_fx.names import CONSTANT_BUFFER, OWN_CHILD
from skipvit_fx.ops.guard import guard
from skipvit_fx.ops.mode import FixedSize
from skipvit_fx.options import Frontend
from skipvit_fx.torch_internals import ASSERT, call_hooks_of, pytree


@dataclass(frozen=True)
class Capture:
    """A captured model.

    Attributes:
        module: the graph, which owns a structural clone of the model.
        args, kwargs: the example inputs, as they were passed.
        inputs: the same, by the model's parameter names.
        frontend: how it was captured.
        frontend_reason: why.
        opened: paths of the modules whose forward was traced through.
        fake_mode: the mode in which the model ran on fake tensors, for later such runs as well.
    """

    module: SkipViTModule
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: Inputs
    frontend: Frontend
    frontend_reason: str
    opened: frozenset[str]
    fake_mode: TracelessFakeMode


def capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    frontend: Frontend,
    reason: str,
    mode: TracelessFakeMode,
    recorded: bool,
    also_open: frozenset[str] = frozenset(),
) -> Capture:
    """Trace through the modules of ``model`` that run attention, their callers, and ``also_open``.

    Args:
        frontend, reason: how it is captured, and why.
        recorded: whether the call records gradients; the answer if the model asks.

    Raises:
        TraceError: the model's Python code cannot be followed.
    """
    _refuse_disguises(model)
    refuse_taken_names(model)
    opened = frozenset(watch_calls(model, mode, args, kwargs).around_attention) | also_open
    with naming_parts(opened):
        return _capture(model, args, kwargs, opened, frontend, reason, mode, recorded)


def _capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    opened: frozenset[str],
    frontend: Frontend,
    reason: str,
    mode: TracelessFakeMode,
    recorded: bool,
) -> Capture:
    inputs = Inputs(model.forward, args, kwargs)
    mode.surroundings.refuse_unanswered()
    _refuse_hooks(model, opened)
    constants: dict[str, torch.Tensor] = {}
    graphs = []
    if frontend == "export" and any(isinstance(v, LIVE) for v in inputs.taken().values()):
        raise TraceError(
            "torch.export builds in every number that a call passes", hint="pass it as a tensor"
        )
    alone = call_alone(model, mode, inputs, opened) if frontend == "export" else None
    mode.forget()
    gradients = Recorded(recorded)
    kept: list[tuple[str, str]] = []
    for training in (False, True):
        traced = copy_to_trace(model).train(training)
        traced.forward = author_code()(traced.forward)
        changes = watch_attributes(traced, opened)
        graph = _follow(traced, alone, opened, mode, inputs, constants, gradients)
        kept += [] if training else kept_of_a_call(changes)
        graph.eliminate_dead_code(_is_impure)
        graphs.append(graph)
    refuse_calls_that_remember(model, mode, inputs, opened)
    warn_of_kept(kept)
    mode.forget()
    module = own(clone_structure(model), graphs[0], inputs, gradients)
    for name, constant in constants.items():
        module.register_buffer(name, constant, persistent=False)
    keep_both_modes(module, *graphs)
    _fix_input_shapes(module, inputs)
    trace_every_node(module.graph)
    refuse_other_uses(module.graph, inputs)
    module.recompile()
    return Capture(module, args, dict(kwargs), inputs, frontend, reason, opened, mode)


def _follow(
    traced: nn.Module,
    alone: Alone | None,
    opened: frozenset[str],
    mode: TracelessFakeMode,
    inputs: Inputs,
    constants: dict[str, torch.Tensor],
    gradients: Recorded,
) -> fx.Graph:
    """The graph of a structural clone in its current mode; exported if ``alone`` is given, else traced.

    Constants that are made in the process are added to ``constants``.
    """
    exporting = alone is not None
    asked = modes_asked(gradients, training=traced.training)
    with _following(traced, exporting) as checkpoints, asked, torch.enable_grad():
        if alone is not None:
            graph = export_graph(traced, opened, inputs, alone)
            if checkpoints.count and traced.training:
                warnings.warn(
                    "the model recomputes activations (torch.utils.checkpoint); the exported graph keeps them, and "
                    "takes more memory in training",
                    stacklevel=2,
                )
        else:
            tracer = SymbolicTracer(opened, mode, inputs, checkpoints)
            graph = tracer.trace(traced)
    mode.forget()
    _share_constants(graph, traced, constants)
    return graph


@contextlib.contextmanager
def _following(traced: nn.Module, exporting: bool) -> Iterator[Checkpoints]:
    """Turn an exception of the author's forward into a refusal.

    Raises:
        TraceError: the model's Python code cannot be followed.
    """
    try:
        with followed(exporting=exporting) as checkpoints:
            yield checkpoints
    except AuthorError as error:
        raise TraceError(
            f"the forward of {type(traced).__name__} cannot be followed in "
            f"{'train' if traced.training else 'eval'} mode: {error.message}",
            hint="a branch or loop that depends on what a tensor holds must move into a module that runs no attention",
        ) from error


def _is_impure(node: fx.Node) -> bool:
    """Leaves stay, so that the random stream is the model's; pure nodes without users are removed."""
    kept = (ASSERT, guard)
    return node.op in ("placeholder", "output", "call_module") or node.target in kept


def _refuse_disguises(model: nn.Module) -> None:
    """Refuse modules that run anything other than a method of their own: they can be neither copied nor followed.

    Raises:
        TraceError: it was compiled or scripted, or its forward was replaced by a function.
    """
    for path, module in model.named_modules():
        forward = vars(module).get("forward")
        called = nn.Module if isinstance(module, fx.GraphModule) else type(module)
        if forward is not None and getattr(forward, "__self__", None) is not module:
            reason = (
                "was compiled, or its forward was replaced by a function that is not its method"
            )
        elif isinstance(module, torch.jit.ScriptModule):
            reason = "was compiled by TorchScript"
        elif module is model and called.__call__ is not nn.Module.__call__:
            reason = f"is called through {called.__call__.__qualname__} rather than its forward"
        else:
            continue
        raise TraceError(
            f"module {path or '<root>'!r}, a {type(module).__name__}, {reason}",
            hint="rewrite the model as its author wrote it; compile, wrap or patch what rewrite returns",
        )


def _refuse_hooks(model: nn.Module, opened: frozenset[str]) -> None:
    """Refuse foreign hooks. Hooks from the model's own package are part of its forward, and are traced with it.

    Raises:
        TraceError: somebody else's hook would run once during tracing and never again.
    """
    author = _package(type(model))
    for path in sorted(opened):
        module = model.get_submodule(path)
        for hook in (hook for kind in call_hooks_of(module) for hook in kind.values()):
            if _package(hook) != author or author == "__main__":
                raise TraceError(
                    f"module {path or '<root>'!r} has a hook, which would run once during tracing and never again",
                    hint="remove the hook before rewriting, or place it on a module that runs no attention",
                )


def _package(thing: Any) -> str:
    """The package that a class or function was written in."""
    function = thing.func if isinstance(thing, functools.partial) else thing
    return str(getattr(function, "__module__", None)).partition(".")[0]


def _share_constants(graph: fx.Graph, root: nn.Module, constants: dict[str, torch.Tensor]) -> None:
    """Point every ``get_attr`` of a constant made while tracing to one buffer per distinct value."""
    owned = {name for name, _ in [*root.named_parameters(), *root.named_buffers()]}
    for node in graph.nodes:
        if node.op != "get_attr" or node.target in owned:
            continue
        value = attribute(root, node.target)
        if not isinstance(value, torch.Tensor) or not node.target.startswith(CONSTANT):
            continue
        for name, known in constants.items():
            same = known.dtype == value.dtype and known.shape == value.shape
            if same and torch.equal(known, value):
                node.target = name
                break
        else:
            name = f"{CONSTANT_BUFFER}{len(constants)}"
            constants[name] = value
            node.target = name
    for name in [name for name in vars(root) if name.startswith(CONSTANT)]:
        delattr(root, name)  # the next trace counts from 0 again


def _fix_input_shapes(module: SkipViTModule, inputs: Inputs) -> None:
    """Insert a :class:`FixedSize` after every input, so that the check stays with the graph wherever it is used."""
    examples = inputs.taken()
    for node in list(module.graph.nodes):
        if node.op != "placeholder":
            continue
        child = f"fixed_{node.name}"
        shapes = tuple(
            tuple(leaf.shape[1:])
            for leaf in pytree.tree_leaves(examples[str(node.target)])
            if isinstance(leaf, torch.Tensor)
        )
        module.get_submodule(OWN_CHILD).add_module(child, FixedSize(node.name, shapes))
        with module.graph.inserting_after(node):
            checked = module.graph.call_module(f"{OWN_CHILD}.{child}", (node,))
        node.replace_all_uses_with(checked, delete_user_cb=lambda user, c=checked: user is not c)
