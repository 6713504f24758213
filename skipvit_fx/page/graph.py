"""A rewritten graph as data for the page that draws it: before, after, and what each pass did."""

from __future__ import annotations

from collections.abc import Iterable
from inspect import getdoc
from typing import Any

from torch import nn

from skipvit_fx.graph.record import NodeRecord, PassRecord, RewriteRecord, record_of
from skipvit_fx.passes import passes_for
from skipvit_fx.reports.inspection import inspect
from skipvit_fx.reports.inspection_report import Inspection, NodeReport
from skipvit_fx.reports.layers import regions_of

Graph = tuple[NodeRecord, ...]


def graph_data(fast: nn.Module, looked: Inspection | None = None) -> dict[str, Any]:
    """What ``drawGraph`` of ``graph.js`` draws, as plain values for ``json.dumps``.

    Args:
        fast: a rewritten model. It is neither run nor changed.
        looked: what :func:`skipvit_fx.inspect` returned for it, if that is at hand.

    Returns:
        A dict with these keys:

        - ``model``, ``plan``: as text; ``tokens``: the length of the full sequence.
        - ``groups``: what runs before the first layer, the layers, and what runs after the last, in order: ``name``,
          ``module_path``, multiply-adds ``macs`` and ``macs_before``, how many rows ``leave`` and ``return``, and for
          layers ``tokens`` in their ``attention`` and after their feed-forward network, ``ffn``.
        - ``nodes``: by name, every node that was ever there: its ``group`` (by number), ``kind`` (``author``,
          ``rewired`` or ``inserted``), ``label``, ``op``, ``target``, ``module_path``, ``source`` (``place`` and
          ``code``, or ``None``), ``inserted_by``, ``shape`` and ``shape_before`` for a batch of one, ``token_dims``,
          ``macs``, and whether its value is a ``tensor`` rather than a size.
        - ``before``: the author's graph in order, as ``name`` and ``reads``.
        - ``steps``: the passes in order: ``name``, what it is ``about``, the nodes ``inserted`` (``name``, ``reads``,
          and the node that each comes ``after``), those ``rewired`` (``name``, ``reads``, and what it read ``before``)
          and the names of those ``erased``.

    Raises:
        NotRewrittenError: ``fast`` does not come from :func:`skipvit_fx.rewrite`.
    """
    record = record_of(fast)
    looked = looked or inspect(fast)
    graphs = list(record.graphs())
    return {
        "model": record.model,
        "plan": str(record.plan),
        "tokens": record.prefix + record.patches + record.suffix,
        "groups": _groups(looked),
        "nodes": _nodes(graphs, record, looked),
        "before": [{"name": node.name, "reads": list(node.reads)} for node in record.nodes],
        "steps": _steps(graphs, record),
    }


def _groups(looked: Inspection) -> list[dict[str, Any]]:
    layers = (
        {
            "name": f"layer {layer.index}",
            "module_path": layer.module_path,
            "tokens": {"attention": layer.attention_tokens, "ffn": layer.ffn_tokens},
        }
        for layer in looked.layers
    )
    outside: dict[str, Any] = {"module_path": "", "tokens": None}
    first = {"name": "before layer 1", **outside}
    last = {"name": f"after layer {len(looked.layers)}", **outside}
    reports: list[Any] = [looked.embedding, *looked.layers, looked.head]
    return [
        {
            **group,
            "macs": report.macs,
            "macs_before": report.baseline_macs,
            "leave": report.dropped,
            "return": report.returned,
        }
        for group, report in zip((first, *layers, last), reports, strict=True)
    ]


def _nodes(
    graphs: list[Graph], record: RewriteRecord, looked: Inspection
) -> dict[str, dict[str, Any]]:
    rewired = {e.node for step in record.passes for e in step.events if e.kind == "rewire"}
    reports = {report.name: report for report in looked.nodes}
    regions: dict[str, int] = {}
    for graph in reversed(graphs):  # a node keeps the layer in which it was first there
        regions |= regions_of((node.name for node in graph), record.layers)
    return {
        name: {
            "group": regions[name],
            "kind": "inserted" if node.inserted_by else "rewired" if name in rewired else "author",
            "label": _label(node),
            "op": node.op,
            "target": node.target,
            "module_path": node.module_path,
            "source": node.source and {"place": node.source.place, "code": node.source.code},
            "inserted_by": node.inserted_by,
            **_measured(reports.get(name)),
        }
        for name, node in {node.name: node for graph in graphs for node in graph}.items()
    }


def _measured(report: NodeReport | None) -> dict[str, Any]:
    """Of a node that is still there; one that was erased was not measured."""
    if report is None:
        return {"shape": [], "shape_before": [], "token_dims": [], "macs": 0, "tensor": False}
    return {
        "shape": _listed(report.shape),
        "shape_before": _listed(report.baseline_shape),
        "token_dims": list(report.token_dims),
        "macs": report.macs,
        "tensor": bool(report.shape or report.baseline_shape),
    }


def _listed(shape: Iterable[Any]) -> list[Any]:
    return [list(size) if isinstance(size, tuple) else size for size in shape]


def _label(node: NodeRecord) -> str:
    """What a node is, in a word: an inserted one by its name, a module by the end of its path."""
    if node.inserted_by or node.op in ("placeholder", "output"):
        return node.name
    if node.op in ("call_module", "get_attr"):
        *_, above, last = ["", *node.target.split(".")]
        return last if above.isdecimal() or not above else f"{above}.{last}"
    return node.target.rpartition(".")[2]


def _steps(graphs: list[Graph], record: RewriteRecord) -> list[dict[str, Any]]:
    about = {
        step.name: (getdoc(type(step)) or "").partition("\n")[0]
        for step in passes_for(record.options)
    }
    return [
        {"name": step.name, "about": about[step.name], **_changes(step, before, after)}
        for step, before, after in zip(record.passes, graphs, graphs[1:], strict=False)
    ]


def _changes(step: PassRecord, before: Graph, after: Graph) -> dict[str, Any]:
    was = {node.name: list(node.reads) for node in before}
    there = {node.name for node in after}
    return {
        "inserted": [
            {"name": node.name, "reads": list(node.reads), "after": node.after}
            for node in step.nodes
            if node.name not in was
        ],
        "rewired": [
            {"name": node.name, "reads": list(node.reads), "before": was[node.name]}
            for node in step.nodes
            if node.name in was
        ],
        "erased": [node.name for node in before if node.name not in there],
    }
