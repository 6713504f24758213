"""Shows on stderr how far long work is, if someone looks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


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


def _progress(
    *columns: TextColumn | BarColumn | TimeElapsedColumn | TimeRemainingColumn,
) -> Progress:
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
