"""Which layer a node runs in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from skipvit_fx.graph.record import LayerRecord

NumberT = TypeVar("NumberT", int, float)


def regions_of(nodes: Iterable[str], layers: tuple[LayerRecord, ...]) -> dict[str, int]:
    """For every node of a graph, given by name and in order, the layer that it runs in.

    It is 0 before the first layer, and the number of layers plus one after the last.
    """
    starts = {layer.input: layer.index for layer in layers}
    regions = {}
    region = 0
    for name in nodes:
        regions[name] = region
        region = starts.get(name, region)
        if name == layers[-1].end:
            region = len(layers) + 1
    return regions


def by_region(
    values: Mapping[str, NumberT], regions: Mapping[str, int], depth: int
) -> list[NumberT]:
    """Sums over the nodes of each region: embedding, ``depth`` layers, head."""
    sums: list[Any] = [0] * (depth + 2)
    for name, value in values.items():
        sums[regions[name]] += value
    return sums
