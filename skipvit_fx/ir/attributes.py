"""Plain attributes that a forward changes: a graph reads them once, when it is traced."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from skipvit_fx.errors import TraceError

_CONSTANT = "_tensor_constant"
"""What tracers call the tensors that they meet; they keep them in the root."""

_OF_EVERY_MODULE = frozenset(vars(nn.Module())) | {"forward"}
_COMPARED = (bool, int, float, str)

Place = tuple[str, str]
"""The path of a module and the name of an attribute."""


def watch_attributes(root: nn.Module, paths: frozenset[str]) -> dict[Place, Any]:
    """Replace the forward of ``root``. Calling it fills what is returned.

    Args:
        root: a structural clone that nobody else uses.
        paths: of the modules to watch.

    Returns:
        What the plain attributes are that every call changes: to be read after a call.

    Raises:
        TraceError: in the call, if it assigns another tensor to a parameter or buffer.
    """
    changed: dict[Place, Any] = {}
    forward = root.forward

    @functools.wraps(forward)
    def watched(*args: Any, **kwargs: Any) -> Any:
        attributes, state = dict(_attributes(root, paths)), dict(_state(root, paths))
        result = forward(*args, **kwargs)
        for place, tensor in _state(root, paths):
            if tensor is not state.get(place):
                raise TraceError(
                    f"the model replaces its own state, {_spelled([place])}, in a module that runs attention",
                    hint="keep state that changes in a module of its own",
                )
        for place, now in _attributes(root, paths):
            if not _same(attributes.get(place), now):
                changed[place] = vars(root.get_submodule(place[0]))[place[1]]
        return result

    root.forward = watched
    return changed


def _attributes(root: nn.Module, paths: frozenset[str]) -> Iterator[tuple[Place, Any]]:
    for path in sorted(paths):
        for name, value in vars(root.get_submodule(path)).items():
            if name not in _OF_EVERY_MODULE and not name.startswith(_CONSTANT):
                yield (path, name), pytree.tree_flatten(value)  # so that a list may change


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


def of_one_call(value: Any) -> bool:
    """Whether an attribute holds what was seen while tracing, and means nothing afterwards."""
    traced = (fx.Proxy, FakeTensor, torch.SymInt)
    return any(isinstance(leaf, traced) for leaf in pytree.tree_leaves(value))


def warn_of_kept(changed: dict[Place, Any]) -> None:
    """Say that modules keep tensors of every call."""
    places = [
        place for place, value in changed.items() if any(map(_is_tensor, pytree.tree_leaves(value)))
    ]
    if places:
        warnings.warn(
            f"the model keeps {_spelled(places)} of every call; the rewritten model does not, while it skips",
            stacklevel=2,
        )


def _is_tensor(leaf: Any) -> bool:
    if isinstance(leaf, fx.Proxy):
        tracer: Any = leaf.tracer
        leaf = tracer.example(leaf.node)
    return isinstance(leaf, FakeTensor)


def same_graph(one: tuple[fx.Graph, nn.Module], other: tuple[fx.Graph, nn.Module]) -> bool:
    """Whether two traces show the same, constants that lie in the roots included."""
    return str(one[0]) == str(other[0]) and all(
        torch.equal(a, b) for a, b in zip(_constants(*one), _constants(*other), strict=True)
    )


def _constants(graph: fx.Graph, root: nn.Module) -> list[Tensor]:
    names = [str(node.target) for node in graph.nodes if node.op == "get_attr"]
    return [getattr(root, name) for name in names if name.startswith(_CONSTANT)]


def refuse_memory(places: list[Place]) -> TraceError:
    """For a model whose second call differs from its first."""
    return TraceError(
        f"the model computes another thing in its second call than in its first, by what it keeps: {_spelled(places)}",
        hint="a graph reads plain attributes once; keep what changes in a module that runs no attention",
    )


def _spelled(places: list[Place]) -> str:
    return ", ".join(f"{path}.{name}".removeprefix(".") for path, name in places)
