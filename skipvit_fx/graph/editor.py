"""The only way in which passes change a graph. Every edit is recorded as an event."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import fx, nn

from skipvit_fx.graph.module import SkipViTModule
from skipvit_fx.graph.source import trace_of_inserted
from skipvit_fx.names import INSERTED_BY, OWN_CHILD
from skipvit_fx.torch_internals import children_of


class Event(NamedTuple):
    """One edit.

    Attributes:
        kind: ``insert``, ``rewire`` (a node reads something else) or ``erase``.
        node: name of the node that was inserted, rewired or erased.
        detail: what it computes or reads now.
    """

    kind: str
    node: str
    detail: str


class GraphEditor:
    """Edits the graph of one module on behalf of the pass that runs."""

    def __init__(self, module: SkipViTModule) -> None:
        self.module = module
        self.graph = module.graph
        self.events: list[Event] = []
        self.running = ""

    def insert_module(
        self, path: str, op: nn.Module, args: Iterable[Any], *, after: fx.Node, name: str
    ) -> fx.Node:
        """Insert a call of ``op``, kept as ``skipvit.<path>``, after ``after`` and everything in ``args``.

        ``name`` says what the node holds; a number is appended if another node already has that name.
        """
        args = tuple(args)
        parent = self.module.get_submodule(OWN_CHILD)
        *groups, leaf = path.split(".")
        for group in groups:
            if group not in children_of(parent):
                parent.add_module(group, nn.Module().train(self.module.training))
            parent = parent.get_submodule(group)
        parent.add_module(leaf, op.train(self.module.training))
        with self.graph.inserting_after(max([after, *_nodes(args)])):
            node = self.graph.create_node("call_module", f"{OWN_CHILD}.{path}", args, name=name)
        return self._inserted(node)

    def insert_call(
        self, target: Callable[..., Any] | str, args: tuple[Any, ...], *, before: fx.Node, name: str
    ) -> fx.Node:
        """Insert a call of a function, or of the method with this name, before ``before``; ``name`` as above."""
        kind = "call_method" if isinstance(target, str) else "call_function"
        with self.graph.inserting_before(before):
            node = self.graph.create_node(kind, target, args, name=name)
        return self._inserted(node)

    def insert_item(self, values: fx.Node, i: int, name: str) -> fx.Node:
        """Insert the ``i``-th value of ``values``, after those before it; ``name`` as above."""
        before = values.next
        while before.target is operator.getitem and before.args[0] is values:
            before = before.next
        return self.insert_call(operator.getitem, (values, i), before=before, name=name)

    def rewire(self, user: fx.Node, old: fx.Node, new: Any) -> None:
        """Let ``user`` read ``new`` where it read ``old``."""
        user.args = fx.node.map_arg(user.args, lambda n: new if n is old else n)
        user.kwargs = fx.node.map_arg(user.kwargs, lambda n: new if n is old else n)
        self.events.append(Event("rewire", user.name, f"{old.name} -> {new}"))

    def rewire_all(self, users: Iterable[fx.Node], old: fx.Node, new: fx.Node) -> None:
        """Let each of the users of ``old`` read ``new``."""
        for user in list(users):
            self.rewire(user, old, new)

    def set_args(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Give ``node`` other arguments."""
        node.args, node.kwargs = args, kwargs
        self.events.append(Event("rewire", node.name, f"{args}, {kwargs}"))

    def erase(self, node: fx.Node) -> None:
        """Remove a node that nothing reads; for an inserted node, its module too."""
        self.events.append(Event("erase", node.name, node.format_node() or ""))
        self.graph.erase_node(node)
        if node.op == "call_module" and INSERTED_BY in node.meta:
            self.module.delete_submodule(str(node.target))

    def _inserted(self, node: fx.Node) -> fx.Node:
        node.meta[INSERTED_BY] = self.running
        node.stack_trace = trace_of_inserted(f"the pass {self.running}")
        self.events.append(Event("insert", node.name, node.format_node() or ""))
        return node


def is_erasable(node: fx.Node) -> bool:
    """Whether a node can be removed if nothing reads it: it was inserted, or does nothing but compute its value.

    Calls of the author's modules may do more: draw random numbers.
    """
    if INSERTED_BY in node.meta:
        return True
    return node.op in ("call_function", "call_method", "get_attr") and not node.is_impure()


def _nodes(args: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(args, found.append)
    return found
