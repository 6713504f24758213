"""One graph for train and for eval mode, from a trace of each."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import fx, nn
from torch.utils import _pytree as pytree

from skipvit_fx.errors import TraceError
from skipvit_fx.ir.module import SkipViTModule
from skipvit_fx.ir.places import module_path
from skipvit_fx.ops.mode import ByMode


def keep_both_modes(module: SkipViTModule, evaluation: fx.Graph, train: fx.Graph) -> None:
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
