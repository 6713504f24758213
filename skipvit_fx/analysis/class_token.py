"""Which row of the sequence is the class token: one that the head reads by itself, or one told by its name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import fx

from skipvit_fx.analysis.axes import Tokens, tensors_in
from skipvit_fx.analysis.tape import Tape
from skipvit_fx.analysis.tokens import TokenAnalysis
from skipvit_fx.graph.nodes import leading_to

REGISTERS = frozenset(
    {"reg", "regs", "register", "registers", "storage", "memory", "mem", "memories"}
)
"""Words in the names of leading rows that are not class tokens."""


class ClassToken(NamedTuple):
    """The row whose attention scores the patches.

    Attributes:
        row: its index in the full sequence, from 0; ``None`` if there is none.
        reason: how this was told, such as ``read by the head``.
        ambiguous: why there may nevertheless be one; empty otherwise.
    """

    row: int | None
    reason: str
    ambiguous: str = ""

    def __str__(self) -> str:
        return f"none: {self.reason}" if self.row is None else f"row {self.row}: {self.reason}"


def find_class_token(
    analysis: TokenAnalysis, first: fx.Node, end: fx.Node, dim: int, tokens: Tokens
) -> ClassToken:
    """The class token of a model whose layers take ``first`` and leave ``end``, with its tokens at ``dim``."""
    if not tokens.prefix + tokens.suffix:
        return ClassToken(None, "all rows are patches")
    read = _rows_read(analysis, end, dim, tokens)
    if read and (read[0] < tokens.prefix or not tokens.prefix):
        return ClassToken(read[0], "read by the head")
    if read:
        return _read_behind(
            read[0], _sources(analysis, first, dim, [*range(tokens.prefix), read[0]])
        )
    if not tokens.prefix:
        return ClassToken(None, "the head reads none of the rows after the patches by itself")
    sources = _sources(analysis, first, dim, range(tokens.prefix))
    for row, names in enumerate(sources):
        for name in names:
            if tokens.prefix > 1 and _is_class(name):
                return ClassToken(row, f"guessed from the name {name!r}")
    others = [row for row, names in enumerate(sources) if not any(map(_is_register, names))]
    if not others:
        return ClassToken(None, "by their names, the rows before the patches are registers")
    if tokens.prefix == 1:
        named = (
            f"guessed from the name {sources[0][0]!r}"
            if sources[0]
            else "the only row before the patches"
        )
        return ClassToken(0, named)
    listed = ", ".join(dict.fromkeys(name for row in others for name in sources[row]))
    return ClassToken(
        None,
        "the head reads none of the rows before the patches by itself, and no name tells",
        f"there are {tokens.prefix} rows before the patches ({listed or 'of unknown origin'}), the head reads none of "
        "them by itself, and their names do not tell whether one is a class token",
    )


def _read_behind(row: int, sources: list[tuple[str, ...]]) -> ClassToken:
    """Judge a row after the patches that the head reads by itself, if there are rows before the patches, too."""
    *front, own = sources
    rivals = [name for names in front if not any(map(_is_register, names)) for name in names]
    if not rivals or any(map(_is_class, own)):
        return ClassToken(row, "read by the head")
    named, listed = " ".join(own) or "of unknown origin", ", ".join(dict.fromkeys(rivals))
    return ClassToken(
        None,
        "the head reads a row after the patches by itself, and there are others before them",
        f"the head reads row {row}, after the patches, by itself ({named}), but {listed} before them may be "
        "the class token as well",
    )


def _is_class(name: str) -> bool:
    return not {"cls", "class"}.isdisjoint(re.split(r"[_.]", name))


def _is_register(name: str) -> bool:
    return not REGISTERS.isdisjoint(re.split(r"[_\d]+", name.rpartition(".")[2]))


# -- what the head reads ------------------------------------------------------------------------------------------


def _rows_read(analysis: TokenAnalysis, end: fx.Node, dim: int, tokens: Tokens) -> list[int]:
    """The rows, prefix first, that are taken out of the sequence one at a time somewhere after ``end``."""
    stream = analysis[end].value
    tape = Tape({id(stream): "stream"}, {id(stream)})
    tape.play(analysis, {end: stream}, _after(analysis, end))
    rows = set()
    for out, source, along, at in tape.taken():
        start = [0] * source.ndim
        near, far = (_put(start, along, at), _put(start, along, at - 1 if at else 1))
        here, beside = (tape.origin(source, index) for index in (near, far))
        moved = here.place and beside.place and here.place[dim] != beside.place[dim]
        if moved and tape.is_used(out):
            rows.add(here.place[dim])
    last = tokens.prefix + tokens.patches
    return [*sorted(r for r in rows if r < tokens.prefix), *sorted(r for r in rows if r >= last)]


def _after(analysis: TokenAnalysis, end: fx.Node) -> Iterator[fx.Node]:
    reached = {end}
    for node in analysis.module.graph.nodes:
        if node.op != "output" and not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
            yield node


# -- where the rows come from -------------------------------------------------------------------------------------


def _sources(
    analysis: TokenAnalysis, first: fx.Node, dim: int, rows: Iterable[int]
) -> list[tuple[str, ...]]:
    """For each of these rows, the names of the parameters and buffers that it is made of; empty if unknown."""
    needed = leading_to([first], lambda argument: True)
    nodes = [node for node in analysis.module.graph.nodes if node in needed]
    values = {node: analysis[node].value for node in nodes if node.op == "placeholder"}
    fake = analysis.fake_module("")
    state = [*fake.named_parameters(), *fake.named_buffers()]
    names = {id(tensor): name for name, tensor in state}
    tape = Tape(names, {id(t) for value in values.values() for t in tensors_in(value)})
    tape.play(analysis, values, [node for node in nodes if node not in values])
    stream = values[first]
    start = [0] * stream.ndim
    return [tape.origin(stream, _put(start, dim, row)).names for row in rows]


def _put(index: list[int], at: int, value: int) -> list[int]:
    return [*index[:at], value, *index[at + 1 :]]
