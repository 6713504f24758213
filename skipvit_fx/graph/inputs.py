"""The arguments of one example call, by the names that the model gives them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

from skipvit_fx.torch_internals import pytree

Place = Callable[[str, Any], Any]
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

    def placed(self, place: Place) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments, with those that hold tensors or live numbers replaced by what ``place`` returns for them.

        Returns:
            Positional and keyword arguments.
        """
        parameters = self._bound.signature.parameters.values()
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        count = len(self.args)
        for parameter in parameters:
            if parameter.name not in self._bound.arguments:
                continue
            value = self._bound.arguments[parameter.name]
            if parameter.kind is parameter.VAR_POSITIONAL:
                args += [_place(place, f"{parameter.name}_{i}", v) for i, v in enumerate(value)]
            elif parameter.kind is parameter.VAR_KEYWORD:
                kwargs |= {name: _place(place, name, v) for name, v in value.items()}
            elif len(args) < count and parameter.kind is not parameter.KEYWORD_ONLY:
                args.append(_place(place, parameter.name, value))
            else:
                kwargs[parameter.name] = _place(place, parameter.name, value)
        return tuple(args), kwargs

    def taken(self) -> dict[str, Any]:
        """Every argument that a graph takes as input, by the name of its placeholder, in the order of the signature."""
        found: dict[str, Any] = {}
        self.placed(found.__setitem__)
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


def _place(place: Place, name: str, value: Any) -> Any:
    return place(name, value) if any(map(_is_taken, pytree.tree_leaves(value))) else value


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
