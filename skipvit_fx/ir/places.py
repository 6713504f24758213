"""Where in the model a node comes from."""

from __future__ import annotations

from torch import fx


def module_path(node: fx.Node) -> str:
    """Path of the module whose forward made the node; for a ``call_module`` node, of that module itself."""
    if node.op == "call_module":
        return str(node.target)
    stack = node.meta.get("nn_module_stack")
    return next(reversed(stack.values()))[0] if stack else ""


def module_calls(node: fx.Node) -> tuple[str, ...]:
    """The calls of modules in which the node was made, outermost first, without the model's own.

    A module's first call is named by its path, a later one with a number: ``blocks.0@1`` is the second of ``blocks.0``.
    """
    stack = node.meta.get("nn_module_stack", {})
    return tuple(call for call, (path, _) in stack.items() if path)


def called_module(call: str) -> str:
    """The path of the module that a call of :func:`module_calls` is one of."""
    return call.partition("@")[0]
