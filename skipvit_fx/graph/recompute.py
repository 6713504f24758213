"""The model's activation checkpointing (``torch.utils.checkpoint``): regions of the graph that are recomputed.

A node remembers in which checkpoint of the author's forward it was made. What passes insert between the nodes of one
checkpoint belongs to it. The graph is still one flat list; only the code generated from it has functions in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby
from typing import NamedTuple

from torch import fx

from skipvit_fx.names import CHECKPOINT
from skipvit_fx.torch_internals import COUNTER


class _Region(NamedTuple):
    first: int
    last: int


def transformer(graph: fx.Graph) -> Callable[[list[str]], list[str]]:
    """A transformer for ``graph.on_generate_code`` that recomputes regions in the backward pass of train mode.

    Before::

        norm1 = self.layers.0.norm1(x)
        add = x + norm1

    After::

        def recomputed_0(x):
            norm1 = self.layers.0.norm1(x)
            add = x + norm1
            return (add,)
        (add,) = checkpoint(recomputed_0, x, use_reentrant=False) if self.training else recomputed_0(x)
        x = None
    """

    def transform(body: list[str]) -> list[str]:
        order = {node: i for i, node in enumerate(graph.nodes)}
        regions = list(_regions(order))
        if not regions:
            return body
        pieces = _pieces(body)
        lines: list[str] = []
        place = 0
        for number, region in enumerate(regions):
            lines += [line for piece in pieces[place : region.first] for line in piece]
            inside = [
                line for piece in pieces[region.first : region.last + 1] for line in piece[1:]
            ]
            lines += [pieces[region.first][0], *_function(order, region, number, "".join(inside))]
            place = region.last + 1
        return [*lines, *(line for piece in pieces[place:] for line in piece)]

    return transform


def _regions(order: dict[fx.Node, int]) -> Iterator[_Region]:
    """From the first to the last node of every checkpoint, in order; regions that overlap are merged."""
    spans: dict[int, _Region] = {}
    for node, i in order.items():
        number = node.meta.get(CHECKPOINT)
        if number is not None:
            spans[number] = _Region(spans[number].first if number in spans else i, i)
    open_region: _Region | None = None
    for region in sorted(spans.values()):
        if open_region is not None and region.first <= open_region.last:
            open_region = _Region(open_region.first, max(open_region.last, region.last))
            continue
        if open_region is not None:
            yield open_region
        open_region = region
    if open_region is not None:
        yield open_region


def _pieces(body: list[str]) -> list[list[str]]:
    """The code of every node, after its mark."""
    pieces: list[list[str]] = []
    for is_mark, lines in groupby(body, key=lambda line: line.startswith(COUNTER)):
        if is_mark:
            pieces += [[line] for line in lines]
        else:
            pieces[-1] += lines
    return pieces


def _function(order: dict[fx.Node, int], region: _Region, number: int, code: str) -> Iterator[str]:
    nodes = [node for node, i in order.items() if region.first <= i <= region.last]
    given = list(
        dict.fromkeys(
            source
            for node in nodes
            for source in node.all_input_nodes
            if order[source] < region.first
        )
    )
    made = [node for node in nodes if any(order[user] > region.last for user in node.users)]
    done = [node for node in given if all(order[user] <= region.last for user in node.users)]
    takes = ", ".join(node.name for node in given)
    returns = ", ".join(node.name for node in made)
    name = f"recomputed_{number}"
    yield f"def {name}({takes}):\n"
    yield "".join(f"    {line}\n" for line in code.splitlines())
    yield f"    return ({returns},)\n"
    yield (
        f"({returns},) = torch.utils.checkpoint.checkpoint({name}, {takes}, use_reentrant=False) "
        f"if self.training else {name}({takes})\n"
    )
    if done:
        yield f"{' = '.join(node.name for node in done)} = None\n"
