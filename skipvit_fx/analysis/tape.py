"""A tape of the operators that run, by which an element of a result is traced back to its origin."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, fx

from skipvit_fx.analysis.axes import tensors_in
from skipvit_fx.analysis.tokens import TokenAnalysis
from skipvit_fx.torch_internals import TorchDispatchMode, aten

Index: TypeAlias = list[int]


class Origin(NamedTuple):
    """Where an element comes from.

    Attributes:
        names: the known tensor that it is an element of, or those that a constant is made of; empty if unknown.
        place: its index in that one tensor; empty for a constant.
    """

    names: tuple[str, ...] = ()
    place: tuple[int, ...] = ()


class Made(NamedTuple):
    """One result of one operator, with its number among those that the operator returned."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    number: int
    out: Tensor

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)


class Tape(TorchDispatchMode):
    """Notes how every tensor is made.

    Args:
        names: names of the tensors at which tracing back ends, by their identity.
        data: identities of tensors that depend on the image. All others are constants, and are not traced back.
    """

    def __init__(self, names: dict[int, str], data: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._names, self._data = names, data
        self._made: dict[int, Made] = {}
        self._used: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = {id(t) for t in tensors_in((args, kwargs))}
        self._used |= given
        for number, tensor in enumerate(tensors_in(out)):
            if not self._data.isdisjoint(given):
                self._data.add(id(tensor))
            if id(tensor) not in given:  # else it was written in place
                self._made[id(tensor)] = Made(func.overloadpacket, args, kwargs, number, tensor)
        return out

    def play(
        self, analysis: TokenAnalysis, values: dict[fx.Node, Any], nodes: Iterable[fx.Node]
    ) -> None:
        """Run these nodes on fake tensors. What they read comes from ``values``, or from ``analysis``."""

        def value(argument: fx.Node) -> Any:
            return values[argument] if argument in values else analysis[argument].value

        with analysis.fake_mode, torch.no_grad():
            for node in nodes:
                if node.op == "get_attr":
                    values[node] = analysis.fake_attribute(str(node.target))
                else:
                    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
                    with self:
                        values[node] = analysis.callee(node)(*args, **kwargs)
                self._used |= {id(t) for t in tensors_in(values[node])}

    def is_used(self, tensor: Tensor) -> bool:
        """Whether an operator reads the tensor, or a node returns it."""
        return id(tensor) in self._used

    def taken(self) -> Iterator[tuple[Tensor, Tensor, int, int]]:
        """Each result that is one row of a tensor with several rows, with that tensor, the dimension and the index."""
        for made in self._made.values():
            if made.func in _CUTS:
                source, along, at, length = _CUTS[made.func](made)
                if length == 1 < source.shape[along]:
                    yield made.out, source, along, at

    def origin(self, tensor: Tensor, index: Sequence[int]) -> Origin:
        """Where the element at ``index`` comes from."""
        at: Index | None = list(index)
        while at is not None:
            if id(tensor) in self._names:
                return Origin((self._names[id(tensor)],), tuple(at))
            if id(tensor) not in self._data:
                return Origin(tuple(dict.fromkeys(self._within(tensor))))
            made = self._made.get(id(tensor))
            if made is None:
                break
            tensor, at = self._before(made, at)
        return Origin()

    def _within(self, constant: Tensor) -> Iterator[str]:
        """Names of the tensors that a constant is made of, in the order of its operators' arguments."""
        if id(constant) in self._names:
            yield self._names[id(constant)]
        elif made := self._made.get(id(constant)):
            for argument in tensors_in((made.args, made.kwargs)):
                yield from self._within(argument)

    def _before(self, made: Made, at: Index) -> tuple[Tensor, Index | None]:
        """The argument that an element comes from, and its index there; ``None`` as the index if it is not known."""
        if made.func in _MOVES:
            return _MOVES[made.func](made, at)
        if made.func in _CUTS:
            return _uncut(made, at)
        first = made.argument(_ROWS_OF.get(made.func, 0), "self")
        if made.func in _ROWS_OF and id(first) in self._data:
            return first, [*at[:-1], 0]
        if made.func in _IN_PLACE or torch.Tag.pointwise in _tags(made.func):
            for tensor in tensors_in((made.args, made.kwargs)):
                if id(tensor) in self._data:
                    return tensor, _aligned(at, tensor)
        return made.out, None


def _tags(packet: Any) -> list[Any]:
    return list(getattr(packet, packet.overloads()[0]).tags)


# -- operators that cut a tensor along one dimension: the tensor, the dimension, the start, the length ------------

Cut: TypeAlias = Callable[[Made], tuple[Tensor, int, int, int]]


def _select(made: Made) -> tuple[Tensor, int, int, int]:
    source = made.args[0]
    along = made.argument(1, "dim") % source.ndim
    return source, along, made.argument(2, "index") % source.shape[along], 1


def _slice(made: Made) -> tuple[Tensor, int, int, int]:
    source = made.args[0]
    along = made.argument(1, "dim", 0) % source.ndim
    length = source.shape[along]
    start, _, _ = slice(made.argument(2, "start"), None).indices(length)
    return source, along, start, made.out.shape[along]


def _split(made: Made) -> tuple[Tensor, int, int, int]:
    source, sizes = made.args[0], made.args[1]
    along = made.argument(2, "dim", 0) % source.ndim
    start = sizes * made.number if isinstance(sizes, int) else sum(sizes[: made.number])
    return source, along, start, made.out.shape[along]


def _unbind(made: Made) -> tuple[Tensor, int, int, int]:
    source = made.args[0]
    return source, made.argument(1, "dim", 0) % source.ndim, made.number, 1


_CUTS: dict[Any, Cut] = {
    aten.select: _select,
    aten.slice: _slice,
    aten.split: _split,
    aten.split_with_sizes: _split,
    aten.unbind: _unbind,
}


def _uncut(made: Made, at: Index) -> tuple[Tensor, Index | None]:
    source, along, start, _ = _CUTS[made.func](made)
    if made.out.ndim < source.ndim:
        return source, [*at[:along], start, *at[along:]]
    if made.func is aten.slice and made.argument(4, "step", 1) != 1:
        return source, None
    return source, [*at[:along], start + at[along], *at[along + 1 :]]


# -- operators that move elements ---------------------------------------------------------------------------------

Move: TypeAlias = Callable[[Made, Index], tuple[Tensor, "Index | None"]]


def _cat(made: Made, at: Index) -> tuple[Tensor, Index | None]:
    parts = [part for part in made.args[0] if part.shape != (0,)]
    along = made.argument(1, "dim", 0) % made.out.ndim
    row = at[along]
    for part in parts:
        if row < part.shape[along]:
            return part, [*at[:along], row, *at[along + 1 :]]
        row -= part.shape[along]
    return made.out, None


def _view(made: Made, at: Index) -> tuple[Tensor, Index | None]:
    """Elements keep their order, so the index in the flattened tensor is the same."""
    flat = 0
    for size, i in zip(made.out.shape, at, strict=True):
        flat = flat * size + i
    source, before = made.args[0], []
    for size in reversed(source.shape):
        before.append(flat % size)
        flat //= size
    return source, before[::-1]


def _permute(made: Made, at: Index) -> tuple[Tensor, Index | None]:
    source = made.args[0]
    order = list(range(source.ndim))
    if made.func is aten.permute:
        order = [d % source.ndim for d in made.argument(1, "dims")]
    else:
        a, b = (0, 1) if made.func is aten.t else (made.args[1], made.args[2])
        order[a], order[b] = order[b], order[a]
    before = [0] * source.ndim
    for d, i in zip(order, at, strict=True):
        before[d] = i
    return source, before


def _expand(made: Made, at: Index) -> tuple[Tensor, Index | None]:
    return made.args[0], _aligned(at, made.args[0])


def _aligned(at: Index, tensor: Tensor) -> Index:
    """The index in a tensor that was broadcast."""
    own = at[len(at) - tensor.ndim :] if tensor.ndim else []
    return [0 if size == 1 else i for size, i in zip(tensor.shape, own, strict=True)]


_MOVES: dict[Any, Move] = {
    aten.cat: _cat,
    **dict.fromkeys(
        (
            aten.view,
            aten._unsafe_view,
            aten.reshape,
            aten._reshape_alias,
            aten.flatten,
            aten.squeeze,
            aten.unsqueeze,
        ),
        _view,
    ),
    **dict.fromkeys((aten.permute, aten.transpose, aten.t), _permute),
    aten.expand: _expand,
}

_IN_PLACE: frozenset[Any] = frozenset(
    {
        aten.clone,
        aten.contiguous,
        aten.detach,
        aten.alias,
        aten._to_copy,
        aten.lift_fresh,
        aten.dropout,
        aten.native_dropout,
        aten.layer_norm,
        aten.native_layer_norm,
        aten.rms_norm,
        aten._fused_rms_norm,
    }
)
"""Operators besides the pointwise ones whose elements come from the same place of their first argument."""

_ROWS_OF: dict[Any, int] = {aten.linear: 0, aten.mm: 0, aten.addmm: 1}
"""Operators that compute each row of the result from the same row of the argument at this position."""
