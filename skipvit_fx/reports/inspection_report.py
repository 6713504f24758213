"""The result of :func:`skipvit_fx.inspect`, as a table, as plain values and for networkx."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import networkx as nx

from skipvit_fx.reports.html import Markup, paragraphs, share_bar, table
from skipvit_fx.reports.model_explorer import graph_collection, node_data, write_json
from skipvit_fx.reports.table import columns


@dataclass(frozen=True)
class LayerReport:
    """One layer of the rewritten model, as it runs on one image.

    Attributes:
        index: counts from 1.
        module_path: path of the layer's first attention in the original model.
        attention_tokens: tokens that the attention runs over, that is, its keys.
        queries: tokens that the attention computes; fewer than its keys if the others are never read.
        ffn_tokens: rows that the feed-forward network returns.
        dropped: rows that leave in this layer.
        returned: rows that the sequence gains at this layer's input, where dropped patches return, minus a fused token
            that is removed there. 0 if nothing reads the rows that would return.
        macs, baseline_macs: multiply-adds, now and with skipping off.
        bytes, baseline_bytes: bytes read and written by operators other than matrix products, likewise.
    """

    index: int
    module_path: str
    attention_tokens: int
    queries: int
    ffn_tokens: int
    dropped: int
    returned: int
    macs: int
    baseline_macs: int
    bytes: int
    baseline_bytes: int


@dataclass(frozen=True)
class StageReport:
    """One stage of the plan, by the author's modules.

    Attributes:
        layer: the layer that it scores in, from 1; 0 is the embedding.
        leave_after, leave_before: the modules between which its tokens leave.
        return_before: the module before which they return; ``None`` if they never do.
    """

    layer: int
    leave_after: str
    leave_before: str
    return_before: str | None

    def __str__(self) -> str:
        back = (
            "never return" if self.return_before is None else f"return before {self.return_before}"
        )
        return f"leave after {self.leave_after}, before {self.leave_before}; {back}"


@dataclass(frozen=True)
class RestReport:
    """What is computed outside the layers: before the first (embedding) or after the last (head).

    Attributes:
        dropped: rows that leave in front of the first layer.
        returned: rows that the sequence gains after the last layer; see :class:`LayerReport`.
        macs, baseline_macs: multiply-adds per image, now and with skipping off.
        bytes, baseline_bytes: see :class:`LayerReport`.
    """

    dropped: int
    returned: int
    macs: int
    baseline_macs: int
    bytes: int
    baseline_bytes: int


@dataclass(frozen=True)
class NodeReport:
    """One node of the rewritten graph.

    Attributes:
        name, op, target: as in ``torch.fx``; the target as a string.
        inserted_by: name of the pass that inserted it; ``None`` for the author's nodes.
        layer: the layer that it runs in, from 1; ``None`` before the first and after the last.
        shape: shape of its value for a batch of one; one per tensor if there are several; empty if it is not a tensor.
        macs: multiply-adds per image.
        reads: names of the nodes that it reads.
        baseline_shape: the same as ``shape``, with skipping off.
        token_dims: the dimensions along which tokens lie, as far as known.
        module_path: the author's module in whose forward it was made, or that it calls; empty for inserted nodes.
        source: the author's line that made it, such as ``timm/layers/attention.py:139``; ``None`` for what this package
            inserted.
        code: that line; empty if it was not to be had.
    """

    name: str
    op: str
    target: str
    inserted_by: str | None
    layer: int | None
    shape: tuple[int, ...] | tuple[tuple[int, ...], ...]
    macs: int
    reads: tuple[str, ...]
    baseline_shape: tuple[int, ...] | tuple[tuple[int, ...], ...]
    token_dims: tuple[int, ...]
    module_path: str
    source: str | None
    code: str


_SHOWN = ("op", "target", "inserted_by", "shape", "macs")
"""Attributes of a node of :meth:`Inspection.to_networkx`, besides its layer."""


@dataclass(frozen=True, repr=False)
class Inspection:
    """A rewritten model, inspected with skipping on. ``str()`` is a table of its layers.

    Attributes:
        model: class name of the original model.
        plan, cut, score, eliminate_dead_tokens: the options of the rewrite, as strings and a flag.
        frontend, frontend_reason: how the model was captured, ``"symbolic"`` or ``"export"``, and why.
        skipping: whether skipping is on at the moment; the numbers are always those of the full plan.
        validated: what was found when the rewritten graph ran beside the model, or why it did not run.
        prefix, patches, tail: the numbers of prefix tokens, patches and trailing tokens in the full sequence.
        class_token: which row is the class token and how it was told, such as ``row 0: read by the head``.
        stages: where tokens leave and return.
        layers: from first to last.
        embedding, head: what runs before and after them.
        macs, baseline_macs: multiply-adds per image of the whole model, now and with skipping off.
        search: how the plan was found, as ``save(fast, path, search=...)`` kept it; ``None`` if it was not.
        nodes: the rewritten graph, in order.
    """

    model: str
    plan: str
    cut: str
    score: str
    frontend: str
    frontend_reason: str
    eliminate_dead_tokens: bool
    skipping: bool
    validated: str
    prefix: int
    patches: int
    tail: int
    class_token: str
    stages: tuple[StageReport, ...]
    layers: tuple[LayerReport, ...]
    embedding: RestReport
    head: RestReport
    macs: int
    baseline_macs: int
    search: dict[str, Any] | None
    nodes: tuple[NodeReport, ...]
    _diff: tuple[str, ...]

    def __str__(self) -> str:
        return _layer_table(self)

    __repr__ = __str__

    @property
    def inserted(self) -> tuple[NodeReport, ...]:
        """The nodes that passes inserted, in graph order."""
        return tuple(node for node in self.nodes if node.inserted_by is not None)

    @property
    def tokens(self) -> int:
        """Tokens of the full sequence."""
        return self.prefix + self.patches + self.tail

    def _repr_html_(self) -> str:
        """The table for notebooks."""
        return paragraphs(*_header(self)) + _html_table(self)

    def diff(self) -> str:
        """The captured graph against the rewritten one, as a unified diff that names the pass that made each change.

        Empty if no node changed.
        """
        return "\n".join(self._diff)

    def to_networkx(self) -> nx.DiGraph:
        """The rewritten graph, from each node to those that read it.

        Nodes are named as in ``torch.fx`` and carry ``op``, ``target``, ``inserted_by``, ``layer``, ``shape`` and
        ``macs``, as in :class:`NodeReport`, except that ``layer`` is 0 before the first layer, and the number of layers
        plus one after the last.
        """
        graph = nx.DiGraph()
        last = len(self.layers)
        region = 0
        for node in self.nodes:
            region = node.layer or (last + 1 if region else 0)
            attributes = {name: getattr(node, name) for name in _SHOWN}
            graph.add_node(node.name, **attributes, layer=region)
            graph.add_edges_from((read, node.name) for read in node.reads)
        return graph

    def to_model_explorer(self, path: str | os.PathLike[str] | None = None) -> dict[str, Any]:
        """The rewritten graph for Google's Model Explorer: a graph collection, as plain values for ``json.dumps``.

        Every node has its tokens, multiply-adds, shapes, source line and, if it was inserted, the pass, as attributes.

        Args:
            path: a file to write it to as well, which Model Explorer opens; its name ends with ``.json``.

        Raises:
            ExportError: the file cannot be written.
        """
        collection = graph_collection(self)
        if path is not None:
            write_json(collection, Path(path))
        return collection

    def model_explorer_data(self) -> dict[str, dict[str, Any]]:
        """Tokens, multiply-adds and passes by node, by which Model Explorer colours :meth:`to_model_explorer`.

        Each value is what a file of node data holds.
        """
        return node_data(self)

    def to_dict(self) -> dict[str, Any]:
        """Everything except the author's nodes and the diff, as plain values for ``json.dumps``."""
        plain = asdict(self)
        del plain["nodes"], plain["_diff"]
        plain["inserted"] = [asdict(node) for node in self.inserted]
        listed: dict[str, Any] = _with_lists(plain)
        return listed


