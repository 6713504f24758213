"""From a model to a graph that computes exactly the same, in train and in eval mode."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from skipvit_fx.errors import TraceError
from skipvit_fx.ir.attention_modules import attention_modules, slow_attention
from skipvit_fx.ir.cloning import clone_structure
from skipvit_fx.ir.module import OWN_CHILD, SkipViTModule, own
from skipvit_fx.ir.symbolic import FORWARD_FAILURES, SymbolicTracer, attribute
from skipvit_fx.ops.mode import ByMode, FixedSize


@dataclass(frozen=True)
class Capture:
    """A captured model.

    Attributes:
        module: the graph, in possession of a structural clone of the model.
        args, kwargs: the example inputs.
        opened: paths of the modules whose forward was traced through.
    """

    module: SkipViTModule
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    opened: frozenset[str]


def capture_symbolic(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    also_open: frozenset[str] = frozenset(),
) -> Capture:
    """Trace ``model`` through the modules that run attention, their callers, and ``also_open``.

    Raises:
        TraceError: the model's Python code cannot be followed.
    """
    try:
        opened = frozenset(attention_modules(model, args, kwargs)) | also_open
    except FORWARD_FAILURES as error:
        raise TraceError(
            f"{type(model).__name__} does not run on the example inputs: {error}",
            hint="pass example_inputs=(...) of the shape and dtype that the model takes",
        ) from error
    _refuse_hooks(model, opened)
    traced = clone_structure(model)
    constants: dict[str, torch.Tensor] = {}
    graphs = []
    fixed_sizes = False
    for training in (False, True):
        tracer = SymbolicTracer(opened, args, kwargs)
        try:
            with slow_attention():
                graph = tracer.trace(traced.train(training))
        except FORWARD_FAILURES as error:
            raise TraceError(
                f"{type(model).__name__} cannot be traced symbolically in "
                f"{'train' if training else 'eval'} mode: {type(error).__name__}: {error}",
                hint="try frontend='export'",
            ) from error
        fixed_sizes |= tracer.fixed_sizes
        _share_constants(graph, traced, constants)
        graph.eliminate_dead_code(_is_impure)
        graphs.append(graph)
    module = own(clone_structure(model), graphs[0])
    for name, constant in constants.items():
        module.register_buffer(name, constant, persistent=False)
    _keep_both_modes(module, *graphs)
    if fixed_sizes:
        _fix_input_shapes(module, args, kwargs)
    module.recompile()
    return Capture(module, args, dict(kwargs), opened)


def _is_impure(node: fx.Node) -> bool:
    """Random leaves stay, so that the random stream is the author's; pure ones without users go."""
    return node.op in ("placeholder", "output", "call_module") or node.target is torch._assert


def _refuse_hooks(model: nn.Module, opened: frozenset[str]) -> None:
    for path in sorted(opened):
        module = model.get_submodule(path)
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
            raise TraceError(
                f"module {path or '<root>'!r} carries a hook, which would run once at tracing and never again",
                hint="remove the hook before rewriting, or place it on a module that runs no attention",
            )


def _share_constants(graph: fx.Graph, root: nn.Module, constants: dict[str, torch.Tensor]) -> None:
    """Point ``get_attr`` of constants made while tracing at one buffer for all equal ones."""
    owned = {name for name, _ in [*root.named_parameters(), *root.named_buffers()]}
    for node in graph.nodes:
        if node.op != "get_attr" or node.target in owned:
            continue
        value = attribute(root, node.target)
        if not isinstance(value, torch.Tensor) or not node.target.startswith("_tensor_constant"):
            continue
        for name, known in constants.items():
            same = known.dtype == value.dtype and known.shape == value.shape
            if same and torch.equal(known, value):
                node.target = name
                break
        else:
            name = f"{OWN_CHILD}_constant_{len(constants)}"
            constants[name] = value
            node.target = name


