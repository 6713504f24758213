"""Sizes: a reshape under a drop follows its input, everything else still sees the full token count."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, fx

from skipvit_fx.analysis.axes import Axes, Batch, Dim, axes_of, size, tokens_of
from skipvit_fx.errors import UnsupportedModelError
from skipvit_fx.ir.places import module_path
from skipvit_fx.ir.sizes import PICKS, RESHAPES, SIZE_FREE, SPLITS, dimension_of, sizes_of
from skipvit_fx.ops.guard import OF_KIND, guard
from skipvit_fx.ops.shape import as_shape
from skipvit_fx.pipeline.rewriting import Rewriting


@dataclass(frozen=True)
class FreeTokenSizes:
    """Two kinds of size come from one expression; this pass tells them apart.

    Before (``n`` is a literal, or was read before the drop)::

        y = x.reshape(b, n, heads, -1)
        table = cos[:n]; y * table

    After (``table`` keeps its full length, and its rows are gathered later)::

        y = x.reshape(b, x.size(1), heads, -1)
        table = cos[:197]; y * table

    So a drop never changes what the author computes from a token count, such as a position table or a scale. The full
    count is a constant, since every input is bound to the size that it had in the example.
    """

    name: ClassVar[str] = "free-token-sizes"
    requires: ClassVar[frozenset[str]] = frozenset({"sound-spans"})
    provides: ClassVar[frozenset[str]] = frozenset({"live-sizes"})
    invalidates: ClassVar[frozenset[str]] = frozenset()

    def run(self, rewriting: Rewriting) -> None:
        """Rewrite the sizes under every drop.

        Raises:
            UnsupportedModelError: a number is read from a sequence in a way that the pass does not know.
        """
        nodes = rewriting.span_nodes()
        for node in nodes:
            follow_input(rewriting, node)
        for node in nodes:
            _fix_to_full(rewriting, node)


def follow_input(rewriting: Rewriting, node: fx.Node, *, always: bool = False) -> None:
    """Let the token sizes in a reshape or split follow its input (``always``: also where they already do)."""
    out = rewriting.analysis[node]
    if node.target in RESHAPES and out.axes is not None:
        _follow_in_reshape(rewriting, node, out.axes, tuple(out.value.shape), always)
    elif node.target in SPLITS:
        _follow_in_split(rewriting, node)
    elif node.target in PICKS:
        _follow_in_index(rewriting, node)


def _follow_in_reshape(
    rewriting: Rewriting, node: fx.Node, axes: Axes, shape: Sequence[int], always: bool
) -> None:
    source, sizes, rebuild = _sizes_argument(rewriting, node)
    slots: list[Any] = list(sizes) if not isinstance(sizes, fx.Node) else [None] * len(axes)
    if len(slots) != len(axes):
        return
    token_dims = [d for d, dim in enumerate(axes) if tokens_of(dim)]
    moved = [d for d in token_dims if always or not _is_live(rewriting, node, slots[d], axes[d])]
    if not moved and not isinstance(sizes, fx.Node):
        return
    editor = rewriting.editor
    for d, slot in enumerate(slots):
        if slot is None and d not in token_dims:
            slots[d] = editor.insert_call(operator.getitem, (sizes, d), before=node)
    for d in moved:
        own = _dim_with(rewriting, source, axes[d], token_dims.index(d))
        if own is not None:
            slots[d] = editor.insert_call("size", (source, own), before=node)
            continue
        for other, slot in enumerate(slots):
            if slot == -1 and other != d:
                if any(not isinstance(factor, int) for factor in axes[other]):
                    raise UnsupportedModelError(
                        "a reshape leaves both a token size and a batch size open",
                        node=node.name,
                        module_path=module_path(node),
                        hint="give the batch size of that reshape explicitly",
                    )
                slots[other] = shape[other]
        slots[d] = -1
    editor.set_args(node, *rebuild(slots))


def _sizes_argument(rewriting: Rewriting, node: fx.Node) -> tuple[fx.Node, Any, Any]:
    """The reshaped tensor, its size arguments, and how to put other sizes in."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if (len(node.args) == 2 and isinstance(node.args[1], (tuple, list, fx.Node))) or not node.args[
        1:
    ]:
        given = node.args[1] if len(node.args) == 2 else next(iter(node.kwargs.values()))
        if isinstance(given, fx.Node) and _is_number(rewriting, given):
            return source, [given], lambda slots: ((source, *slots), {})
        return source, given, lambda slots: ((source, tuple(slots)), {})
    return source, list(node.args[1:]), lambda slots: ((source, *slots), {})


