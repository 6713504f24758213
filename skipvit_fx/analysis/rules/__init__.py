"""How every known ATen operator treats the token axis. Operators that are not listed count as mixing tokens.

A rule takes the operator's call and returns the axes of its outputs, or raises :class:`MixesTokens`. Rules are only
applied if some argument has a token axis. They see operators as PyTorch dispatches them, after ``linear``, ``einsum``,
``matmul`` and the like were decomposed, so the list is short and closed.
"""

from __future__ import annotations

from typing import Any

import torch

from skipvit_fx.analysis.rules import dimension, products, shape  # noqa: F401 - they register their rules
from skipvit_fx.analysis.rules.attention import attend
from skipvit_fx.analysis.rules.call import RULES, Call, Position, Rule
from skipvit_fx.analysis.rules.pointwise import pointwise

__all__ = ["Call", "Position", "attend", "find_rule"]


def find_rule(func: Any) -> Rule | None:
    """The rule of an operator overload; operators that PyTorch tags as pointwise share one."""
    known = RULES.get(func.overloadpacket)
    if known is None and torch.Tag.pointwise in func.tags:
        return pointwise
    return known
