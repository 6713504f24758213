"""The one switch of a rewritten model."""

from __future__ import annotations

from torch import nn


class Switchable(nn.Module):
    """A module that steps aside while ``enabled`` is false: the graph then computes exactly what the model does.

    A score that steps aside returns ``None``, and every other inserted module passes its input through where it
    is handed ``None``. So few modules are switchable, and no graph changes when they are switched.
    """

    enabled: bool = True
