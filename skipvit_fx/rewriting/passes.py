"""What a pass is, and how passes run: in order, with the conditions of each checked on the graph itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from skipvit_fx.graph.editor import GraphEditor
from skipvit_fx.graph.record import NodeRecord, PassRecord, node_records
from skipvit_fx.rewriting.context import Context


@dataclass(frozen=True)
class Condition:
    """Something that holds between two passes.

    Attributes:
        name: kebab-case.
        fault: what is wrong, in a sentence that names a node; empty if the condition holds.
    """

    name: str
    fault: Callable[[Context], str]


class Pass(Protocol):
    """A frozen dataclass with a name, what it needs, what it promises, and ``run``."""

    @property
    def name(self) -> str:
        """Kebab-case, unique."""

    @property
    def requires(self) -> tuple[Condition, ...]:
        """What must hold before it runs."""

    @property
    def ensures(self) -> tuple[Condition, ...]:
        """What holds afterwards."""

    def run(self, context: Context) -> None:
        """Edit the graph through ``context.editor``, or raise."""


class PassError(Exception):
    """A pass did not get what it requires, or broke its promise: a bug in this package or in a pass, not in a model."""


def run_passes(passes: Iterable[Pass], context: Context) -> tuple[PassRecord, ...]:
    """Run the passes in order.

    Raises:
        PassError: the graph is not as a pass requires, or not as it promised to leave it.
    """
    records = []
    editor = context.editor
    for step in passes:
        _check(step.name, "requires", step.requires, context)
        editor.events, editor.running = [], step.name
        step.run(context)
        if editor.events:
            editor.graph.lint()
        _check(step.name, "ensures", step.ensures, context)
        records.append(PassRecord(step.name, tuple(editor.events), _touched(editor)))
    context.capture.module.recompile()
    return tuple(records)


def _touched(editor: GraphEditor) -> tuple[NodeRecord, ...]:
    """The nodes that the events are about, as far as they are still there."""
    names = {event.node for event in editor.events}
    return tuple(node_records(editor.graph, names))


def _check(name: str, verb: str, conditions: Iterable[Condition], context: Context) -> None:
    for condition in conditions:
        if fault := condition.fault(context):
            raise PassError(f"pass {name!r} {verb} {condition.name!r}, but {fault}")
