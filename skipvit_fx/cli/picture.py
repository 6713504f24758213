"""Draws the patches that are kept: as a picture in a file, and with block characters in a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import typer
from torch import Tensor

from skipvit_fx.cli.models import SpecError
from skipvit_fx.reports.grid import Grid
from skipvit_fx.reports.pictures import patch_colours, token_colours
from skipvit_fx.reports.token_report import TokenTrace

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text


def write_picture(save: Callable[[Path], None], path: Path) -> None:
    """Call ``save`` with the path of an image file, and say so on stderr.

    Raises:
        SpecError: the file cannot be written.
    """
    try:
        save(path)
    except (OSError, ValueError) as error:
        raise SpecError(f"cannot write {path}: {error}", hint="end its name with .png") from error
    typer.echo(f"picture written to {path}", err=True)


def print_patches(
    console: Console, picture: Tensor, traces: Sequence[TokenTrace], grid: Grid
) -> None:
    """Print one drawing per stage, side by side where there is room: a block for each token that is left.

    Each is of the mean colour of its patch, or of the patches that were merged into it, where the terminal has colours.
    """
    from rich.columns import Columns

    scale = 2 if 2 * grid.columns * len(traces) <= console.width else 1
    drawn: list[RenderableType] = []
    for stage in traces:
        kept = torch.zeros(grid.rows * grid.columns, dtype=torch.bool)
        kept[stage.kept_of(0).cpu()] = True
        colours = (
            patch_colours(picture, grid)
            if stage.owner is None
            else token_colours(picture, stage.owner[0].cpu(), grid)
        )
        drawn.append(_blocks(f"layer {stage.layer}", kept, colours, grid, scale))
    console.print(Columns(drawn, padding=(1, 2)))


def _blocks(title: str, kept: Tensor, colours: Tensor, grid: Grid, scale: int) -> Text:
    """Two rows of patches in a line of text, as a character is twice as high as wide."""
    from rich.text import Text

    shape = (grid.rows, grid.columns)
    there = kept.view(shape).repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    shades = (colours * 255).round().int().view(3, *shape)
    shades = shades.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    text = Text(f"{title}\n", no_wrap=True, end="")
    for top in range(0, len(there), 2):
        for cell, style in _cells(there[top : top + 2], shades[:, top : top + 2]):
            text.append(cell, style)
        text.append("\n")
    return text


def _cells(there: Tensor, shades: Tensor) -> Iterator[tuple[str, str]]:
    """The characters of one line with their colours, for one or two rows of patches."""
    for column in range(there.shape[1]):
        halves = [
            "rgb({},{},{})".format(*shade.tolist()) if on else ""
            for on, shade in zip(there[:, column], shades[:, :, column].T, strict=True)
        ]
        match halves:
            case [str(upper), str(lower)] if upper and lower:
                yield ("█", upper) if upper == lower else ("▀", f"{upper} on {lower}")
            case [str(upper), *_] if upper:
                yield "▀", upper
            case [_, str(lower)] if lower:
                yield "▄", lower
            case _:
                yield " ", ""
