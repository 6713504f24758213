"""What a model is called with, from pictures or from a batch."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from skipvit_fx.capture.example import (
    arguments_of,
    batch_size,
    example_of,
    floating_like,
    image_of,
)
from skipvit_fx.errors import ReportError, TraceError
from skipvit_fx.graph.record import find_record
from skipvit_fx.optional import need
from skipvit_fx.reports.pictures import normalisation, preprocessing
from skipvit_fx.torch_internals import pytree, tensor_leaves


@dataclass(frozen=True)
class Inputs:
    """One call of a model.

    Attributes:
        args, kwargs: its arguments.
        names: of the samples.
        prepared: how pictures were prepared, in words; empty for a batch as the model takes it.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    names: tuple[str, ...]
    prepared: str = ""

    @property
    def call(self) -> tuple[Any, ...] | dict[str, Any]:
        """The arguments as example inputs: a tuple, or a dict of those given by name."""
        return self.kwargs or self.args

    @property
    def image(self) -> Tensor | None:
        """The images ``[batch, channels, height, width]``, if the model takes such."""
        image = image_of(self.args, self.kwargs)
        return image if image is not None and image.ndim == 4 else None


def inputs_of(model: nn.Module, images: Any) -> Inputs:
    """The call of a model for these images.

    Args:
        model: rewritten or not. Pictures get the size that it was rewritten for, or that in its configuration.
        images: a batch as the model takes it (a tensor, a tuple of arguments or a dict of keyword arguments), or one
            or several pictures: paths of image files, or PIL images. Pictures are prepared by :func:`read_picture`.

    Raises:
        ReportError: the model has no weights, a picture cannot be read, or the model takes something other than colour
            pictures, or names no size of them.
        TypeError: ``images`` is something else.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ReportError("the model has no weights (meta device)", hint="load its weights first")
    pictures = _pictures(images)
    if not pictures:
        args, kwargs = arguments_of(images)
        samples = batch_size(args, kwargs)
        if not samples:
            raise ReportError("there is no image to show", hint="pass a batch with at least one")
        return Inputs(args, kwargs, tuple(f"image {i}" for i in range(1, samples + 1)))
    args, kwargs = _example(model)
    example = image_of(args, kwargs)
    others = [t for t in tensor_leaves((args, kwargs)) if t is not example]
    if example is None or example.ndim != 4 or example.shape[1] != 3 or others:
        raise ReportError(
            f"{type(model).__name__} takes something other than a batch of colour pictures",
            hint="pass a batch as the model takes it: a tensor, a tuple or a dict",
        )
    like = floating_like(model)
    height, width = example.shape[2:]
    batch = torch.stack([read_picture(picture, (height, width), model) for picture in pictures])
    batch = batch.to(like.device, like.dtype)
    args, kwargs = pytree.tree_map(lambda leaf: batch if leaf is example else leaf, (args, kwargs))
    names = tuple(_name(picture, number) for number, picture in enumerate(pictures, 1))
    return Inputs(args, kwargs, names, _how_prepared(model, height, width))


def _example(model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """An example call."""
    record = find_record(model)
    if record is not None:
        return record.args, record.kwargs
    try:
        return example_of(model, None)
    except TraceError as error:
        raise ReportError(
            error.message, hint="pass a batch as the model takes it: a tensor, a tuple or a dict"
        ) from error


def _pictures(images: Any) -> list[Any]:
    """The pictures, if these are pictures."""
    several = list(images) if isinstance(images, Sequence) and not _is_picture(images) else [images]
    return several if several and all(map(_is_picture, several)) else []


def _is_picture(value: Any) -> bool:
    if isinstance(value, (str, os.PathLike)):
        return True
    pil = sys.modules.get("PIL.Image")  # without it, nobody has made one
    return pil is not None and isinstance(value, pil.Image)


def _name(picture: Any, number: int) -> str:
    path = picture if isinstance(picture, (str, os.PathLike)) else getattr(picture, "filename", "")
    return Path(path).name or f"image {number}"


def read_picture(picture: Any, size: tuple[int, int], model: nn.Module) -> Tensor:
    """A picture as a model takes it, ``[3, height, width]`` float32.

    The largest part of its middle with the right shape is resized; ``crop_pct``, ``crop_mode`` and ``interpolation``
    are those of the model's ``pretrained_cfg``, or all of that part and bicubic. Then it is normalised by the
    configuration's mean and standard deviation, or by 0.5.

    Args:
        picture: the path of an image file, or a PIL image.
        size: height and width.
        model: has the configuration.

    Raises:
        ReportError: it is not a readable picture, or Pillow is not installed.
    """
    images, operations = (
        need(f"PIL.{name}", "report", ReportError) for name in ("Image", "ImageOps")
    )
    config = preprocessing(model)
    height, width = size
    method = getattr(images.Resampling, str(config.get("interpolation", "")).upper(), None)
    method = images.Resampling.BICUBIC if method is None else method
    margin = (1 - (config.get("crop_pct") or 1)) / 2
    try:
        image = picture if isinstance(picture, images.Image) else images.open(picture)
        upright = operations.exif_transpose(image).convert("RGB")
    except (OSError, images.DecompressionBombError) as error:
        raise ReportError(
            f"{picture} is not a readable image: {error}", hint="use PNG or JPEG"
        ) from error
    if config.get("crop_mode") == "squash":
        w, h = upright.size
        box = (w * margin, h * margin, w * (1 - margin), h * (1 - margin))
        fitted = upright.resize((width, height), method, box)
    else:
        fitted = operations.fit(upright, (width, height), method, bleed=margin)
    pixels = torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8)
    mean, std = normalisation(model)
    return (pixels.reshape(height, width, 3).permute(2, 0, 1).float() / 255 - mean) / std


def _how_prepared(model: nn.Module, height: int, width: int) -> str:
    mean, std = (
        ", ".join(f"{v:.3g}" for v in part.flatten().tolist()) for part in normalisation(model)
    )
    source = (
        "by the model's configuration" if preprocessing(model).get("mean") else "as it names none"
    )
    return (
        f"Pictures were cropped and resized to {height} x {width} pixels and normalised with mean {mean} and standard "
        f"deviation {std}, {source}."
    )
