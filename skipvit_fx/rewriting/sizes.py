"""Let the size arguments of a reshape or split follow its input."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from skipvit_fx.analysis.axes import Axes, Dim, axes_of, size, tokens_of
from skipvit_fx.errors import UnsupportedModelError
from skipvit_fx.graph.module_paths import module_path
from skipvit_fx.graph.sizes import PICKS, RESHAPES, SELECTS, SPLITS, dimension_of
from skipvit_fx.rewriting.context import Context


def follow_input(context: Context, node: fx.Node, *, always: bool = False) -> None:
    """Let the token sizes in a reshape or split follow its input (``always``: even if they already do)."""
    out = context.analysis[node]
    if node.target in RESHAPES and out.axes is not None:
        _follow_in_reshape(context, node, out.axes, tuple(out.value.shape), always)
    elif node.target in SPLITS:
        _follow_in_split(context, node)
    elif node.target in SELECTS:
        _follow_in_select(context, node)
    elif node.target in PICKS:
        _follow_in_index(context, node)


def _follow_in_reshape(
    context: Context, node: fx.Node, axes: Axes, shape: Sequence[int], always: bool
) -> None:
    source, sizes, rebuild = sizes_argument(context, node)
    slots: list[Any] = list(sizes) if not isinstance(sizes, fx.Node) else [None] * len(axes)
    if len(slots) != len(axes):
        return
    token_dims = [d for d, dim in enumerate(axes) if tokens_of(dim)]
    moved = [d for d in token_dims if always or not is_live(context, node, slots[d], axes[d])]
    if not moved and not isinstance(sizes, fx.Node):
        return
    editor = context.editor
    for d, slot in enumerate(slots):
        if slot is None and d not in token_dims:
            slots[d] = editor.insert_call(
                operator.getitem, (sizes, d), before=node, name=f"{sizes.name}_{d}"
            )
    for d in moved:
        own = _dim_with(context, source, axes[d], token_dims.index(d))
        if own is not None:
            name = f"{source.name}_tokens"
            slots[d] = editor.insert_call("size", (source, own), before=node, name=name)
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


def sizes_argument(context: Context, node: fx.Node) -> tuple[fx.Node, Any, Any]:
    """The reshaped tensor, its size arguments, and a function that replaces them."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if (len(node.args) == 2 and isinstance(node.args[1], (tuple, list, fx.Node))) or not node.args[
        1:
    ]:
        given = node.args[1] if len(node.args) == 2 else next(iter(node.kwargs.values()))
        if isinstance(given, fx.Node) and _is_number(context, given):
            return source, [given], lambda slots: ((source, *slots), {})
        return source, given, lambda slots: ((source, tuple(slots)), {})
    return source, list(node.args[1:]), lambda slots: ((source, *slots), {})


def _is_number(context: Context, node: fx.Node) -> bool:
    """Whether a node in place of sizes is a single size, as every inserted one is, rather than all of them."""
    value = context.analysis.value(node)
    return value is None or isinstance(value, int)


def is_live(context: Context, node: fx.Node, slot: Any, dim: Dim) -> bool:
    """Whether a size argument is already the length of a token axis under the same drops."""
    if slot == -1:
        return True
    if not isinstance(slot, fx.Node):
        return False
    found = dimension_of(slot, context.analysis.rank)
    if found is None:
        return False
    tensor, own = found
    axes = context.analysis.axes(tensor)
    same_drops = context.spans.active(tensor) == context.spans.active(node)
    return axes is not None and axes[own] == dim and same_drops


def _dim_with(context: Context, source: fx.Node, dim: Dim, occurrence: int) -> int | None:
    """The input's dimension that is exactly the same token axis."""
    axes = context.analysis.axes(source) or ()
    places = [d for d, own in enumerate(axes) if tokens_of(own)]
    if occurrence < len(places) and axes[places[occurrence]] == dim and len(dim) == 1:
        return places[occurrence]
    return None


def _follow_in_split(context: Context, node: fx.Node) -> None:
    sections = node.args[1] if len(node.args) > 1 else next(iter(node.kwargs.values()))
    source = node.args[0]
    if not isinstance(sections, (tuple, list)) or not isinstance(source, fx.Node):
        return
    axes = context.analysis.axes(source)
    if axes is None:
        return
    dim = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)
    assert isinstance(dim, int)
    if not tokens_of(axes[dim]):
        return
    parts = context.analysis[node].value
    at = next(i for i, part in enumerate(parts) if _part_has_patches(part, dim))
    editor = context.editor
    rest = sum(part.shape[dim] for i, part in enumerate(parts) if i != at)
    live = editor.insert_call(
        "size", (source, dim % len(axes)), before=node, name=f"{source.name}_tokens"
    )
    if rest:
        live = editor.insert_call(
            operator.sub, (live, rest), before=node, name=f"{source.name}_patches"
        )
    fixed = [live if i == at else part.shape[dim] for i, part in enumerate(parts)]
    kwargs = {k: v for k, v in node.kwargs.items() if k == "dim"}
    editor.set_args(node, (source, fixed, *node.args[2:]), kwargs)


def _part_has_patches(part: Tensor, dim: int) -> bool:
    axes = axes_of(part)
    return axes is not None and tokens_of(axes[dim]) is not None


def _follow_in_select(context: Context, node: fx.Node) -> None:
    """The same for ``x.select(1, 197)``, whatever is passed by name."""
    given = dict(zip(("input", "dim", "index"), node.args, strict=False)) | node.kwargs
    source, dim, index = given.get("input"), given["dim"], given["index"]
    assert isinstance(dim, int)
    if not isinstance(source, fx.Node) or (axes := context.analysis.axes(source)) is None:
        return
    row = _from_the_end(context, index, axes[dim])
    if row is not index:
        context.editor.set_args(node, (source, dim, row), {})


def _follow_in_index(context: Context, node: fx.Node) -> None:
    """Count rows after the patches from the end rather than the front (``x[:, 1:197]``, ``x[:, 197]``)."""
    source = node.args[0]
    if not isinstance(source, fx.Node) or (axes := context.analysis.axes(source)) is None:
        return
    if node.target is operator.getitem:
        given = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        dims = _indexed_dims(given, len(axes))
        index = tuple(
            part if d is None else _from_the_end(context, part, axes[d])
            for d, part in zip(dims, given, strict=True)
        )
        args: tuple[Any, ...] = (source, index if isinstance(node.args[1], tuple) else index[0])
    else:
        dim = node.args[1] if len(node.args) > 1 else 0
        assert isinstance(dim, int)
        bounds = (_from_the_end(context, bound, axes[dim]) for bound in node.args[2:4])
        args = (source, dim, *bounds, *node.args[4:])
    if args != node.args:
        context.editor.set_args(node, args, dict(node.kwargs))


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


def _from_the_end(context: Context, part: Any, dim: Dim) -> Any:
    """An index along a token axis, or a slice of one, counted from the end if it is after the patches."""
    if isinstance(part, slice):
        start, stop = (_from_the_end(context, b, dim) for b in (part.start, part.stop))
        return slice(start, stop, part.step)
    tokens = tokens_of(dim)
    place = context.analysis[part].value if isinstance(part, fx.Node) else part
    if tokens is None or not isinstance(place, int) or place < tokens.prefix + tokens.patches:
        return part
    return place - size(tokens) if place < size(tokens) else None