def _with_lists(value: Any) -> Any:
    """A value with lists in place of tuples, as JSON returns it."""
    if isinstance(value, dict):
        return {name: _with_lists(item) for name, item in value.items()}
    return [_with_lists(item) for item in value] if isinstance(value, (list, tuple)) else value


# -- table ------------------------------------------------------------------------------------------------------------

_HEAD = ("layer", "attention in", "keys", "queries", "FFN rows", "GMACs", "before", "")


def _layer_table(report: Inspection) -> str:
    """The options, one line per layer, the totals, where tokens leave and return, and the inserted nodes."""
    parts = ["\n".join(_header(report)), "\n".join(columns(_rows(report), to_the_left=(1, 7)))]
    if report.stages:
        parts.append("\n".join(f"layer {stage.layer}: {stage}" for stage in report.stages))
    if report.inserted:
        parts.append("\n".join(_inserted(report)))
    return "\n\n".join(parts)


def _header(report: Inspection) -> Iterator[str]:
    plan = f"plan {report.plan}" if report.plan else "an empty plan"
    yield f"{report.model} with {plan}, cut after the {report.cut}, score {report.score}"
    sequence = f"{report.prefix} prefix + {report.patches} patch"
    if report.tail:
        sequence += f" + {report.tail} trailing"
    dead = "not computed" if report.eliminate_dead_tokens else "computed anyway"
    yield f"{sequence} tokens; rows that nothing reads are {dead}; multiply-adds per image"
    yield f"class token: {report.class_token}"
    yield f"captured by the front end {report.frontend!r}: {report.frontend_reason}"
    yield report.validated
    if report.search is not None:
        yield _found(report.search)
    if not report.skipping:
        yield "Skipping is switched off at the moment; the table shows it on."


