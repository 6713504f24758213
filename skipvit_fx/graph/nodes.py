"""What a node reads or calls, and what it is computed from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import fx, nn

from skipvit_fx.names import INSERTED_BY


def attribute(root: nn.Module, path: str) -> Any:
    """What ``root`` holds at a dotted path: a parameter, a buffer, or any other attribute."""
    value: Any = root
    for name in path.split("."):
        value = getattr(value, name)
    return value


def callee(node: fx.Node, part: Callable[[str], nn.Module]) -> Callable[..., Any]:
    """The module, function or method that a node calls with its arguments.

    Args:
        node: no placeholder, attribute or output.
        part: the module with a path.
    """
    if node.op == "call_module":
        return part(str(node.target))
    if isinstance(node.target, str):
        return _method(node.target)
    return node.target


def _method(name: str) -> Callable[..., Any]:
    def authors_method(owner: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(owner, name)(*args, **kwargs)

    return authors_method


def authors_node(node: fx.Node) -> fx.Node:
    """The node itself if it is the author's, or else the one that the inserted ones read, in one or more steps."""
    while INSERTED_BY in node.meta:
        node = node.all_input_nodes[0]
    return node


def leading_to(nodes: Iterable[fx.Node], follow: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """These nodes and those that they are computed from, back to where ``follow`` is false."""
    found = set(nodes)
    waiting = [*found]
    while waiting:
        for argument in waiting.pop().all_input_nodes:
            if argument not in found and follow(argument):
                found.add(argument)
                waiting.append(argument)
    return found
