"""Where each layer begins and ends on the residual stream: at the author's block, or else a stretch of the chain."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, fx

from skipvit_fx.analysis.residual import Chain, Segment
from skipvit_fx.analysis.tokens import TokenAnalysis
from skipvit_fx.graph.module_paths import module_calls
from skipvit_fx.torch_internals import aten


class Bounds(NamedTuple):
    """A layer's places on the chain, as indices into the chain's nodes.

    Attributes:
        input: the residual stream before the layer.
        cut: after its attention.
        end: after the layer.
        unsure: why ``end`` cannot be told; empty if it can.
    """

    input: int
    cut: int
    end: int
    unsure: str = ""


class _Block(NamedTuple):
    """A module call on the chain: its input and its output are chain nodes."""

    input: int
    end: int


def find_bounds(analysis: TokenAnalysis, chain: Chain, segments: Sequence[Segment]) -> list[Bounds]:
    """The bounds of every layer, given the chain segment that holds its attention.

    A layer is the outermost module that holds its attention and no other layer's. If there is none, as in a forward
    that spells all layers out, it runs from just before one attention to just before the next.
    """
    places = {node: i for i, node in enumerate(chain.nodes)}
    joined = [places[segment.end] for segment in segments]
    blocks = _find_blocks(analysis, chain, segments, joined)
    inputs = [
        places[segment.start] if block is None else block.input
        for segment, block in zip(segments, blocks, strict=True)
    ]
    forks = [_forks(chain, node) for node in chain.nodes]
    bounds: list[Bounds] = []
    for i, block in enumerate(blocks):
        unsure = ""
        if block is not None:
            end = block.end
        elif i + 1 < len(segments):
            end = inputs[i + 1]
        else:
            spelled_out = [b for b, other in zip(bounds, blocks, strict=False) if other is None]
            end, unsure = _last_end(analysis, chain, spelled_out, inputs[i], joined[i])
        # The next branch starts from the sum after an attention, and its result is added to that
        # sum. A post-norm comes in between: the stream forks only after it.
        cut = next((c for c in range(joined[i], end) if forks[c]), joined[i])
        bounds.append(Bounds(inputs[i], cut, end, unsure))
    return bounds


def _forks(chain: Chain, node: fx.Node) -> bool:
    return sum(user in chain.on_path for user in node.users) > 1


# -- the author's blocks ------------------------------------------------------------------------------------------


def _find_blocks(
    analysis: TokenAnalysis, chain: Chain, segments: Sequence[Segment], joined: Sequence[int]
) -> list[_Block | None]:
    """Each layer's block; ``None`` if no module begins and ends on the chain and holds only that attention."""
    stretches = _stretches_of(chain)
    blocks: list[_Block | None] = []
    for segment, at in zip(segments, joined, strict=True):
        others = [other for other in joined if other != at]
        shape = analysis[segment.start].value.shape
        found = []
        for call in stretches[at].common:
            block = _block(stretches, call)
            if block is None or any(block.input < other <= block.end for other in others):
                continue
            values = [analysis[chain.nodes[i]].value for i in block]
            if all(isinstance(v, Tensor) and v.shape == shape for v in values):
                found.append(block)
        if (
            not others
        ):  # all modules around a lone attention qualify: take the one that is a whole layer
            found = [block for block in reversed(found) if block.end > at]
        blocks.append(found[0] if found else None)
    return [None] * len(blocks) if _are_halves(blocks, joined) else blocks


def _are_halves(blocks: Sequence[_Block | None], joined: Sequence[int]) -> bool:
    """Whether these modules are only attention with its residual, each followed by another module."""
    known = [(block, at) for block, at in zip(blocks, joined, strict=True) if block is not None]
    apart = any(a.end < b.input for (a, _), (b, _) in itertools.pairwise(known))
    return apart and all(block == (at - 1, at) for block, at in known)


class _Stretch(NamedTuple):
    """The nodes from one chain node to the next, including the latter.

    Attributes:
        common: the module calls in which all of its nodes are made, outermost first.
        some: the module calls in which any of them is made.
    """

    common: tuple[str, ...]
    some: frozenset[str]


def _stretches_of(chain: Chain) -> list[_Stretch]:
    """One stretch for each node of the chain."""
    # Every node on the way either leads to a chain node or comes from it, so the order of the graph is enough.
    stretches: list[_Stretch] = []
    calls: list[tuple[str, ...]] = []
    ends = iter(chain.nodes)
    end = next(ends, None)
    for node in sorted(chain.on_path):
        if end is None:
            break
        calls.append(module_calls(node))
        if node is end:
            common = tuple(call for call in calls[0] if all(call in other for other in calls))
            stretches.append(_Stretch(common, frozenset(call for own in calls for call in own)))
            calls = []
            end = next(ends, None)
    return stretches


def _block(stretches: Sequence[_Stretch], call: str) -> _Block | None:
    """Where a module call enters and leaves the chain; ``None`` if it holds only a part of a stretch."""
    held = [i for i, stretch in enumerate(stretches) if call in stretch.some]
    whole = all(call in stretches[i].common for i in range(held[0], held[-1] + 1))
    return _Block(held[0] - 1, held[-1]) if whole and held[0] > 0 else None


# -- the end of the last layer, if no module marks it -------------------------------------------------------------


def _last_end(
    analysis: TokenAnalysis, chain: Chain, earlier: Sequence[Bounds], start: int, joined: int
) -> tuple[int, str]:
    """Where the last layer ends in a forward that spells its layers out, and why, if this cannot be told.

    It ends with its last residual sum, plus the steps that follow that sum in an earlier layer of the same structure.
    """
    nodes = chain.nodes
    shape = analysis[nodes[start]].value.shape
    last = joined
    while last + 1 < len(nodes):
        value = analysis[nodes[last + 1]].value
        if not isinstance(value, Tensor) or value.shape != shape:
            break
        last += 1
    sums = [i for i in range(joined + 1, last + 1) if _forks(chain, nodes[i - 1])]
    sum_ = sums[-1] if sums else joined
    alike = {
        end
        for layer in earlier
        if (end := start + layer.end - layer.input) <= last
        and all(
            _step(analysis, chain, layer.input + i) == _step(analysis, chain, start + i)
            for i in range(1, end - start + 1)
        )
    }
    ends = {end for end in alike if end >= sum_}
    end = min(ends, default=sum_)
    follow = [i for i in range(end + 1, last + 1) if nodes[i].target not in _SLICES]
    # one more step is the final norm, unless other layers end with such a step
    final = len(follow) < 2
    if follow and not ends:
        like_it = _step(analysis, chain, follow[0])
        final &= all(_step(analysis, chain, layer.end) != like_it for layer in earlier)
    if len(ends) > 1 or not final or (alike and not ends):
        return sum_, (
            f"the last layer is not a module of its own, so whether it ends with {nodes[end].name!r} or later "
            "cannot be told"
        )
    return end, ""


_SLICES = (operator.getitem, aten.slice.Tensor)
"""Operators that compute nothing on the way, such as a slice that takes all rows."""


def _step(analysis: TokenAnalysis, chain: Chain, index: int) -> tuple[bool, object]:
    """The step that leads to a chain node: whether it joins a branch, and its target."""
    node = chain.nodes[index]
    target: object = node.target
    if node.op == "call_module":
        target = type(analysis.module.get_submodule(str(target)))
    return _forks(chain, chain.nodes[index - 1]), target