def _found(search: dict[str, Any]) -> str:
    """In one sentence on which model and images a plan was found."""
    held = search["held_out"]
    kept_back = "" if held is None else f", {held:.4f} on {search['held_out_images']} held out"
    return (
        f"plan found by a search of {search['evaluated']} plans on {search['model']} (fingerprint "
        f"{search['fingerprint'][:12]}): {search['metric']} {search['quality']:.4f} on {search['images']} images"
        f"{kept_back}"
    )


def _rows(report: Inspection) -> Iterator[Sequence[str]]:
    yield _HEAD
    yield _row("embedding", "", macs=_macs(report.embedding), note=_moves(report.embedding))
    for layer in report.layers:
        yield _row(
            str(layer.index),
            layer.module_path,
            (layer.attention_tokens, layer.queries, layer.ffn_tokens),
            _macs(layer),
            _moves(layer),
        )
    yield _row("head", "", macs=_macs(report.head), note=_moves(report.head))
    saved = f"{report.macs / report.baseline_macs:.1%}" if report.baseline_macs else ""
    yield _row("total", "", macs=(report.macs, report.baseline_macs), note=saved)


def _macs(report: LayerReport | RestReport) -> tuple[int, int]:
    return report.macs, report.baseline_macs


def _moves(report: LayerReport | RestReport) -> str:
    moves = (report.returned, "return"), (report.dropped, "leave")
    return ", ".join(f"{count} {verb}" for count, verb in moves if count)


def _row(
    name: str, place: str, tokens: Sequence[int] = (), macs: Sequence[int] = (), note: str = ""
) -> Sequence[str]:
    counts = [str(count) for count in tokens] or ["", "", ""]
    return (name, place, *counts, *(f"{count / 1e9:.4f}" for count in macs), note)


def _html_table(report: Inspection) -> Markup:
    """The same rows, with bars for the tokens and multiply-adds that are left in each layer."""
    head, first, *layers, last, total = _rows(report)
    barred = [
        (
            *row[:4],
            share_bar(row[4], layer.ffn_tokens, report.tokens),
            share_bar(row[5], layer.macs, layer.baseline_macs),
            *row[6:],
        )
        for row, layer in zip(layers, report.layers, strict=True)
    ]
    return table(head, [first, *barred, last, total], to_the_left=(1, 7))


def _inserted(report: Inspection) -> Iterator[str]:
    yield "Inserted:"
    rows = [
        (
            f"  {node.target if node.op == 'call_module' else node.name}",
            f"layer {node.layer}" if node.layer else "outside the layers",
            node.inserted_by or "",
            f"reads {', '.join(node.reads)}" if node.reads else "",
        )
        for node in report.inserted
    ]
    yield from columns(rows, to_the_left=range(4))
