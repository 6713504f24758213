"""Where in the model a node comes from."""

from __future__ import annotations

from torch import fx


def module_path(node: fx.Node) -> str:
    """Path of the module whose forward made the node; for a ``call_module`` node, of that module itself."""
    if node.op == "call_module":
        return str(node.target)
    stack = node.meta.get("nn_module_stack")
    return next(reversed(stack.values()))[0] if stack else ""
