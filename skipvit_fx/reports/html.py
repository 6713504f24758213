"""Tables for notebooks. All text is escaped."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Sequence
from html import escape

BAR = "position:absolute;inset:auto auto 0 0;height:2px;background:currentColor;opacity:.5"


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def table(
    head: Sequence[str], rows: Iterable[Sequence[object]], to_the_left: Container[int] = ()
) -> Markup:
    """Cells as a table; numbers are right-aligned, and so is text, except in the columns ``to_the_left``."""

    def line(cells: Sequence[object], tag: str) -> str:
        side = ["left" if i in to_the_left else "right" for i in range(len(cells))]
        return "".join(
            f'<{tag} style="text-align:{where}">{html(cell)}</{tag}>'
            for where, cell in zip(side, cells, strict=True)
        )

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return Markup(f"<table><thead><tr>{line(head, 'th')}</tr></thead><tbody>{body}</tbody></table>")


def html(value: object) -> str:
    """A value as HTML."""
    return value if isinstance(value, Markup) else escape(str(value))


def paragraphs(*texts: str) -> Markup:
    """Texts below each other, with their line breaks."""
    return Markup(
        "".join(f'<p style="white-space:pre-line">{html(text)}</p>' for text in texts if text)
    )


def share_bar(text: str, part: float, whole: float) -> Markup:
    """Text above a bar that is as long as the part is of the whole, where the whole is as long as the cell."""
    width = f"{100 * min(part / whole, 1) if whole else 0:.1f}%"
    return Markup(
        f'<div style="position:relative;min-width:6em">{escape(text)}<div style="{BAR};width:{width}"></div></div>'
    )


def patch_map(kept: Collection[int], grid: tuple[int, int]) -> Markup:
    """A drawing of the grid in which the kept patches are filled."""
    rows, columns = grid
    cells = "".join(f"M{i % columns} {i // columns}h1v1h-1z" for i in sorted(kept))
    said = f"{len(kept)} of {rows * columns} patches are kept"
    return Markup(
        f'<svg role="img" aria-label="{said}" viewBox="0 0 {columns} {rows}" width="{min(6 * columns, 120)}">'
        f'<rect width="{columns}" height="{rows}" fill="currentColor" fill-opacity=".12"/>'
        f'<path d="{cells}" fill="currentColor" fill-opacity=".75"/></svg>'
    )
