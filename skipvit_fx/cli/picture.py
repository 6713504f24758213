"""Reads an image file, and writes a picture of the kept patches."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from skipvit_fx.cli.models import SpecError, need
from skipvit_fx.reports.tokens import TokenTrace

DIMMED = 0.25


def read_image(path: Path, shape: tuple[int, int, int], model: nn.Module) -> tuple[Tensor, Tensor]:
    """The image at the model's size, as ``[3, H, W]`` in [0, 1], and normalised as a batch of one.

    Mean and standard deviation are those of the model's ``pretrained_cfg``, or 0.5.

    Raises:
        SpecError: it is not a readable image.
    """
    images = need("PIL.Image", "demo")
    channels, height, width = shape
    if channels != 3:
        raise SpecError(
            f"the model takes {channels} channels, not a colour picture",
            hint="skipvit_fx.trace_tokens(fast, x) takes any input",
        )
    try:
        with images.open(path) as opened:
            image = opened.convert("RGB").resize((width, height), images.Resampling.BICUBIC)
    except OSError as error:
        raise SpecError(
            f"{path} is not a readable image: {error}", hint="use PNG or JPEG"
        ) from error
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    picture = pixels.reshape(height, width, 3).permute(2, 0, 1).float() / 255
    config = getattr(model, "pretrained_cfg", None) or {}
    mean, std = (
        torch.tensor(config.get(key) or (0.5,) * 3)[:, None, None] for key in ("mean", "std")
    )
    return picture, ((picture - mean) / std)[None]


def patch_grid(patches: int, height: int, width: int) -> tuple[int, int] | None:
    """Rows and columns of a grid of square patches; ``None`` if the count does not fit one."""
    rows = round(math.sqrt(patches * height / width))
    if rows and patches % rows == 0:
        columns = patches // rows
        if rows * width == columns * height and height % rows == 0:
            return rows, columns
    return None


def dim_dropped(picture: Tensor, kept: Tensor, grid: tuple[int, int]) -> Tensor:
    """The picture ``[3, H, W]`` with all patches except the kept ones darkened."""
    rows, columns = grid
    light = torch.full((rows * columns,), DIMMED)
    light[kept] = 1.0
    light = light.view(rows, columns)
    _, height, width = picture.shape
    spread = light.repeat_interleave(height // rows, 0).repeat_interleave(width // columns, 1)
    return picture * spread


def mean_colours(picture: Tensor, owner: Tensor, grid: tuple[int, int]) -> Tensor:
    """The picture ``[3, H, W]`` with every patch in the mean colour of the token that it is part of."""
    rows, columns = grid
    _, height, width = picture.shape
    size = (height // rows, width // columns)
    patches = picture.reshape(3, rows, size[0], columns, size[1])
    colours = patches.mean((2, 4)).flatten(1)
    sums = torch.zeros(3, int(owner.max()) + 1).index_add(1, owner, colours)
    means = (sums / owner.bincount().clamp(min=1))[:, owner].view(3, rows, columns)
    return means.repeat_interleave(size[0], 1).repeat_interleave(size[1], 2)


def after_stage(picture: Tensor, stage: TokenTrace, grid: tuple[int, int]) -> Tensor:
    """What is left of the first sample's picture ``[3, H, W]``: dropped patches dark, merged ones of one colour."""
    if stage.owner is None:
        return dim_dropped(picture, stage.kept[0].cpu(), grid)
    return mean_colours(picture, stage.owner[0].cpu(), grid)


def write_picture(panels: list[Tensor], path: Path) -> None:
    """Write pictures side by side to an image file.

    Raises:
        SpecError: the file cannot be written.
    """
    images = need("PIL.Image", "demo")
    row = torch.cat(panels, dim=2)
    data = (row * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()
    height, width, _ = data.shape
    image: Any = images.frombytes("RGB", (width, height), bytes(data.flatten().tolist()))
    try:
        image.save(path)
    except (OSError, ValueError) as error:
        raise SpecError(f"cannot write {path}: {error}", hint="end its name with .png") from error
