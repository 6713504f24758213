"""Blocks in a terminal, and how far long work is."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from skipvit_fx.cli import progress
from skipvit_fx.cli.picture import print_patches
from skipvit_fx.reports.grid import Grid
from skipvit_fx.reports.token_report import TokenTrace


def printed(*stages: TokenTrace, width: int, colours: bool = False) -> list[str]:
    """Of a picture of 3 x 4 patches of 2 x 2 pixels whose red is the patch's number, out of 255."""
    numbers = torch.arange(12.0).view(3, 4) / 255
    red = numbers.repeat_interleave(2, 0).repeat_interleave(2, 1)
    picture = torch.stack([red, torch.ones_like(red), torch.zeros_like(red)])
    system = "truecolor" if colours else None
    file = io.StringIO()
    console = Console(file=file, width=width, color_system=system, force_terminal=colours)
    print_patches(console, picture, stages, Grid(3, 4))
    return [line for line in file.getvalue().splitlines() if line.strip()]


def stage(layer: int, *kept: int, owner: list[int] | None = None) -> TokenTrace:
    left = [i for i in range(12) if i not in kept]
    where = None if owner is None else torch.tensor([owner])
    return TokenTrace(layer, torch.tensor([kept]), torch.tensor([left]), torch.zeros(1, 12), where)


def test_every_kept_patch_is_a_block() -> None:
    lines = printed(stage(1, 0, 5, 11), width=40)
    assert [line.rstrip() for line in lines] == ["layer 1", "██", "  ██", "      ██"]


def test_a_narrow_terminal_gets_two_rows_in_a_line() -> None:
    lines = printed(stage(1, 0, 5, 11), stage(2, 0), width=12)
    assert "▀▄" in "".join(lines)
    assert max(len(line.rstrip()) for line in lines) <= 12


def test_stages_are_side_by_side() -> None:
    first, *_ = printed(stage(1, 0, 5), stage(2, 0), width=60)
    assert first.split() == ["layer", "1", "layer", "2"]


def test_colours_are_those_of_the_patches() -> None:
    assert "38;2;5;255;0m█" in "".join(printed(stage(1, 5, 11), width=40, colours=True))


def test_a_merged_token_has_the_mean_colour() -> None:
    owner = [0, 1, 2, 3, 0, 4, 5, 6, 7, 8, 9, 10]
    kept = (0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11)
    assert "38;2;2;255;0m█" in "".join(
        printed(stage(1, *kept, owner=owner), width=40, colours=True)
    )


@pytest.mark.parametrize("looking", [True, False])
def test_progress_is_shown_to_whoever_looks(monkeypatch: pytest.MonkeyPatch, looking: bool) -> None:
    file = io.StringIO()

    def console(**_: object) -> Console:
        return Console(file=file, force_terminal=looking, width=80)

    monkeypatch.setattr(progress, "Console", console)
    with progress.counting("Measuring") as step:
        step(1, 4)
    with progress.waiting("Rewriting"):
        pass
    shown = file.getvalue()
    assert ("Measuring" in shown) == ("Rewriting" in shown) == looking
