"""Numbers that a graph takes as arguments: sound where they are factors or summands and decide no shape."""

from __future__ import annotations

import operator

import torch
from torch import fx

from skipvit_fx.errors import TraceError
from skipvit_fx.graph.inputs import LIVE, Inputs
from skipvit_fx.names import INSERTED
from skipvit_fx.ops.guard import guard

_NAMES = ("add", "sub", "mul", "truediv", "pow", "neg", "gt", "ge", "lt", "le", "eq", "ne")
_ARITHMETIC = frozenset(
    {
        *(getattr(operator, name) for name in _NAMES),
        *(torch.add, torch.sub, torch.mul, torch.div, torch.true_divide, torch.pow),
        *("add", "sub", "mul", "div", "true_divide", "pow"),
    }
)
"""Elementwise functions and methods of tensors."""


def refuse_other_uses(graph: fx.Graph, inputs: Inputs) -> None:
    """Check where the live numbers of a captured graph go.

    Raises:
        TraceError: into anything other than arithmetic with tensors, a guard or the output.
    """
    given = inputs.taken()
    numbers: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" and isinstance(given[str(node.target)], LIVE):
            numbers.add(node)
        if numbers.isdisjoint(node.all_input_nodes) or node.op == "output" or node.target is guard:
            continue
        checked = node.op == "call_module" and str(node.target).startswith(INSERTED)
        if not checked and node.target not in _ARITHMETIC:
            raise TraceError(
                f"a number that changes from call to call is used in {node.name}, where it may decide a shape",
                hint="pass it as a tensor",
            )
        if numbers.issuperset(node.all_input_nodes):
            numbers.add(node)
