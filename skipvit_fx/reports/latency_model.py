"""Time from work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LatencyModel:
    """Time from work, by two constants of one machine.

    The roofline model (Williams, Waterman, Patterson 2009), with each operator on its usual side in a transformer:
    matrix products are bound by arithmetic, all others by memory. The fixed cost of calling an operator is not
    included, so small batches on fast devices take longer than predicted.

    Attributes:
        seconds_per_mac: for matrix products, convolutions and attention products.
        seconds_per_byte: for bytes read or written by the other operators.
    """

    seconds_per_mac: float
    seconds_per_byte: float

    def seconds(self, macs: float, bytes_: float) -> float:
        """The predicted time for this many multiply-adds and bytes."""
        return macs * self.seconds_per_mac + bytes_ * self.seconds_per_byte

    @classmethod
    def fitted(
        cls, macs: Sequence[float], bytes_: Sequence[float], seconds: Sequence[float]
    ) -> LatencyModel:
        """The non-negative constants that fit measured times best, by least squares."""
        work = torch.tensor([macs, bytes_], dtype=torch.float64, device="cpu").T
        time = torch.tensor(seconds, dtype=torch.float64, device="cpu")
        scale = work.amax(0).clamp(min=1)
        work = work / scale
        found = torch.linalg.lstsq(work, time[:, None]).solution[:, 0]
        if torch.linalg.matrix_rank(work) < 2 or bool((found < 0).any()):
            # the times do not tell the two apart, or the best fit has one of them at zero
            alone = (work.T @ time) / work.square().sum(0).clamp(min=1e-300)
            found = min(torch.diag(alone), key=lambda c: float((work @ c - time).square().sum()))
        per_mac, per_byte = (found / scale).tolist()
        return cls(per_mac, per_byte)
