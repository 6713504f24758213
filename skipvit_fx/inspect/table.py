"""The layer table, in plain text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from skipvit_fx.inspect.inspection import Inspection

_HEAD = ("layer", "attention in", "keys", "queries", "FFN rows", "GMACs", "before", "")
_TO_THE_LEFT = (1, 7)


def layer_table(report: Inspection) -> str:
    """What was asked for, one line a layer, the totals, and where each inserted node went."""
    parts = ["\n".join(_header(report)), "\n".join(columns(_rows(report)))]
    if report.inserted:
        parts.append("\n".join(_inserted(report)))
    return "\n\n".join(parts)


def _header(report: Inspection) -> Iterator[str]:
    plan = f"plan {report.plan}" if report.plan else "an empty plan"
    yield f"{report.model} with {plan}, cut after the {report.cut}, score {report.score}"
    sequence = f"{report.prefix} prefix + {report.patches} patch"
    if report.tail:
        sequence += f" + {report.tail} trailing"
    dead = "not computed" if report.eliminate_dead_tokens else "computed all the same"
    yield f"{sequence} tokens; rows that nobody reads are {dead}; multiply-adds per image"
    if not report.skipping:
        yield "Skipping is switched off at the moment; the table shows it on."


def _rows(report: Inspection) -> Iterator[Sequence[str]]:
    yield _HEAD
    yield _row("embedding", "", macs=(report.embedding.macs, report.embedding.baseline_macs))
    for layer in report.layers:
        notes = []
        if layer.returned:
            notes.append(f"{layer.returned} return")
        if layer.dropped:
            notes.append(f"{layer.dropped} leave")
        yield _row(
            str(layer.index),
            layer.module_path,
            (layer.attention_tokens, layer.queries, layer.ffn_tokens),
            (layer.macs, layer.baseline_macs),
            ", ".join(notes),
        )
    head = f"{report.head.returned} return" if report.head.returned else ""
    yield _row("head", "", macs=(report.head.macs, report.head.baseline_macs), note=head)
    saved = f"{report.macs / report.baseline_macs:.1%}" if report.baseline_macs else ""
    yield _row("total", "", macs=(report.macs, report.baseline_macs), note=saved)


def _row(
    name: str, place: str, tokens: Sequence[int] = (), macs: Sequence[int] = (), note: str = ""
) -> Sequence[str]:
    counts = [str(count) for count in tokens] or ["", "", ""]
    return (name, place, *counts, *(f"{count / 1e9:.4f}" for count in macs), note)


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


def columns(
    rows: Iterator[Sequence[str]] | Sequence[Sequence[str]],
    to_the_left: Sequence[int] = _TO_THE_LEFT,
) -> Iterator[str]:
    """Cells as lines of text, every column as wide as its widest cell; to the right but for those named."""
    cells = list(rows)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        padded = [
            cell.ljust(width) if i in to_the_left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(padded).rstrip()
