"""Copies of a module's structure that share its tensors."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any, TypeVar

from torch import Tensor, nn

from skipvit_fx.ir.fakes import TracelessFakeMode
from skipvit_fx.ir.module import SkipViTModule
from skipvit_fx.ir.nested import nested

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def clone_structure(model: ModuleT) -> ModuleT:
    """Copy every module object of ``model``; parameters and buffers are the very same objects.

    The copy can be traced, switched between train and eval, or given caches without the original noticing.
    """
    shared: dict[int, Any] = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return _deepcopy(model, shared)


def fake_structure(model: nn.Module, mode: TracelessFakeMode) -> nn.Module:
    """Copy every module object below ``model`` with fake tensors in place of parameters and buffers.

    The copy of a rewritten model has its children and tensors, and no graph.
    """
    fakes: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        twin = mode.twin(tensor)
        is_parameter = isinstance(tensor, nn.Parameter)
        fakes[id(tensor)] = nn.Parameter(twin, False) if is_parameter else twin.detach()
    if not isinstance(model, SkipViTModule):
        return _deepcopy(model, fakes)
    owner = nn.Module()
    for name in ("_modules", "_parameters", "_buffers"):
        setattr(owner, name, getattr(model, name))
    return _deepcopy(owner, fakes)


def _deepcopy(model: ModuleT, known: dict[int, Any]) -> ModuleT:
    """``copy.deepcopy`` that need not look into the many empty tables of hooks, which take it most of its time.

    It takes tensors that an earlier call left, with the graph of their gradients, without that.
    """
    for module in model.modules():
        for value in vars(module).values():
            if type(value) is OrderedDict and not value:
                known[id(value)] = OrderedDict()
            for part in nested(value):
                if isinstance(part, Tensor) and not part.is_leaf:
                    known[id(part)] = part.detach()
    return copy.deepcopy(model, known)
