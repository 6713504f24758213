"""An inspection in the JSON of Google's Model Explorer: a graph collection, and data for its nodes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipvit_fx.errors import ExportError
from skipvit_fx.files import appearing

if TYPE_CHECKING:
    from skipvit_fx.reports.inspection_report import Inspection, LayerReport, NodeReport

_INSERTED = {
    "backgroundColor": "#fff0dc",
    "borderColor": "#d27412",
    "hoveredBorderColor": "#8a4400",
}
_FROM_PALE_TO_DARK = [{"stop": 0, "bgColor": "#f2f7fc"}, {"stop": 1, "bgColor": "#4a90d9"}]


def graph_collection(report: Inspection) -> dict[str, Any]:
    """A ``GraphCollection`` with one graph; nodes lie in their layer, and below it in the modules that made them."""
    regions = dict(zip((node.name for node in report.nodes), _places(report), strict=True))
    graph = {
        "id": _graph_id(report),
        "nodes": [_node(node, regions[node.name]) for node in report.nodes],
        "groupNodeAttributes": {
            "": {
                "model": report.model,
                "plan": report.plan,
                "multiply-adds": f"{report.macs:,} of {report.baseline_macs:,}",
                "validated": report.validated,
            },
            **{f"layer {layer.index}": _of_layer(layer) for layer in report.layers},
        },
    }
    return {"label": f"{report.model}, rewritten", "graphs": [graph]}


def node_data(report: Inspection) -> dict[str, dict[str, Any]]:
    """Values by which Model Explorer colours the nodes: a ``ModelNodeData`` for each of the names."""
    tokens = {node.name: {"value": _tokens(node)} for node in report.nodes if _tokens(node)}
    macs = {node.name: {"value": node.macs} for node in report.nodes if node.macs}
    inserted = {
        node.name: {"value": node.inserted_by, "bgColor": _INSERTED["backgroundColor"]}
        for node in report.inserted
    }
    found: dict[str, dict[str, Any]] = {
        "tokens": {"results": tokens, "gradient": _FROM_PALE_TO_DARK},
        "multiply-adds": {"results": macs, "gradient": _FROM_PALE_TO_DARK},
        "inserted by": {"results": inserted},
    }
    return {
        name: {_graph_id(report): {"name": name, **values}}
        for name, values in found.items()
        if values["results"]
    }


def write_json(content: Any, path: Path) -> None:
    """Write a file, completely or not at all.

    Raises:
        ExportError: it cannot be written.
    """
    try:
        with appearing(path) as unfinished:
            unfinished.write_text(json.dumps(content), encoding="utf-8")
    except OSError as error:
        raise ExportError(
            f"cannot write {path}: {error.strerror or error}",
            hint="give the name of a file in a folder that exists and may be written to",
        ) from error


def _graph_id(report: Inspection) -> str:
    return f"{report.model} with {report.plan}" if report.plan else report.model


def _places(report: Inspection) -> Iterator[str]:
    """The group of every node, in order."""
    place = "before layer 1"
    for node in report.nodes:
        if node.layer is not None:
            place = f"layer {node.layer}"
        elif place != "before layer 1":
            place = f"after layer {len(report.layers)}"
        yield place


def _node(node: NodeReport, place: str) -> dict[str, Any]:
    *within, last = node.module_path.split(".")
    called = node.op == "call_module" and bool(node.module_path)
    modules = within if called else [*within, last]
    below = ["inserted"] if node.inserted_by else [name for name in modules if name]
    written: dict[str, Any] = {
        "id": node.name,
        "label": last if called else node.name if node.inserted_by else node.target,
        "namespace": "/".join([place, *below]),
        "attrs": [{"key": key, "value": value} for key, value in _attributes(node)],
        "incomingEdges": [
            {"sourceNodeId": read, "sourceNodeOutputId": "0", "targetNodeInputId": str(i)}
            for i, read in enumerate(node.reads)
        ],
        "outputsMetadata": [
            {"id": "0", "attrs": [{"key": "tensor_shape", "value": _shape(node.shape)}]}
        ],
    }
    return written | ({"style": _INSERTED} if node.inserted_by else {})


def _attributes(node: NodeReport) -> Iterator[tuple[str, str]]:
    yield "op", f"{node.op} {node.target}"
    if node.inserted_by:
        yield "inserted by", node.inserted_by
    if node.shape:
        yield "shape", _shape(node.shape)
    if node.baseline_shape not in ((), node.shape):
        yield "shape with skipping off", _shape(node.baseline_shape)
    if tokens := _tokens(node):
        yield "tokens", str(tokens)
    yield "multiply-adds", str(node.macs)
    if node.module_path:
        yield "module", node.module_path
    if node.source:
        yield "source line", f"{node.source}: {node.code}" if node.code else node.source


def _of_layer(layer: LayerReport) -> dict[str, str]:
    return {
        "attention": layer.module_path,
        "tokens in the attention": str(layer.attention_tokens),
        "tokens after the feed-forward network": str(layer.ffn_tokens),
        "leave": str(layer.dropped),
        "return": str(layer.returned),
        "multiply-adds": f"{layer.macs:,} of {layer.baseline_macs:,}",
    }


def _tokens(node: NodeReport) -> int:
    """The length of the first axis of tokens; 0 if none is known."""
    lengths = [node.shape[dim] for dim in node.token_dims if dim < len(node.shape)]
    return next((length for length in lengths if isinstance(length, int)), 0)


def _shape(shape: tuple[Any, ...]) -> str:
    if shape and not isinstance(shape[0], int):
        return ", ".join(map(_shape, shape))
    return "x".join(map(str, shape))
