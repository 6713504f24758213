"""Whether attention masks that do not depend on the image are causal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from skipvit_fx.analysis.axes import is_data, tensors_in
from skipvit_fx.analysis.tokens import TokenAnalysis
from skipvit_fx.graph.nodes import attribute, callee


def is_causal(analysis: TokenAnalysis, mask: fx.Node) -> bool:
    """Whether a mask (boolean, or added to the logits) hides all later keys from every query.

    A mask that depends on the model's input is not examined; it is used as it is.
    """
    if any(is_data(t) for t in tensors_in(analysis[mask].value)):
        return False
    value = _constant(analysis, mask, {})
    if not isinstance(value, Tensor) or value.is_meta:
        return False
    if value.ndim < 2 or value.shape[-1] != value.shape[-2]:
        return False
    hidden = ~value if value.dtype == torch.bool else value <= -1e4
    later = torch.ones(value.shape[-2:], dtype=torch.bool, device=value.device).triu(1)
    return bool(hidden[..., later].all()) and not bool(hidden[..., ~later].all())


def _constant(analysis: TokenAnalysis, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    """The node's real value; everything that it depends on is a parameter, a buffer, or made of sizes."""
    if node in known:
        return known[node]
    facts = analysis[node]
    if node.op == "get_attr":
        value = attribute(analysis.module, str(node.target))
        known[node] = value.detach() if isinstance(value, Tensor) else value
        return known[node]
    if not tensors_in(facts.value):
        return facts.value
    inputs: Any = fx.node.map_arg(
        (node.args, node.kwargs), lambda argument: _constant(analysis, argument, known)
    )
    args, kwargs = inputs
    with torch.no_grad():
        known[node] = callee(node, analysis.module.get_submodule)(*args, **kwargs)
    return known[node]
