"""Two graphs, line by line."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence

from skipvit_fx.graph.record import RewriteRecord


def graph_diff(record: RewriteRecord, after: Sequence[str]) -> tuple[str, ...]:
    """A unified diff from the captured graph to ``after``; every changed line ends with the passes that changed it."""
    lines = difflib.unified_diff(
        record.before,
        after,
        fromfile=record.model,
        tofile=f"{record.model} with {record.plan}"
        if record.plan.stages
        else f"{record.model}, rewritten",
        lineterm="",
    )
    return tuple(_with_reasons(lines, _reasons(record)))


def _reasons(record: RewriteRecord) -> dict[tuple[str, str], list[str]]:
    """The passes that touched a node, by the node's name and the sign of its line in a diff."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for step in record.passes:
        for event in step.events:
            signs = {"insert": "+", "rewire": "+", "erase": "-"}[event.kind]
            passes = reasons.setdefault((signs, event.node), [])
            if step.name not in passes:
                passes.append(step.name)
    return reasons


def _with_reasons(lines: Iterator[str], reasons: dict[tuple[str, str], list[str]]) -> Iterator[str]:
    for line in lines:
        name, equals, _ = line[1:].partition(" = ")
        passes = reasons.get((line[0], name if equals else "output"))
        yield f"{line}  # {', '.join(passes)}" if passes else line
