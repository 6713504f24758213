"""What a model returns keeps its class."""

from __future__ import annotations

from typing import Any

from torch.fx.proxy import TracerBase


class KeepsOutputClass(TracerBase):
    """A tracer under which an output class that is also a dict stays one, and is built by the graph."""

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, dict) and type(a) is not dict:
            fields = {str(k): self.create_arg(v) for k, v in a.items()}
            return self.create_node("call_function", type(a), (), fields)
        return super().create_arg(a)
