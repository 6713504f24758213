"""Tells whether two models are the same: a captured graph, its modules and their tensors, as text and as a hash."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from skipvit_fx.names import OWN_CHILD

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def fingerprint(graph: Sequence[str], modules: Sequence[str], state: Sequence[str]) -> str:
    """SHA-256, in hexadecimal, of a captured graph's lines, :func:`module_lines` and :func:`state_lines`.

    It depends on operators, modules and their options, names, shapes and dtypes; not on weights, devices or
    ``PYTHONHASHSEED``.
    """
    lines = [list(graph), list(modules), list(state)]
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()


def module_lines(model: nn.Module) -> tuple[str, ...]:
    """One line per submodule, ``path: Class(options)``: what a graph does not show of the modules that it calls.

    Equal for a model and its rewrite.
    """
    return tuple(
        f"{path}: {type(module).__name__}({_ADDRESS.sub('', module.extra_repr())})"
        for path, module in model.named_modules()
        if path and path.split(".")[0] != OWN_CHILD
    )


def state_lines(state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """One line per entry of a ``state_dict``: ``name: dtype [shape]``, or ``name: same as other`` for tied tensors."""
    tied = tied_names(state)
    lines = []
    for name, tensor in state.items():
        shape = ", ".join(map(str, tensor.shape))
        kind = f"{str(tensor.dtype).removeprefix('torch.')} [{shape}]"
        lines.append(f"{name}: same as {tied[name]}" if name in tied else f"{name}: {kind}")
    return tuple(lines)


def tied_names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """For every entry that is the same tensor as an earlier one (not just an overlapping view), that one's name."""
    first: dict[tuple[object, ...], str] = {}
    tied = {}
    for name, tensor in state.items():
        if tensor.is_meta or not tensor.numel():
            continue  # without memory this cannot be told
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if place in first:
            tied[name] = first[place]
        else:
            first[place] = name
    return tied


def first_difference(stored: Iterable[str], found: Iterable[str]) -> tuple[str, str] | None:
    """The first pair of lines that differ; an empty string stands for the end. ``None`` if all are equal."""
    ours, theirs = list(stored), list(found)
    longest = max(len(ours), len(theirs))
    for here, there in zip(
        ours + [""] * (longest - len(ours)), theirs + [""] * (longest - len(theirs)), strict=True
    ):
        if here != there:
            return here, there
    return None