def _is_number(rewriting: Rewriting, node: fx.Node) -> bool:
    """Whether a node in place of sizes is one of them, as every inserted one is, rather than all."""
    value = rewriting.analysis.value(node)
    return value is None or isinstance(value, int)


def _is_live(rewriting: Rewriting, node: fx.Node, slot: Any, dim: Dim) -> bool:
    """Whether a size argument already is the length of a token axis under the same drops."""
    if slot == -1:
        return True
    if not isinstance(slot, fx.Node):
        return False
    found = dimension_of(slot, rewriting.rank)
    if found is None:
        return False
    tensor, own = found
    axes = rewriting.analysis.axes(tensor)
    same_drops = rewriting.active(tensor) == rewriting.active(node)
    return axes is not None and axes[own] == dim and same_drops


def _dim_with(rewriting: Rewriting, source: fx.Node, dim: Dim, occurrence: int) -> int | None:
    """The input's dimension that is the same token axis and nothing else."""
    axes = rewriting.analysis.axes(source) or ()
    places = [d for d, own in enumerate(axes) if tokens_of(own)]
    if occurrence < len(places) and axes[places[occurrence]] == dim and len(dim) == 1:
        return places[occurrence]
    return None


def _follow_in_split(rewriting: Rewriting, node: fx.Node) -> None:
    sections = node.args[1] if len(node.args) > 1 else next(iter(node.kwargs.values()))
    source = node.args[0]
    if not isinstance(sections, (tuple, list)) or not isinstance(source, fx.Node):
        return
    axes = rewriting.analysis.axes(source)
    if axes is None:
        return
    dim = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)
    assert isinstance(dim, int)
    if not tokens_of(axes[dim]):
        return
    parts = rewriting.analysis[node].value
    at = next(i for i, part in enumerate(parts) if _part_has_patches(part, dim))
    editor = rewriting.editor
    rest = sum(part.shape[dim] for i, part in enumerate(parts) if i != at)
    live = editor.insert_call("size", (source, dim % len(axes)), before=node)
    if rest:
        live = editor.insert_call(operator.sub, (live, rest), before=node)
    fixed = [live if i == at else part.shape[dim] for i, part in enumerate(parts)]
    kwargs = {k: v for k, v in node.kwargs.items() if k == "dim"}
    editor.set_args(node, (source, fixed, *node.args[2:]), kwargs)


def _part_has_patches(part: Tensor, dim: int) -> bool:
    axes = axes_of(part)
    return axes is not None and tokens_of(axes[dim]) is not None


def _follow_in_index(rewriting: Rewriting, node: fx.Node) -> None:
    """Rows after the patches, counted from the front (``x[:, 1:197]``, ``x[:, 197]``), are counted from the end."""
    source = node.args[0]
    if not isinstance(source, fx.Node) or (axes := rewriting.analysis.axes(source)) is None:
        return
    if node.target is operator.getitem:
        given = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        dims = _indexed_dims(given, len(axes))
        index = tuple(
            part if d is None else _from_the_end(rewriting, part, axes[d])
            for d, part in zip(dims, given, strict=True)
        )
        args: tuple[Any, ...] = (source, index if isinstance(node.args[1], tuple) else index[0])
    else:
        dim = node.args[1] if len(node.args) > 1 else 0
        assert isinstance(dim, int)
        bounds = (_from_the_end(rewriting, bound, axes[dim]) for bound in node.args[2:4])
        args = (source, dim, *bounds, *node.args[4:])
    if args != node.args:
        rewriting.editor.set_args(node, args, dict(node.kwargs))


def _indexed_dims(index: tuple[Any, ...], rank: int) -> list[int | None]:
    """The dimension that each part of an index applies to; ``None`` for new axes and the ellipsis."""
    taken = sum(part is not None and part is not Ellipsis for part in index)
    dims: list[int | None] = []
    at = 0
    for part in index:
        if part is Ellipsis:
            at += rank - taken
        dims.append(None if part is None or part is Ellipsis else at)
        at += dims[-1] is not None
    return dims


def _from_the_end(rewriting: Rewriting, part: Any, dim: Dim) -> Any:
    """A place along a token axis, or a slice of one, counted from the end where that is after the patches."""
    if isinstance(part, slice):
        start, stop = (_from_the_end(rewriting, b, dim) for b in (part.start, part.stop))
        return slice(start, stop, part.step)
    tokens = tokens_of(dim)
    place = rewriting.analysis[part].value if isinstance(part, fx.Node) else part
    if tokens is None or not isinstance(place, int) or place < tokens.lead + tokens.patches:
        return part
    return place - size(tokens) if place < size(tokens) else None


