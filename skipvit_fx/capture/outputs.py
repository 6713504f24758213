"""Keeps the class of a model's output."""

from __future__ import annotations

from typing import Any

from torch.fx.proxy import TracerBase


class KeepsOutputClass(TracerBase):
    """A tracer that keeps an output class derived from dict, and lets the graph build it."""

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, dict) and type(a) is not dict:
            fields = {str(k): self.create_arg(v) for k, v in a.items()}
            return self.create_node("call_function", type(a), (), fields)
        return super().create_arg(a)
