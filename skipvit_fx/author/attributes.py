"""Plain attributes that a forward changes and a graph does not."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from torch import fx, nn

from skipvit_fx.errors import TraceError
from skipvit_fx.torch_internals import FakeTensor, buffers_of, parameters_of, pytree

CONSTANT = "_tensor_constant"
"""Prefix of the names of constants that tracers store in the root."""

_OF_EVERY_MODULE = frozenset(vars(nn.Module())) | {"forward"}
_COMPARED = (bool, int, float, str)

Attribute = tuple[str, str]
"""The path of a module and the name of an attribute."""


def watch_attributes(root: nn.Module, paths: frozenset[str]) -> dict[Attribute, Any]:
    """Replace the forward of ``root``. Each call fills the returned dict.

    Args:
        root: a structural clone that nothing else uses.
        paths: paths of the modules to watch.

    Returns:
        The plain attributes that the last call changed, with their new values.

    Raises:
        TraceError: in the call, if it assigns another tensor to a parameter or buffer.
    """
    changes: dict[Attribute, Any] = {}
    forward = root.forward

    @functools.wraps(forward)
    def watched(*args: Any, **kwargs: Any) -> Any:
        changes.clear()
        leaves = dict(_leaves(root, paths))
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
                changes[place] = after[place]
        return result

    root.forward = watched
    return changes


def _attributes(root: nn.Module, paths: frozenset[str]) -> Iterator[tuple[Attribute, Any]]:
    for path in sorted(paths):
        for name, value in vars(root.get_submodule(path)).items():
            if name not in _OF_EVERY_MODULE and not name.startswith(CONSTANT):
                yield (path, name), value


def _leaves(root: nn.Module, paths: frozenset[str]) -> Iterator[tuple[Attribute, Any]]:
    """The attributes as leaves, so that a list that grows counts as changed."""
    for place, value in _attributes(root, paths):
        yield place, pytree.tree_flatten(value)


def _state(root: nn.Module, paths: frozenset[str]) -> Iterator[tuple[Attribute, Any]]:
    for path in sorted(paths):
        module = root.get_submodule(path)
        for name, tensor in {**parameters_of(module), **buffers_of(module)}.items():
            yield (path, name), tensor


def _same(before: Any, now: Any) -> bool:
    if before is None or before[1] != now[1]:
        return False
    pairs = zip(before[0], now[0], strict=True)
    return all(
        a is b or (type(a) is type(b) and isinstance(a, _COMPARED) and a == b) for a, b in pairs
    )


def kept_of_a_call(changes: Mapping[Attribute, Any]) -> list[Attribute]:
    """Where modules keep tensors of the call that was just traced."""
    return [
        place for place, now in changes.items() if any(map(_is_activation, pytree.tree_leaves(now)))
    ]


def warn_of_kept(places: list[Attribute]) -> None:
    """Warn that modules keep tensors of every call."""
    if places:
        warnings.warn(
            f"the model keeps {_spelled(places)} of every call; the rewritten model does not while it skips",
            stacklevel=2,
        )


def _is_activation(leaf: Any) -> bool:
    if not isinstance(leaf, fx.Proxy) or leaf.node.op == "get_attr":
        return False  # torch.export issues its own warnings
    tracer: Any = leaf.tracer
    return isinstance(tracer.example(leaf.node), FakeTensor)


def _spelled(places: list[Attribute]) -> str:
    return ", ".join(f"{path}.{name}".removeprefix(".") for path, name in places)
