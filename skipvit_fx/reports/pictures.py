"""Pictures of what is left of an image, as tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from skipvit_fx.errors import ReportError
from skipvit_fx.optional import need
from skipvit_fx.reports.grid import Grid

if TYPE_CHECKING:
    from skipvit_fx.reports.token_report import TokenTrace

DIMMED = 0.25
"""How bright a dropped patch is."""


def preprocessing(model: nn.Module) -> Mapping[str, Any]:
    """How the model's pictures are prepared, by its ``pretrained_cfg``; empty if it has none."""
    config = getattr(model, "pretrained_cfg", None)
    return config if isinstance(config, Mapping) else {}


def normalisation(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation ``[3, 1, 1]`` by the model's configuration, or 0.5."""
    config = preprocessing(model)
    mean, std = (
        torch.tensor(config.get(key) or (0.5,) * 3)[:, None, None] for key in ("mean", "std")
    )
    return mean, std


def shown(image: Tensor, model: nn.Module) -> Tensor:
    """An image ``[channels, height, width]`` that the model takes, as a picture ``[3, height, width]`` in [0, 1].

    Colours are those before the normalisation of the model's configuration. An image that is then out of range, or
    that has no three channels, is stretched from its lowest to its highest value, and shown grey.
    """
    picture = image.detach().float().cpu()
    if len(picture) == 3:
        mean, std = normalisation(model)
        colours = picture * std + mean
        if bool(((colours > -0.05) & (colours < 1.05)).all()):
            return colours.clamp(0, 1)
    else:
        picture = picture.mean(0, keepdim=True).expand(3, -1, -1)
    low, high = picture.min(), picture.max()
    return (picture - low) / (high - low).clamp(min=1e-12)


def as_image(picture: Tensor) -> Any:
    """A picture ``[3, height, width]`` in [0, 1] as a PIL image.

    Raises:
        ReportError: Pillow is not installed.
    """
    images = need("PIL.Image", "report", ReportError)
    pixels = (picture * 255).round().to(torch.uint8).permute(1, 2, 0)
    height, width, _ = pixels.shape
    return images.frombytes("RGB", (width, height), bytes(pixels.flatten().tolist()))


def dim_dropped(picture: Tensor, kept: Tensor, grid: Grid) -> Tensor:
    """The picture ``[3, height, width]`` with all patches except the kept ones darkened."""
    light = torch.full((grid.rows * grid.columns,), DIMMED)
    light[kept] = 1.0
    return picture * _spread(light, picture, grid)


def patch_colours(picture: Tensor, grid: Grid) -> Tensor:
    """The mean colour ``[3, patches]`` of every patch of a picture ``[3, height, width]``."""
    rows, columns = grid
    _, height, width = picture.shape
    patches = picture.reshape(3, rows, height // rows, columns, width // columns)
    return patches.mean((2, 4)).flatten(1)


def token_colours(picture: Tensor, owner: Tensor, grid: Grid) -> Tensor:
    """For every patch the mean colour ``[3, patches]`` of the token that it is part of."""
    colours = patch_colours(picture, grid)
    sums = torch.zeros(3, int(owner.max()) + 1).index_add(1, owner, colours)
    return (sums / owner.bincount().clamp(min=1))[:, owner]


def mean_colours(picture: Tensor, owner: Tensor, grid: Grid) -> Tensor:
    """The picture ``[3, height, width]`` with every patch in the mean colour of the token that it is part of."""
    return _spread(token_colours(picture, owner, grid), picture, grid)


def _spread(values: Tensor, picture: Tensor, grid: Grid) -> Tensor:
    """What each patch has, ``[..., patches]``, at all of its pixels in a picture: ``[..., height, width]``."""
    height, width = picture.shape[1:]
    tall, wide = height // grid.rows, width // grid.columns
    placed = values.reshape(*values.shape[:-1], grid.rows, grid.columns)
    return placed.repeat_interleave(tall, -2).repeat_interleave(wide, -1)


def after_stage(picture: Tensor, stage: TokenTrace, grid: Grid, sample: int = 0) -> Tensor:
    """What is left of a sample's picture ``[3, height, width]``: dropped patches dark, merged ones of one colour."""
    if stage.owner is None:
        return dim_dropped(picture, stage.kept_of(sample).cpu(), grid)
    return mean_colours(picture, stage.owner[sample].cpu(), grid)
