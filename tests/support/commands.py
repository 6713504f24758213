"""The command line as tests call it: commands that ask for the same look at a model, or the same rewrite, share it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest
from torch import nn

import skipvit_fx

_made: dict[tuple[str, str], Any] = {}


def share_rewrites(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of models that are built alike, whatever their weights. What is refused is refused anew."""
    for name in ("rewrite", "find_attention"):
        monkeypatch.setattr(skipvit_fx, name, _shared(getattr(skipvit_fx, name)))


def _shared(make: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(make)
    def shared(*args: Any, **kwargs: Any) -> Any:
        asked = make.__name__, str((args, kwargs))
        if asked not in _made:
            _made[asked] = make(*args, **kwargs)
        made = _made[asked]
        return copy.deepcopy(made) if isinstance(made, nn.Module) else made

    return shared
