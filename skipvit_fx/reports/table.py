"""Tables as lines of text."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence


def columns(rows: Iterable[Sequence[str]], to_the_left: Container[int]) -> Iterator[str]:
    """Cells as lines of text, columns as wide as their widest cell; right-aligned except those in ``to_the_left``."""
    cells = list(rows)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        padded = [
            cell.ljust(width) if i in to_the_left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(padded).rstrip()
