"""Which layer a node runs in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import fx

from skipvit_fx.graph.record import LayerRecord

NumberT = TypeVar("NumberT", int, float)


def regions_of(graph: fx.Graph, layers: tuple[LayerRecord, ...]) -> dict[str, int]:
    """For every node the layer that it runs in; 0 before the first, the number of layers plus one after the last."""
    starts = {layer.input: layer.index for layer in layers}
    regions = {}
    region = 0
    for node in graph.nodes:
        regions[node.name] = region
        region = starts.get(node.name, region)
        if node.name == layers[-1].end:
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
