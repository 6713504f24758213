"""The switch of a rewritten model."""

from __future__ import annotations

from torch import nn


class Switchable(nn.Module):
    """A module that does nothing while ``enabled`` is false: the graph then computes exactly what the model does.

    A score that is switched off returns ``None``, and every other inserted module passes its input through if it is
    given ``None``. So only a few modules are switchable, and switching them changes no graph.

    Attributes:
        enabled: the switch that :func:`skipvit_fx.set_skipping` sets.
        train_only: do nothing in eval mode, whatever the switch says.
    """

    enabled: bool = True
    train_only: bool = False

    @property
    def active(self) -> bool:
        """Whether it is on in the current mode."""
        return self.enabled and (self.training or not self.train_only)


def switches(module: nn.Module) -> list[Switchable]:
    """The switchable modules in ``module``."""
    return [part for part in module.modules() if isinstance(part, Switchable)]
