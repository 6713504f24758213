"""A shape built from sizes."""

from __future__ import annotations

from skipvit_fx.ops.following import recorded


@recorded
def as_shape(*sizes: int) -> tuple[int, ...]:
    """All sizes as one value for a Python operator, for which a plain tuple would need concrete values in tracing."""
    return sizes
