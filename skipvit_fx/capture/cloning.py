"""Copies of a module's structure that share its tensors."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any, TypeVar

from torch import Tensor, nn

from skipvit_fx.author.code import AuthorError, author_code
from skipvit_fx.author.nested import nested
from skipvit_fx.capture.fakes import TracelessFakeMode
from skipvit_fx.errors import TraceError
from skipvit_fx.graph.module import SkipViTModule

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def clone_structure(model: ModuleT) -> ModuleT:
    """Copy every module object of ``model``; parameters and buffers are the very same objects.

    The copy can be traced, switched between train and eval, or given caches without affecting the original.
    """
    shared: dict[int, Any] = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return _deepcopy(model, shared)


def copy_to_trace(model: ModuleT) -> ModuleT:
    """The same, but with new parameters in the same memory and without gradients.

    This is for tools that read a parameter's gradient, which another thread may be about to free.
    """
    known: dict[int, Any] = {id(b): b for b in model.buffers()}
    for parameter in model.parameters():
        plain = type(parameter) is nn.Parameter and not parameter.is_inference()
        twin = nn.Parameter(parameter.detach(), parameter.requires_grad) if plain else parameter
        known[id(parameter)] = twin
    return _deepcopy(model, known)


def scratch_copy(model: nn.Module) -> nn.Module:
    """Copy every module object of ``model``, to be run and thrown away: changes that a module makes to itself are lost.

    Parameters are the very same objects. Buffers, which a module may write into, are copies. The copy of a rewritten
    model has its children and tensors, and no graph.
    """
    known: dict[int, Any] = {id(p): p for p in model.parameters()}
    known |= {id(b): b.detach().clone() for b in model.buffers()}
    return _deepcopy(_owner(model), known)


def fake_structure(model: nn.Module, mode: TracelessFakeMode) -> nn.Module:
    """Copy every module object below ``model`` with fake tensors in place of parameters and buffers.

    The copy of a rewritten model has its children and tensors, and no graph.
    """
    fakes: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        twin = mode.twin(tensor)
        is_parameter = isinstance(tensor, nn.Parameter)
        fakes[id(tensor)] = nn.Parameter(twin, False) if is_parameter else twin.detach()
    return _deepcopy(_owner(model), fakes)


def _owner(model: nn.Module) -> nn.Module:
    """``model``, or for a rewritten model a module that has its children and tensors and no graph."""
    if not isinstance(model, SkipViTModule):
        return model
    owner = nn.Module()
    for name in ("_modules", "_parameters", "_buffers"):
        setattr(owner, name, getattr(model, name))
    return owner


def _deepcopy(model: ModuleT, known: dict[int, Any]) -> ModuleT:
    """``copy.deepcopy``, without looking into the many empty tables of hooks, which would take most of the time.

    Tensors that an earlier call left with their autograd graph are copied without it.

    Raises:
        TraceError: something in the model cannot be copied; names the attribute.
    """
    for module in model.modules():
        for value in vars(module).values():
            if type(value) is OrderedDict and not value:
                known[id(value)] = OrderedDict()
            for part in nested(value):
                if isinstance(part, Tensor) and not part.is_leaf:
                    known[id(part)] = part.detach()
    tensors = dict(known)
    try:
        with author_code():
            return copy.deepcopy(model, known)
    except AuthorError as error:
        place = f" (attribute {name!r})" if (name := _not_copied(model, tensors)) else ""
        raise TraceError(
            f"the model cannot be copied: {error.message}{place}",
            hint="the rewrite works on copies of its modules; give what cannot be copied a __deepcopy__, or keep it "
            "outside the model",
        ) from error


def _not_copied(model: nn.Module, known: dict[int, Any]) -> str:
    """The attribute that cannot be copied, as a dotted path; empty if it is a module as a whole."""
    known |= {id(module): module for module in model.modules()}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            try:
                with author_code():
                    copy.deepcopy(value, dict(known))
            except AuthorError:
                return f"{path}.{name}".removeprefix(".")
    return ""
