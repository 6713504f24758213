"""One graph for train and eval mode, from a trace of each."""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

from torch import fx, nn

from skipvit_fx.errors import TraceError
from skipvit_fx.graph.module import SkipViTModule
from skipvit_fx.graph.module_paths import module_path
from skipvit_fx.names import CHECKPOINT, OWN_CHILD
from skipvit_fx.ops.guard import guard
from skipvit_fx.ops.mode import InTraining, by_mode
from skipvit_fx.torch_internals import pytree


def keep_both_modes(module: SkipViTModule, evaluation: fx.Graph, train: fx.Graph) -> None:
    """Turn the graph of eval mode into one for both.

    Constants that differ become a :func:`by_mode`; functions that only train mode calls become an :class:`InTraining`.

    Before::

        y = sdpa(q, k, v, dropout_p=0.0); z = norm(y)                 # in eval
        y = sdpa(q, k, v, dropout_p=0.1); n = noisy(y); z = norm(n)   # in train

    After::

        p = by_mode(self.attn, 0.1, 0.0)
        y = sdpa(q, k, v, dropout_p=p); n = in_training(self, y); z = norm(n)

    Raises:
        TraceError: the two differ in any other way.
    """
    _Union(module, evaluation).take_in(list(train.nodes))


class _Union:
    """The graph of eval mode, while that of train mode is merged into it.

    Attributes:
        twins: the node of eval mode for each node of train mode; for one that only train mode has, the node whose value
            bypasses it.
        only_in_train: the inserted nodes for those that only train mode has.
    """

    def __init__(self, module: SkipViTModule, evaluation: fx.Graph) -> None:
        self.module = module
        self.graph = evaluation
        self.first = next(iter(evaluation.nodes))
        self.twins: dict[fx.Node, fx.Node] = {}
        self.only_in_train: dict[fx.Node, fx.Node] = {}
        self.constants: dict[tuple[nn.Module, Any, Any], fx.Node] = {}
        self.owners: dict[str, fx.Node] = {}

    def take_in(self, train: list[fx.Node]) -> None:
        waiting = list(reversed(self.graph.nodes))
        for there in train:
            if not waiting:
                _refuse_paths(there, there)
            here = waiting[-1]
            if self._alike(here, there):
                self._pair(waiting.pop(), there)
            else:
                self._insert(here, there)
        if waiting:
            _refuse_paths(waiting[-1], train[-1])

    def _alike(self, here: fx.Node, there: fx.Node) -> bool:
        """Whether both call the same target with the same arguments, except for constants."""
        (here_leaves, spec), (there_leaves, there_spec) = _leaves(here), _leaves(there)
        return (here.op, here.target, spec) == (there.op, there.target, there_spec) and all(
            self.twins.get(b) is a if isinstance(b, fx.Node) else not isinstance(a, fx.Node)
            for a, b in zip(here_leaves, there_leaves, strict=True)
        )

    def _pair(self, here: fx.Node, there: fx.Node) -> None:
        here_leaves, spec = _leaves(here)
        for i, (a, b) in enumerate(zip(here_leaves, _leaves(there)[0], strict=True)):
            if isinstance(b, fx.Node):
                here_leaves[i] = self.only_in_train.get(b, a)
            elif type(a) is not type(b) and not {type(a), type(b)} <= {int, float, bool}:
                _refuse_paths(here, there)
            elif a != b:
                if not isinstance(a, (bool, int, float)):
                    _refuse_paths(here, there)
                here_leaves[i] = self._constant(_owner(here), a, b)
        here.args, here.kwargs = _arguments(here_leaves, spec)
        if CHECKPOINT in there.meta:  # some models use checkpoints in train mode only
            here.meta[CHECKPOINT] = there.meta[CHECKPOINT]
        self.twins[there] = here

    def _insert(self, here: fx.Node, there: fx.Node) -> None:
        """Insert ``there``, which only train mode has, before ``here``."""
        if _is_size_to_guard(there):
            with self.graph.inserting_before(here):
                self.twins[there] = self.graph.node_copy(there, self._here)
            return
        given = [i for i, argument in enumerate(there.args) if isinstance(argument, fx.Node)]
        if there.op not in ("call_function", "call_method") or not given:
            _refuse_paths(here, there)
        passes = there.args[given[0]]
        assert isinstance(passes, fx.Node)
        leaves, spec = _leaves(there)
        args, kwargs = _arguments([self._here(leaf) for leaf in leaves], spec)
        name = f"in_training_{len(self.only_in_train) + 1}"
        self.module.own.add_module(name, InTraining(there.target, given[0]))
        owner = self._module(_owner(there))
        with self.graph.inserting_before(here):
            node = self.graph.call_module(f"{OWN_CHILD}.{name}", (owner, *args), kwargs)
        node.meta = dict(there.meta)
        self.twins[there] = self.twins[passes]
        self.only_in_train[there] = node

    def _here(self, leaf: Any) -> Any:
        if not isinstance(leaf, fx.Node):
            return leaf
        return self.only_in_train.get(leaf, self.twins[leaf])

    def _constant(self, owner: str, evaluation: Any, train: Any) -> fx.Node:
        key = (self.module.get_submodule(owner), train, evaluation)
        if key not in self.constants:
            given = (self._module(owner), train, evaluation)
            with self.graph.inserting_before(self.first):
                self.constants[key] = self.graph.call_function(by_mode, given)
        return self.constants[key]

    def _module(self, path: str) -> fx.Node:
        """The module whose mode decides; for the model itself the compiler's child, which is always in that mode."""
        path = path or OWN_CHILD
        if path not in self.owners:
            with self.graph.inserting_before(self.first):
                self.owners[path] = self.graph.create_node("get_attr", path)
        return self.owners[path]


def _is_size_to_guard(node: fx.Node) -> bool:
    """Whether a node computes a number that is used for guards only."""
    module = getattr(node.target, "__module__", None)
    counts = module == "_operator" or node.target in (getattr, "size", "dim", "numel")
    return counts and all(user.target is guard or _is_size_to_guard(user) for user in node.users)


class _Slice(NamedTuple):
    """A slice that pytree looks into."""

    start: Any
    stop: Any
    step: Any


def _leaves(node: fx.Node) -> tuple[list[Any], pytree.TreeSpec]:
    """The arguments of a node one by one, including those within slices."""
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


def _refuse_paths(here: fx.Node, there: fx.Node) -> NoReturn:
    raise TraceError(
        f"the model takes different paths in train and eval mode: {here.format_node()} against "
        f"{there.format_node()} in module {module_path(here) or '<root>'!r}",
        hint="a rewritten model serves both modes with one graph; move the branch into a submodule of its own",
    )
