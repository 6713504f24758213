"""The arguments of one example call, by the names that the model gives them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

from skipvit_fx.torch_internals import pytree

Place = int | str
"""Where a call passes an argument: a position, or a keyword."""

StandIn = Callable[[str, Any], Any]
"""Maps the name of a placeholder and an example value to what stands for it in a graph."""


class LiveInt(int):
    """An integer that a graph takes as an input, rather than having it built in."""


class LiveFloat(float):
    """The same for a float."""


LIVE = (LiveInt, LiveFloat)


def live(value: float) -> LiveInt | LiveFloat:
    """A number that is to be an input of a graph."""
    return LiveInt(value) if isinstance(value, int) else LiveFloat(value)


def _is_taken(leaf: Any) -> bool:
    """Whether a graph takes this value as an input."""
    return isinstance(leaf, (Tensor, *LIVE))


class Inputs:
    """The arguments that an example call passes to a forward; the other parameters keep their defaults.

    Args:
        forward: a bound method.
        args, kwargs: of the call.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> None:
        self._bound = inspect.signature(forward).bind(*args, **kwargs)

    @property
    def args(self) -> tuple[Any, ...]:
        """What can be passed by position, in the order of the signature."""
        return self._bound.args

    @property
    def kwargs(self) -> dict[str, Any]:
        """What must be passed by keyword, in the order of the signature."""
        return self._bound.kwargs

    def with_stand_ins(self, stand_in: StandIn) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments, with what ``stand_in`` returns in place of those that hold tensors or live numbers.

        Returns:
            Positional and keyword arguments.
        """
        values: dict[Any, Any] = {**dict(enumerate(self.args)), **self.kwargs}
        for name, place in places_of(self._bound.signature, self.args, self.kwargs).items():
            if any(map(_is_taken, pytree.tree_leaves(values[place]))):
                values[place] = stand_in(name, values[place])
        return tuple(values[i] for i in range(len(self.args))), {k: values[k] for k in self.kwargs}

    def taken(self) -> dict[str, Any]:
        """Every argument that a graph takes as input, by the name of its placeholder, in the order of the signature."""
        found: dict[str, Any] = {}
        self.with_stand_ins(found.__setitem__)
        return found

    @property
    def built_in(self) -> dict[str, Any]:
        """The other arguments of the call, by name of the parameter."""
        variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        taken = self.taken()
        kinds = {name: p.kind for name, p in self._bound.signature.parameters.items()}
        named = {k: v for k, v in self._bound.arguments.items() if kinds[k] not in variable}
        return {name: v for name, v in {**named, **self.kwargs}.items() if name not in taken}

    @property
    def defaults(self) -> dict[str, Any]:
        """The defaults of the parameters that the call leaves out, by name."""
        return {
            name: parameter.default
            for name, parameter in self._bound.signature.parameters.items()
            if parameter.default is not parameter.empty and name not in self._bound.arguments
        }

    def by_parameter(self, leaf: Callable[[Any], Any]) -> dict[str, Any]:
        """``leaf`` applied to every leaf of the arguments, by the name of the parameter that takes them."""
        return {name: pytree.tree_map(leaf, v) for name, v in self._bound.arguments.items()}

    def several_samples(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments, with the sample duplicated if there is only one."""
        args, kwargs = pytree.tree_map(_several, (self.args, self.kwargs))
        return args, kwargs


def places_of(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: Iterable[str]
) -> dict[str, Place]:
    """Where each argument is, by the name of its placeholder: that of the parameter, or a numbered one for ``*args``.

    Raises:
        TypeError: for arguments that the function itself would not take.
    """
    bound = signature.bind(*range(len(args)), **{name: name for name in kwargs})
    places: dict[str, Place] = {}
    for name, place in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            places |= {f"{name}_{i}": at for i, at in enumerate(place)}
        elif kind is inspect.Parameter.VAR_KEYWORD:
            places |= place
        else:
            places[name] = place
    return places


def _several(leaf: Any) -> Any:
    alone = isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == 1
    return torch.cat([leaf, leaf]) if alone else leaf


def parts_of(example: Any, whole: Proxy) -> Any:
    """``example`` with every tensor in it replaced by the part of ``whole`` at the same place."""

    def part(path: tuple[Any, ...], leaf: Any) -> Any:
        if not _is_taken(leaf):
            return leaf
        value: Any = whole
        for key in path:
            if isinstance(key, pytree.GetAttrKey):
                value = getattr(value, key.name)
            else:
                value = value[key.key if isinstance(key, pytree.MappingKey) else key.idx]
        return value

    return pytree.tree_map_with_path(part, example)
