"""Where in the author's code a node was made, as ``torch.fx`` keeps it and prints it: ``node.stack_trace``."""

from __future__ import annotations

import functools
import linecache
import re
import sys
from pathlib import Path
from typing import NamedTuple

from torch import fx

from skipvit_fx.names import INSERTED
from skipvit_fx.ops.guard import guard
from skipvit_fx.ops.mode import by_mode

_OURS = "<skipvit_fx>"
"""The file in the trace of a node that this package inserted."""

_FRAME = re.compile(r'^ *File "(.+)", line (\d+), in (.+)\n *(.*)$', re.MULTILINE)
"""One call as Python spells it: the first line has the place, the second the code."""


class Source(NamedTuple):
    """A line of the author's code.

    Attributes:
        file: as Python knows it.
        line: counts from 1.
        function: the function that it is in.
        code: the line itself, without its indentation; empty if it was not to be had.
    """

    file: str
    line: int
    function: str
    code: str

    @property
    def place(self) -> str:
        """File and line, such as ``timm/layers/attention.py:139``, whatever folder Python imports it from."""
        return f"{_imported_as(self.file)}:{self.line}"


class Frame(NamedTuple):
    """A call that was running: its file, the line that it was at, and its function."""

    file: str
    line: int
    function: str


@functools.lru_cache(maxsize=4096)
def spelled_trace(frames: tuple[Frame, ...]) -> str:
    """Calls as Python spells them, outermost first. Equal ones share a string, as those of equal layers do."""
    return "\n".join(_spelled(f, linecache.getline(f.file, f.line).strip()) for f in frames)


def trace_of_inserted(by: str) -> str:
    """The trace of a node that this package inserted: it names the pass, or whatever else inserted it."""
    return _spelled(Frame(_OURS, 1, by), f"inserted by {by}")


def without_files(trace: str, unwanted: tuple[str, ...]) -> str:
    """The trace without the calls in files below these folders."""
    frames = [Source(f, int(n), name, code) for f, n, name, code in _FRAME.findall(trace)]
    wanted = (frame for frame in frames if not frame.file.startswith(unwanted))
    return "\n".join(_spelled(Frame(*frame[:3]), frame.code) for frame in wanted)


def source_of(node: fx.Node) -> Source | None:
    """The line of the author's code that made the node; ``None`` for one that this package inserted."""
    return _innermost(node.stack_trace or "")


def trace_every_node(graph: fx.Graph) -> None:
    """Give each node of a captured graph a trace that has none.

    Parameters, and parts of what a module returned, have that of their first reader; what the capture inserted says so.
    """
    for node in reversed(graph.nodes):
        if node.stack_trace or node.op in ("placeholder", "output"):
            continue
        readers = (user.stack_trace for user in node.users if user.op != "output")
        ours = str(node.target).startswith(INSERTED) or node.target in (guard, by_mode)
        read = None if ours else next(filter(None, readers), None)
        node.stack_trace = read or trace_of_inserted("the capture")


def _imported_as(file: str) -> str:
    """The path below the innermost folder of ``sys.path`` that holds a file; its name if there is none."""
    folders = (Path(folder).resolve() for folder in sys.path)
    holding = [folder for folder in folders if Path(file).is_relative_to(folder)]
    inner = max(holding, key=lambda folder: len(folder.parts), default=Path(file).parent)
    return Path(file).relative_to(inner).as_posix()


@functools.lru_cache(maxsize=4096)
def _innermost(trace: str) -> Source | None:
    frames = _FRAME.findall(trace)
    if not frames or frames[-1][0] == _OURS:
        return None
    file, line, function, code = frames[-1]
    return Source(file, int(line), function, "" if code == _NO_CODE else code)


def _spelled(frame: Frame, code: str) -> str:
    return f'  File "{frame.file}", line {frame.line}, in {frame.function}\n    {code or _NO_CODE}'


_NO_CODE = "(the source is not at hand)"
