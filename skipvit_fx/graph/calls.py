"""The kinds of calls of a rewritten model, and the graph for each."""

from __future__ import annotations

import copy
import functools
import inspect
import linecache
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import PythonCode

from skipvit_fx.author.questions import Recorded
from skipvit_fx.errors import SkipViTError
from skipvit_fx.graph.direct import Direct
from skipvit_fx.graph.inputs import LIVE, Place, live
from skipvit_fx.ops.following import in_jit_trace, quietly, sizes
from skipvit_fx.torch_internals import pytree

_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)
_EMPTY = inspect.Parameter.empty

_SMALL = 4096
"""The largest number of elements of an integer tensor whose values an example keeps."""


class Like(NamedTuple):
    """What a graph assumes of a tensor argument.

    Attributes:
        dtype: of its elements.
        shape: the sizes of all axes except the first, the batch.
        ndim: the number of axes.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    ndim: int


class Nest(NamedTuple):
    """What a graph assumes of a container of tensors and other values."""

    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]


class Number(NamedTuple):
    """What a graph assumes of a number that it takes as an input: only its class."""

    kind: type


def kind_of_argument(value: Any) -> Any:
    """What a graph made for this argument assumes of it.

    A :class:`Like`, a :class:`Nest`, a :class:`Number`, or the value itself.
    """
    if isinstance(value, LIVE):
        return Number(type(value).__base__)  # type: ignore[arg-type]
    if isinstance(value, Tensor):
        return Like(value.dtype, tuple(value.shape[1:]), value.ndim)
    leaves, spec = pytree.tree_flatten(value)
    if len(leaves) == 1 and leaves[0] is value:
        return value
    return Nest(spec, tuple(map(kind_of_argument, leaves)))


def fits(value: Any, kind: Any) -> bool:
    """Whether an argument is of ``kind``, as :func:`kind_of_argument` returned it for another argument."""
    if type(kind) is Like:
        if not isinstance(value, Tensor) or value.dtype != kind.dtype or value.ndim != kind.ndim:
            return False
        return tuple(sizes(value)[1:]) == kind.shape
    if type(kind) is Nest:
        leaves, spec = pytree.tree_flatten(value)
        return spec == kind.spec and all(map(fits, leaves, kind.leaves))
    if type(kind) is Number:
        return type(value) is kind.kind
    return value is kind or (
        isinstance(kind, _PLAIN) and type(value) is type(kind) and bool(value == kind)
    )


@dataclass(eq=False)
class Call:
    """A graph, and the calls that it serves.

    Attributes:
        method: the author's method that it stands for.
        kinds: what it assumes of each argument, by name, except those that a call leaves at their default.
        takes: names of the arguments that the graph takes as inputs; the others are built in.
        graph: of the rewritten computation.
        run: its code, a function that takes the module first.
        example: the positional and keyword arguments that it was made for, without the values of large tensors.
        recorded: what it assumes about gradient recording.
        record: what the rewrite did.
        code: what ``run`` was made from.
        direct: the same, with the called modules looked up in advance; made at the first run.
        at_hand: a model and these modules of it; ``None`` if they have yet to be looked up.
    """

    method: str
    kinds: dict[str, Any]
    takes: tuple[str, ...]
    graph: fx.Graph
    run: Callable[..., Any]
    example: tuple[tuple[Any, ...], dict[str, Any]]
    recorded: Recorded
    record: Any = None
    code: PythonCode | None = None
    direct: Direct | None = None
    at_hand: tuple[Any, list[Any]] | None = None

    def compute(self, model: Any, values: list[Any]) -> Any:
        """What the graph computes from these values in ``model``."""
        if torch.compiler.is_compiling() or in_jit_trace():
            return self.run(model, *values)
        if self.direct is None:
            assert self.code is not None
            self.direct = Direct(self.graph, self.code)
        at_hand = self.at_hand
        if at_hand is None or at_hand[0] is not model:
            at_hand = self.at_hand = model, self.direct.modules_of(model)
        try:
            return self.direct.run(model, at_hand[1], *values)
        except SkipViTError:
            raise
        except Exception as error:
            self._name_line(error, self.direct.run.__code__)
            raise

    def _name_line(self, error: Exception, code: CodeType) -> None:
        """Add to an error of the graph's code which node raised it, and the author's line that made the node."""
        for frame, line in traceback.walk_tb(error.__traceback__):
            if frame.f_code is code:
                name = linecache.getline(code.co_filename, line).partition(" = ")[0].strip()
                made = {node.name: node.stack_trace for node in self.graph.nodes}.get(name)
                if made:
                    error.add_note(f"While executing {name}, which was made by:\n{made}")

    def __deepcopy__(self, memo: dict[int, Any]) -> Call:
        # into the same memo: the module's own graph is that of its first call, also in a copy
        memo |= {id(self.at_hand): None, id(self.code): self.code, id(self.direct): self.direct}
        return Call(**copy.deepcopy(vars(self), memo))

    @property
    def numbers(self) -> set[str]:
        """Names of the numbers that the graph takes as inputs."""
        return {name for name, kind in self.kinds.items() if type(kind) is Number}


class Form(NamedTuple):
    """One way to pass the arguments of a :class:`Call`.

    Attributes:
        args, kwargs: what it assumes of them.
        places: where the graph's inputs are among the arguments.
    """

    call: Call
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    places: tuple[Place, ...]

    def fits(self, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether a call passes its arguments this way."""
        return (
            self.call.method == method
            and len(args) == len(self.args)
            and kwargs.keys() == self.kwargs.keys()
            and all(map(fits, args, self.args))
            and all(fits(kwargs[name], kind) for name, kind in self.kwargs.items())
        )

    def values(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """The arguments that the graph takes, in its order."""
        return [args[p] if isinstance(p, int) else kwargs[p] for p in self.places]


def form_of(call: Call, places: Mapping[str, Place], args: Any, kwargs: Mapping[str, Any]) -> Form:
    """The form of a call whose arguments are at these places."""
    return Form(
        call,
        tuple(map(kind_of_argument, args)),
        {name: kind_of_argument(value) for name, value in kwargs.items()},
        tuple(places[name] for name in call.takes),
    )


def differing_numbers(kinds: Mapping[str, Any], others: Mapping[str, Any]) -> set[str] | None:
    """Names of the numbers in which two calls differ; ``None`` if they differ in anything else."""
    if kinds.keys() != others.keys():
        return None
    found = {name for name in kinds if kinds[name] != others[name]}
    numbers = all(
        type(kinds[name]) in (int, float) and _class_of(kinds[name]) is _class_of(others[name])
        for name in found
    )
    return found if numbers else None


def _class_of(kind: Any) -> Any:
    return kind.kind if type(kind) is Number else type(kind)


def with_live(
    names: Iterable[str], places: Mapping[str, Place], args: tuple[Any, ...], kwargs: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call, with these numbers made live."""
    where = {places[name] for name in names}
    return (
        tuple(live(value) if i in where else value for i, value in enumerate(args)),
        {name: live(value) if name in where else value for name, value in kwargs.items()},
    )


@functools.cache
def signature_of(function: Callable[..., Any]) -> inspect.Signature:
    """The signature of a function that takes a module first, without that parameter."""
    signature = inspect.signature(function)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def kinds_of(
    signature: inspect.Signature,
    places: Mapping[str, Place],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> dict[str, Any]:
    """What a graph made for this call assumes of each argument, by name, except those that equal their default."""
    kinds = {}
    for name, place in places.items():
        value = args[place] if isinstance(place, int) else kwargs[place]
        parameter = signature.parameters.get(name)
        if (
            parameter is None
            or isinstance(value, LIVE)
            or not _is_default(value, parameter.default)
        ):
            kinds[name] = kind_of_argument(value)
    return kinds


def _is_default(value: Any, default: Any) -> bool:
    if (
        in_jit_trace() and isinstance(value, Tensor) and not value.ndim
    ):  # it passes numbers as tensors
        value = quietly(value.item)
    return default is not _EMPTY and fits(default, kind_of_argument(value))


def without_data(leaf: Any) -> Any:
    """A tensor without its values, except for a small integer tensor."""
    if not isinstance(leaf, Tensor):
        return leaf
    few = leaf.numel() <= _SMALL and not leaf.is_floating_point()
    return leaf.detach().clone() if few else torch.empty_like(leaf, device="meta")


def with_data(example: Any, model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of an example whose tensors hold no values: zeros, on the device of the model's parameters."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def filled(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return torch.zeros_like(leaf, device=device) if leaf.is_meta else leaf.to(device)

    found: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(filled, example)
    return found
