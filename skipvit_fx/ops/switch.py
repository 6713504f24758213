"""The one switch of a rewritten model."""

from __future__ import annotations

from torch import nn


class Switchable(nn.Module):
    """A module that steps aside while ``enabled`` is false: the graph then computes exactly what the model does.

    A score that steps aside returns ``None``, and every other inserted module passes its input through where it
    is handed ``None``. So few modules are switchable, and no graph changes when they are switched.

    Attributes:
        enabled: the switch that :func:`skipvit_fx.set_skipping` turns.
        train_only: step aside in eval mode too, whatever the switch says.
    """

    enabled: bool = True
    train_only: bool = False

    @property
    def active(self) -> bool:
        """Whether it does its work in the mode that it is in."""
        return self.enabled and (self.training or not self.train_only)
