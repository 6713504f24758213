"""Torch's global random generators while a model really runs: the same numbers in every run, and no trace left."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from skipvit_fx.author.this_thread import during, here
from skipvit_fx.torch_internals import TorchDispatchMode, schema_arguments


class GeneratorStates:
    """The current states of torch's global generators, on the CPU and on ``devices``.

    They are shared by all threads, so they are set only if there is no other thread, or if this one drew.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self.devices = tuple(devices)
        self.drew = False
        self._owners = [(torch, ()), *map(_owner, self.devices)]
        self._states = self._now()

    def _now(self) -> list[Any]:
        return [owner.get_rng_state(*where) for owner, where in self._owners]

    def restore(self) -> None:
        """Set the generators to these states, and reset this thread's generators of Python and numpy."""
        here.python, here.numpy = random.Random(0), None
        if not self.drew and (threading.active_count() > 1 or self.are_unchanged()):
            return
        with during(""):
            for (owner, where), state in zip(self._owners, self._states, strict=True):
                owner.set_rng_state(state, *where)

    def are_unchanged(self) -> bool:
        """Whether nothing has been drawn since."""
        return all(map(torch.equal, self._states, self._now()))


def _owner(device: torch.device) -> tuple[Any, tuple[Any, ...]]:
    """The module that has the generator of a device, and the arguments that name the device."""
    if device.type == "cpu":
        return torch, ()
    return torch.get_device_module(device), () if device.type == "mps" else (device,)


@contextlib.contextmanager
def generators_kept(devices: Iterable[torch.device]) -> Iterator[GeneratorStates]:
    """Restore the generators on leaving, whatever this thread draws within; yields the states.

    It must be entered while Python's and numpy's functions are replaced:
    :func:`skipvit_fx.author.side_effects.contained`.
    """
    states = GeneratorStates(devices)
    alone = threading.active_count() == 1
    try:
        with contextlib.nullcontext() if alone else _NoteDraws(states):
            yield states
    finally:
        states.restore()


class _NoteDraws(TorchDispatchMode):
    """Notes draws of this thread by its operators, as a generator's state does not show which thread drew."""

    def __init__(self, states: GeneratorStates) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._states = states

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags and kwargs.get("generator") is None:
            names = [argument.name for argument in schema_arguments(func)]
            given = dict(zip(names, args, strict=False)) | kwargs
            idle = "dropout_p" in names and not given.get("dropout_p")  # an attention
            self._states.drew |= not idle
        return func(*args, **kwargs)
