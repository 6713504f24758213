"""Copies of a module's structure that share its tensors."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from skipvit_fx.ir.module import SkipViTModule

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def clone_structure(model: ModuleT) -> ModuleT:
    """Copy every module object of ``model``; parameters and buffers are the very same objects.

    The copy can be traced, switched between train and eval, or given caches without the original noticing.
    """
    shared: dict[int, Any] = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, shared)


def fake_structure(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """Copy every module object below ``model`` with fake tensors in place of parameters and buffers.

    The copy of a rewritten model has its children and tensors, and no graph.
    """
    fakes: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        fake = mode.from_tensor(tensor.detach(), static_shapes=True)
        is_parameter = isinstance(tensor, nn.Parameter)
        fakes[id(tensor)] = nn.Parameter(fake, requires_grad=False) if is_parameter else fake
    if not isinstance(model, SkipViTModule):
        return copy.deepcopy(model, fakes)
    owner = nn.Module()
    for name in ("_modules", "_parameters", "_buffers"):
        setattr(owner, name, getattr(model, name))
    return copy.deepcopy(owner, fakes)
