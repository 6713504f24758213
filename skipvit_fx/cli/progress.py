"""Shows on stderr how far long work is, if someone looks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from skipvit_fx.planner.running import Progress as Searched


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """While the context lasts, show what is done and for how long; nothing where stderr is no terminal."""
    with _progress(TextColumn("{task.description}"), TimeElapsedColumn()) as bar:
        bar.add_task(what, total=None)
        yield


@contextlib.contextmanager
def counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar and the time that is left; the yielded function takes the number of steps done, and their total."""
    with _progress(
        TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(compact=True)
    ) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextlib.contextmanager
def searching(share: float) -> Iterator[Callable[[Searched], None]]:
    """Show a bar with the best plan so far that has at most this share of the model's multiply-adds."""
    with _progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    ) as bar:
        task = bar.add_task("the model itself", total=None)

        def update(found: Searched) -> None:
            bar.update(
                task,
                description=_best(found, share),
                completed=found.evaluated,
                total=max(found.trials, found.evaluated),
            )

        yield update


def _best(found: Searched, share: float) -> str:
    cheap = [one for one in found.front if one.macs <= share * found.baseline_macs]
    if not cheap:
        return "no plan within the budget yet"
    best = max(cheap, key=lambda one: one.quality)
    return f"{best.plan}: {best.quality:.3f} at {best.macs / found.baseline_macs:.1%}"


def _progress(*columns: ProgressColumn) -> Progress:
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
