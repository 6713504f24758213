"""Copies of a module's structure that share its tensors."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def clone_structure(model: ModuleT) -> ModuleT:
    """Copy every module object of ``model``; parameters and buffers are the very same objects.

    The copy can be traced, switched between train and eval, or given caches without the original noticing.
    """
    shared: dict[int, Any] = {id(t): t for t in model.parameters()}
    shared.update((id(t), t) for t in model.buffers())
    return copy.deepcopy(model, shared)
