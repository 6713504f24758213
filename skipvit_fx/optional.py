"""Packages that only some functions need."""

from __future__ import annotations

import importlib
from types import ModuleType

from skipvit_fx.errors import SkipViTError


def need(module: str, extra: str, error: type[SkipViTError] = SkipViTError) -> ModuleType:
    """Import an optional package.

    Args:
        module: its name, or that of a module in it.
        extra: the extra of this package that installs it; empty if none does.
        error: what is raised if it is not installed. The hint says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as missing:
        if missing.name != module.partition(".")[0]:
            raise
        how = f"pip install 'skipvit_fx[{extra}]'" if extra else f"pip install {missing.name}"
        raise error(f"{missing.name} is not installed", hint=how) from missing
