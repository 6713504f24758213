"""Checks of arguments of public calls. Each error names the argument, what it may be, and what it was."""

from __future__ import annotations

from torch import nn

from skipvit_fx.errors import PlanError


def check_model(model: object) -> None:
    """Raise TypeError unless ``model`` is a module, rather than a class, a name or a ``state_dict``."""
    if not isinstance(model, nn.Module):
        given = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise TypeError(f"model must be a torch.nn.Module, got {given}")


def check_flag(name: str, value: object) -> None:
    """Raise PlanError unless ``value`` is a bool: the string ``"False"`` would count as true."""
    if not isinstance(value, bool):
        raise PlanError(
            f"{name} must be True or False, got {value!r}", hint=f"pass {name}=True or {name}=False"
        )


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise PlanError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise PlanError(
            f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}",
            hint=f"pass one of these as {name}",
        )


def check_prefix_tokens(value: object) -> None:
    """Raise PlanError unless ``value`` is a number of tokens, or ``None``."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise PlanError(
            f"prefix_tokens must be an integer of 0 or more, or None, got {value!r}",
            hint="pass the number of leading tokens that are not patches; None finds it",
        )
