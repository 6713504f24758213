"""A shape that is put together of sizes."""

from __future__ import annotations

from skipvit_fx.ops.following import recorded


@recorded
def as_shape(*sizes: int) -> tuple[int, ...]:
    """All sizes as one value, for an operator of Python's: in a plain tuple it would ask a tracer for an answer."""
    return sizes