def _keep_both_modes(module: SkipViTModule, evaluation: fx.Graph, train: fx.Graph) -> None:
    """Replace every constant that differs between the two traces by a :class:`ByMode`.

    Before: ``sdpa(q, k, v, dropout_p=0.0)`` in eval, ``sdpa(q, k, v, dropout_p=0.1)`` in train.
    After: ``p = by_mode(); sdpa(q, k, v, dropout_p=p)``. It stands in the module whose mode it follows.
    """
    twins: dict[fx.Node, fx.Node] = {}
    first = next(iter(evaluation.nodes))
    pairs: dict[tuple[nn.Module, Any, Any], fx.Node] = {}
    eval_nodes, train_nodes = list(evaluation.nodes), list(train.nodes)
    for here, there in zip(eval_nodes, train_nodes, strict=False):
        here_leaves, spec = _leaves(here)
        there_leaves, there_spec = _leaves(there)
        if (here.op, here.target) != (there.op, there.target) or spec != there_spec:
            _refuse_paths(here, there)
        for i, (a, b) in enumerate(zip(here_leaves, there_leaves, strict=True)):
            if isinstance(a, fx.Node) or isinstance(b, fx.Node):
                if not isinstance(b, fx.Node) or twins.get(b) is not a:
                    _refuse_paths(here, there)
            elif type(a) is not type(b) and not {type(a), type(b)} <= {int, float, bool}:
                _refuse_paths(here, there)
            elif a != b:
                if not isinstance(a, (bool, int, float)):
                    _refuse_paths(here, there)
                owner = module.get_submodule(_owner(here))
                if (owner, b, a) not in pairs:
                    child = f"skipvit_by_mode_{len(pairs)}"
                    owner.add_module(child, ByMode(b, a).train(owner.training))
                    with evaluation.inserting_before(first):
                        path = f"{_owner(here)}.{child}".removeprefix(".")
                        pairs[owner, b, a] = evaluation.call_module(path)
                here_leaves[i] = pairs[owner, b, a]
        here.args, here.kwargs = _arguments(here_leaves, spec)
        twins[there] = here
    if len(eval_nodes) != len(train_nodes):
        _refuse_paths(eval_nodes[-1], train_nodes[-1])


class _Slice(NamedTuple):
    """A slice that pytree looks into."""

    start: Any
    stop: Any
    step: Any


def _leaves(node: fx.Node) -> tuple[list[Any], pytree.TreeSpec]:
    """The arguments of a node, one by one, also those within slices."""
    opened = pytree.tree_map(
        lambda v: _Slice(v.start, v.stop, v.step) if isinstance(v, slice) else v,
        (node.args, node.kwargs),
    )
    return pytree.tree_flatten(opened)


def _arguments(leaves: list[Any], spec: pytree.TreeSpec) -> Any:
    """The inverse of :func:`_leaves`."""
    return pytree.tree_map(
        lambda v: slice(*v) if isinstance(v, _Slice) else v,
        pytree.tree_unflatten(leaves, spec),
        is_leaf=lambda v: isinstance(v, _Slice),
    )


def _owner(node: fx.Node) -> str:
    """Path of the module in whose forward the node was traced."""
    stack = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    if node.op == "call_module":
        stack = stack[:-1] if stack and stack[-1] == node.target else stack
    return stack[-1] if stack else ""


def _refuse_paths(here: fx.Node, there: fx.Node) -> None:
    raise TraceError(
        f"the model takes different paths in train and eval mode: {here.format_node()} against "
        f"{there.format_node()} in module {module_path(here) or '<root>'!r}",
        hint="a rewritten model serves both modes with one graph; move the branch into a submodule of its own",
    )


def _fix_input_shapes(module: SkipViTModule, args: tuple[Any, ...], kwargs: Any) -> None:
    """Put a :class:`FixedSize` behind every tensor input."""
    tensors = dict(_tensor_inputs(module, args, kwargs))
    for node in list(module.graph.nodes):
        if node.op != "placeholder" or node not in tensors:
            continue
        child = f"fixed_{node.name}"
        shape = tuple(tensors[node].shape[1:])
        module.get_submodule(OWN_CHILD).add_module(child, FixedSize(node.name, shape))
        with module.graph.inserting_after(node):
            checked = module.graph.call_module(f"{OWN_CHILD}.{child}", (node,))
        node.replace_all_uses_with(checked, delete_user_cb=lambda user, c=checked: user is not c)


def _tensor_inputs(
    module: SkipViTModule, args: tuple[Any, ...], kwargs: Any
) -> Iterator[tuple[fx.Node, torch.Tensor]]:
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    values = [*args, *kwargs.values()]
    for node, value in zip(placeholders, values, strict=False):
        if isinstance(value, torch.Tensor):
            yield node, value


def module_path(node: fx.Node) -> str:
    """Path of the module whose forward made the node; for a ``call_module`` node, of that module itself."""
    if node.op == "call_module":
        return str(node.target)
    stack = node.meta.get("nn_module_stack")
    return next(reversed(stack.values()))[0] if stack else ""
