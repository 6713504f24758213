"""Runs passes in order, checks what they promise, and keeps a record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from skipvit_fx.ir.editor import Event
from skipvit_fx.pipeline.rewriting import Rewriting


class Pass(Protocol):
    """What a pass is: a frozen dataclass with a name, the facts it needs and makes, and ``run``."""

    @property
    def name(self) -> str:
        """Kebab-case, unique."""

    @property
    def requires(self) -> frozenset[str]:
        """Facts that must hold before."""

    @property
    def provides(self) -> frozenset[str]:
        """Facts that hold afterwards."""

    @property
    def invalidates(self) -> frozenset[str]:
        """Facts that no longer hold afterwards."""

    def run(self, rewriting: Rewriting) -> None:
        """Edit the graph through ``rewriting.editor``, or raise."""


@dataclass(frozen=True)
class PassRecord:
    """What one pass did.

    Attributes:
        name: of the pass.
        events: its edits, in order; empty if it changed nothing.
    """

    name: str
    events: tuple[Event, ...]

    @property
    def modified(self) -> bool:
        return bool(self.events)


def run_passes(passes: Sequence[Pass], rewriting: Rewriting) -> tuple[PassRecord, ...]:
    """Run the passes in order.

    Raises:
        ValueError: a pass requires a fact that no pass before it provides. This is a mistake in the pipeline, found
            before anything runs.
    """
    _check_order(passes, rewriting.facts)
    records = []
    editor = rewriting.editor
    for step in passes:
        editor.events, editor.running = [], step.name
        step.run(rewriting)
        if editor.events:
            editor.graph.lint()
        rewriting.facts |= step.provides
        rewriting.facts -= step.invalidates
        records.append(PassRecord(step.name, tuple(editor.events)))
    rewriting.capture.module.recompile()
    return tuple(records)


def _check_order(passes: Sequence[Pass], facts: set[str]) -> None:
    known = set(facts)
    for step in passes:
        if missing := step.requires - known:
            raise ValueError(
                f"pass {step.name!r} requires {sorted(missing)}, which no pass before it provides"
            )
        known = (known | step.provides) - step.invalidates
