"""The global random generators: their states as a value, to draw the same again and to leave no trace."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch


class GeneratorStates:
    """The states of Python's, numpy's and torch's global generators, on the CPU and on ``devices``, as they are now."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self.devices = tuple(devices)
        self._python = random.getstate()
        self._cpu = torch.get_rng_state()
        self._others = [
            (owner, where, owner.get_rng_state(*where))
            for owner, where in map(_owner, self.devices)
        ]
        numpy = sys.modules.get("numpy")
        self._numpy = None if numpy is None else numpy.random.get_state()

    def restore(self) -> None:
        """Set the generators to these states."""
        random.setstate(self._python)
        torch.set_rng_state(self._cpu)
        for owner, where, state in self._others:
            owner.set_rng_state(state, *where)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)

    def are_unchanged(self) -> bool:
        """Whether nothing was drawn since."""
        now = GeneratorStates(self.devices)
        pairs = zip(self._others, now._others, strict=True)
        same = torch.equal(self._cpu, now._cpu) and self._python == now._python
        same = same and all(torch.equal(a[-1], b[-1]) for a, b in pairs)
        return same and repr(self._numpy) == repr(now._numpy)


def _owner(device: torch.device) -> tuple[Any, tuple[Any, ...]]:
    """What has the generator of a device, and how it is told which device."""
    if device.type == "cpu":
        return torch, ()
    return torch.get_device_module(device), () if device.type == "mps" else (device,)


@contextlib.contextmanager
def generators_kept(devices: Iterable[torch.device]) -> Iterator[GeneratorStates]:
    """Whatever is drawn within, the generators are afterwards as they were before; these states are yielded."""
    states = GeneratorStates(devices)
    try:
        yield states
    finally:
        states.restore()