# -- the full count -----------------------------------------------------------------------------------------------


def _fix_to_full(rewriting: Rewriting, node: fx.Node) -> None:
    """Let users of a size read under a drop see the full count instead, unless they follow their input."""
    value = rewriting.analysis[node].value
    if isinstance(value, Tensor) or node.op == "output":
        return
    if node.target is guard and node.args[1] in OF_KIND:
        return
    source = node.args[0] if node.args else None
    facts = rewriting.analysis.facts
    if not isinstance(source, fx.Node) or source not in facts:
        return  # a number made of numbers, inserted ones among them
    if not isinstance(facts[source].value, Tensor):
        return
    axes = rewriting.analysis.axes(source)
    if (
        axes is None
        or node.target in SIZE_FREE
        or (node.target is getattr and node.args[1] in SIZE_FREE)
    ):
        return
    found = dimension_of(node, rewriting.rank)
    if found is not None:
        if tokens_of(axes[found[1]]):
            _redirect(rewriting, node, axes[found[1]])
        return
    if sizes_of(node) is None:
        if isinstance(value, (tuple, list)):
            return  # several tensors
        raise UnsupportedModelError(
            "a number is read from a sequence of tokens, and may depend on how many there are",
            node=node.name,
            module_path=module_path(node),
            hint="compute it from the shape of a tensor before the first layer instead",
        )
    _redirect_shape(rewriting, node, axes)


def _redirect_shape(rewriting: Rewriting, node: fx.Node, axes: Axes) -> None:
    """``x.shape`` or a slice of it: element by element."""
    found = sizes_of(node)
    assert found is not None
    dims = list(range(len(axes)))[found[1]]
    for user in list(node.users):
        if user.target is operator.getitem:
            if isinstance(user.args[1], slice):
                _redirect_shape(rewriting, user, axes)
                continue
            element = dimension_of(user, rewriting.rank)
            if element is not None and tokens_of(axes[element[1]]):
                _redirect(rewriting, user, axes[element[1]])
            continue
        if not any(tokens_of(axes[d]) for d in dims):
            continue
        editor = rewriting.editor
        parts: Any = tuple(
            _full_size(rewriting, user, axes[d])
            if tokens_of(axes[d])
            else editor.insert_call(operator.getitem, (node, i), before=user)
            for i, d in enumerate(dims)
        )
        if getattr(user.target, "__module__", None) == "_operator":
            parts = editor.insert_call(as_shape, parts, before=user)
        editor.rewire(user, node, parts)


def _redirect(rewriting: Rewriting, node: fx.Node, dim: Dim) -> None:
    for user in list(node.users):
        if not _follows(rewriting, user, node):
            rewriting.editor.rewire(user, node, _full_size(rewriting, user, dim))


def _follows(rewriting: Rewriting, user: fx.Node, size_node: fx.Node) -> bool:
    """Whether the user is a reshape that takes the size for a token axis under the same drops, and for nothing else."""
    axes = rewriting.analysis.axes(user) if user in rewriting.analysis.facts else None
    if user.target not in RESHAPES or axes is None:
        return False
    _, sizes, _ = _sizes_argument(rewriting, user)
    if isinstance(sizes, fx.Node):
        return False
    uses = [axes[d] for d, slot in enumerate(sizes) if slot is size_node]
    return bool(uses) and all(
        tokens_of(dim) and _is_live(rewriting, user, size_node, dim) for dim in uses
    )


def _full_size(rewriting: Rewriting, reader: fx.Node, dim: Dim) -> int:
    """The length that a token axis has without any drop.

    Raises:
        UnsupportedModelError: there is no such number, or none that would mean what it meant.
    """
    if any(isinstance(factor, Batch) for factor in dim):
        reason = "the size of an axis that merges tokens with samples is used in a computation"
        hint = "compute it from the batch size and the token count separately"
    elif rewriting.return_node is None and rewriting.stream.layers[-1].end < reader:
        reason = "the number of tokens is used after the last layer, where some of them have left for good"
        hint = f"let them return: {rewriting.plan}+{len(rewriting.stream.layers) + 1}"
    else:
        return math.prod(map(size, dim))
    raise UnsupportedModelError(
        reason, node=reader.name, module_path=module_path(reader), hint=hint
    )
