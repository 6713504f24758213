"""Plain attributes that a forward changes: a graph reads them once, when it is traced."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from skipvit_fx.errors import TraceError

CONSTANT = "_tensor_constant"
"""What tracers call the tensors that they meet; they keep them in the root."""

_OF_EVERY_MODULE = frozenset(vars(nn.Module())) | {"forward"}
_COMPARED = (bool, int, float, str)

_MISSING = object()

Place = tuple[str, str]
"""The path of a module and the name of an attribute."""


class Change(NamedTuple):
    """An attribute before and after a call."""

    before: Any
    now: Any


def watch_attributes(root: nn.Module, paths: frozenset[str]) -> dict[Place, Change]:
    """Replace the forward of ``root``. Calling it fills what is returned.

    Args:
        root: a structural clone that nobody else uses.
        paths: of the modules to watch.

    Returns:
        The plain attributes that the last call changed.

    Raises:
        TraceError: in the call, if it assigns another tensor to a parameter or buffer.
    """
    changes: dict[Place, Change] = {}
    forward = root.forward

    @functools.wraps(forward)
    def watched(*args: Any, **kwargs: Any) -> Any:
        changes.clear()
        before, leaves = dict(_attributes(root, paths)), dict(_leaves(root, paths))
        state = dict(_state(root, paths))
        result = forward(*args, **kwargs)
        for place, tensor in _state(root, paths):
            if tensor is not state.get(place):
                raise TraceError(
                    f"the model replaces its own state, {_spelled([place])}, in a module that runs attention",
                    hint="keep state that changes in a module of its own",
                )
        after = dict(_attributes(root, paths))
        for place, now in _leaves(root, paths):
            if not _same(leaves.get(place), now):
                changes[place] = Change(before.get(place, _MISSING), after[place])
        return result

    root.forward = watched
    return changes


def keep_what_is_known(root: nn.Module, changes: Mapping[Place, Change]) -> None:
    """Leave ``root`` as after a call, but for what was seen while tracing, and means nothing afterwards."""
    for (path, name), change in changes.items():
        attributes = vars(root.get_submodule(path))
        attributes[name] = change.before if _of_one_call(change.now) else change.now
        if attributes[name] is _MISSING:
            del attributes[name]


def _attributes(root: nn.Module, paths: frozenset[str]) -> Iterator[tuple[Place, Any]]:
    for path in sorted(paths):
        for name, value in vars(root.get_submodule(path)).items():
            if name not in _OF_EVERY_MODULE and not name.startswith(CONSTANT):
                yield (path, name), value


def _leaves(root: nn.Module, paths: frozenset[str]) -> Iterator[tuple[Place, Any]]:
    """The attributes in parts, so that a list that grows has changed."""
    for place, value in _attributes(root, paths):
        yield place, pytree.tree_flatten(value)


def _state(root: nn.Module, paths: frozenset[str]) -> Iterator[tuple[Place, Any]]:
    for path in sorted(paths):
        module = root.get_submodule(path)
        for name, tensor in {**module._parameters, **module._buffers}.items():
            yield (path, name), tensor


def _same(before: Any, now: Any) -> bool:
    if before is None or before[1] != now[1]:
        return False
    pairs = zip(before[0], now[0], strict=True)
    return all(
        a is b or (type(a) is type(b) and isinstance(a, _COMPARED) and a == b) for a, b in pairs
    )


def _of_one_call(value: Any) -> bool:
    traced = (fx.Proxy, FakeTensor, torch.SymInt)
    return any(isinstance(leaf, traced) for leaf in pytree.tree_leaves(value))


def warn_of_kept(changes: Mapping[Place, Change]) -> None:
    """Say that modules keep tensors of every call."""
    places = [
        place
        for place, change in changes.items()
        if any(map(_is_activation, pytree.tree_leaves(change.now)))
    ]
    if places:
        warnings.warn(
            f"the model keeps {_spelled(places)} of every call; the rewritten model does not, while it skips",
            stacklevel=2,
        )


def _is_activation(leaf: Any) -> bool:
    if not isinstance(leaf, fx.Proxy) or leaf.node.op == "get_attr":
        return False  # torch.export warns of what it sees itself
    tracer: Any = leaf.tracer
    return isinstance(tracer.example(leaf.node), FakeTensor)


def refuse_memory(places: list[Place]) -> TraceError:
    """For a model whose second call differs from its first."""
    return TraceError(
        f"the model computes another thing in its second call than in its first, by what it keeps: {_spelled(places)}",
        hint="a graph reads plain attributes once; keep what changes in a module that runs no attention",
    )


def _spelled(places: list[Place]) -> str:
    return ", ".join(f"{path}.{name}".removeprefix(".") for path, name in places)
