"""The rewritten graph for networkx."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import networkx as nx

if TYPE_CHECKING:
    from skipvit_fx.inspect.inspection import NodeReport


def to_networkx(nodes: Iterable[NodeReport]) -> nx.DiGraph:
    """A directed graph with an edge from each node to every node that reads it; see :class:`NodeReport`."""
    graph = nx.DiGraph()
    for node in nodes:
        graph.add_node(
            node.name,
            op=node.op,
            target=node.target,
            inserted_by=node.inserted_by,
            layer=node.layer,
            shape=node.shape,
            macs=node.macs,
        )
        graph.add_edges_from((read, node.name) for read in node.reads)
    return graph
