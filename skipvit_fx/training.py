"""When skipping starts, and how fast it increases."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

from torch import nn

from skipvit_fx.api import check_rewritten, set_skipping, set_train_only
from skipvit_fx.arguments import check_flag
from skipvit_fx.errors import PlanError
from skipvit_fx.ops.select import Amount

_STEPS = 1000
"""The share of an amount that applies is rounded to this many steps, so that ratios stay small exact fractions."""


class SkipSchedule:
    """Turns skipping on after a warm-up, at once or step by step. Epochs count from 0.

    In the SkipViT paper the first 15 epochs see every token ("Effect of Warm-up On Patch Detection"). EViT also lowers
    the keep rate along a cosine afterwards; ``ramp_epochs`` does the same with every amount a of the plan, once per
    epoch: ``a * (1 - cos(pi * (epoch - warmup_epochs) / ramp_epochs)) / 2``.

    The graph never changes. A compiled module compiles once more whenever a step changes how many tokens leave; a long
    ramp needs a sufficient ``torch._dynamo.config.recompile_limit``.

    Args:
        fast: what :func:`skipvit_fx.rewrite` returned, or anything that wraps it: DDP, FSDP2, a compiled module, an
            average of weights. If wrapping copies, as an average does, wrap first; each copy has its own schedule.
        warmup_epochs: epochs without skipping.
        ramp_epochs: epochs after these in which the amounts rise to the plan's; with 0, they apply at once.
        train_only: skip only while training, see :func:`skipvit_fx.rewrite`; ``None`` keeps the setting of the rewrite.

    Raises:
        PlanError: a number of epochs is not an integer of at least 0, or ``train_only`` is not a bool.
        NotRewrittenError: there is no rewritten model in ``fast``.
    """

    def __init__(
        self,
        fast: nn.Module,
        warmup_epochs: int = 15,
        *,
        ramp_epochs: int = 0,
        train_only: bool | None = None,
    ) -> None:
        check_rewritten(fast)
        self.fast = fast
        self.warmup_epochs = _count("warmup_epochs", warmup_epochs)
        self.ramp_epochs = _count("ramp_epochs", ramp_epochs)
        if train_only is not None:
            check_flag("train_only", train_only)
            set_train_only(fast, train_only)
        self.step(0)

    def share(self, epoch: int) -> Fraction:
        """The part of every amount that applies in an epoch, from 0 to 1."""
        since = _count("epoch", epoch) - self.warmup_epochs
        if since < 0:
            return Fraction(0)
        if since >= self.ramp_epochs:
            return Fraction(1)
        return Fraction(
            round(_STEPS * (1 - math.cos(math.pi * since / self.ramp_epochs)) / 2), _STEPS
        )

    def step(self, epoch: int) -> None:
        """Set ``fast`` to what an epoch trains with. Call it before the epoch; epochs may come in any order.

        Raises:
            PlanError: ``epoch`` is not an integer of at least 0.
        """
        share = self.share(epoch)
        self.epoch = epoch
        set_skipping(self.fast, share > 0)
        for module in self.fast.modules():
            if isinstance(module, Amount):
                module.current = _part(module.amount, share)

    def state_dict(self) -> dict[str, int]:
        """The epoch and the numbers of epochs: plain integers for a checkpoint."""
        return {
            "epoch": self.epoch,
            "warmup_epochs": self.warmup_epochs,
            "ramp_epochs": self.ramp_epochs,
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue as the schedule that :meth:`state_dict` was taken from, and set ``fast`` to its epoch.

        Raises:
            PlanError: the state is not one that :meth:`state_dict` returned.
        """
        if set(state) != set(self.state_dict()):
            raise PlanError(
                f"the state of a schedule must hold {', '.join(self.state_dict())}, got {', '.join(state) or 'none'}",
                hint="pass what state_dict() of a SkipSchedule returned",
            )
        numbers = {name: _count(name, value) for name, value in state.items()}
        self.warmup_epochs = numbers["warmup_epochs"]
        self.ramp_epochs = numbers["ramp_epochs"]
        self.step(numbers["epoch"])


def _part(amount: Fraction | int, share: Fraction) -> Fraction | int:
    """A share of an amount: of a number of tokens, a whole one."""
    part = amount * share
    return part if isinstance(amount, Fraction) else math.floor(part)


def _count(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise PlanError(
            f"{name}={value!r} is not a number of epochs", hint="pass an integer of at least 0"
        )
    return value
