"""Example inputs from a model's configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from skipvit_fx.arguments import check_model
from skipvit_fx.errors import TraceError
from skipvit_fx.torch_internals import tensor_leaves

BATCH = 2
"""Images in an example batch: more than one, so that a batch axis is never mistaken for a broadcast one."""


def _pair(size: Any) -> tuple[int, int] | None:
    if isinstance(size, int):
        return size, size
    if isinstance(size, Sequence) and len(size) == 2 and all(isinstance(s, int) for s in size):
        return size[0], size[1]
    return None


def _field(owner: Any, name: str) -> Any:
    return owner.get(name) if isinstance(owner, Mapping) else getattr(owner, name, None)


def _image_shapes(model: nn.Module) -> Iterator[tuple[int, int, int]]:
    """The image shapes ``(channels, height, width)`` named by the model's attributes, best first."""
    for owner in (getattr(model, "patch_embed", None), getattr(model, "config", None), model):
        for name in ("img_size", "image_size"):
            if size := _pair(_field(owner, name)):
                yield (_field(owner, "num_channels") or 3, *size)
    input_size = _field(getattr(model, "pretrained_cfg", None), "input_size")
    if isinstance(input_size, Sequence) and len(input_size) == 3:
        yield tuple(input_size)
    for module in model.modules():
        for name in ("img_size", "image_size"):
            if size := _pair(_field(module, name)):
                yield (3, *size)


def example_from_config(model: nn.Module) -> tuple[torch.Tensor]:
    """One batch of images ``[2, channels, height, width]`` of zeros, with the model's dtype and device.

    The size is looked for in ``model.patch_embed.img_size``, ``model.config.image_size``, ``model.image_size`` and
    ``model.pretrained_cfg["input_size"]``, then in any submodule.

    Raises:
        TraceError: the model names no image size.
    """
    for shape in _image_shapes(model):
        like = floating_like(model)
        return (torch.zeros(BATCH, *shape, dtype=like.dtype, device=like.device),)
    raise TraceError(
        f"{type(model).__name__} names no image size",
        hint="pass example_inputs=(images,), a tuple of the arguments that the model is called with",
    )


def example_of(model: nn.Module, example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments and keyword arguments of an example call.

    ``example_inputs`` is one tensor, a tuple of arguments, a dict of keyword arguments, or ``None`` for images made
    from the model's configuration.

    Raises:
        TypeError: ``model`` is not a module, or ``example_inputs`` is something else, or holds no tensor.
        TraceError: a tensor has no elements, or ``None`` was given and the model names no image size.
    """
    check_model(model)
    if example_inputs is None:
        return example_from_config(model), {}
    args, kwargs = arguments_of(example_inputs)
    tensors = tensor_leaves((args, kwargs))
    if not tensors:
        raise TypeError(
            f"example_inputs holds no tensor: {example_inputs!r:.60}; pass a batch of images"
        )
    for tensor in tensors:
        if 0 in tensor.shape:
            raise TraceError(
                f"example_inputs holds no image: a tensor of shape {tuple(tensor.shape)}",
                hint="pass example_inputs with at least one image",
            )
    return args, kwargs


def arguments_of(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments and keyword arguments, from a tensor, a tuple or a dict.

    Raises:
        TypeError: it is something else, or a key of the dict is not a string.
    """
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        if strange := [name for name in example_inputs if not isinstance(name, str)]:
            raise TypeError(
                f"the keys of a dict of example_inputs must be argument names, got {strange[0]!r}"
            )
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    raise TypeError(
        "example_inputs must be a tensor, a tuple of arguments or a dict of keyword arguments, got "
        f"{type(example_inputs).__name__}"
    )


def image_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """The image of a call: its largest floating-point tensor; ``None`` if there is none."""
    floating = [t for t in tensor_leaves((args, dict(kwargs))) if t.is_floating_point()]
    return max(floating, key=torch.numel, default=None)


def batch_size(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """Samples in a call: the first axis of its image; ``None`` if there is none."""
    image = image_of(args, kwargs)
    return image.shape[0] if image is not None and image.ndim else None


def has_samples(leaf: Any, samples: int | None) -> bool:
    """Whether an argument has one entry per sample: a tensor whose first axis has that length."""
    return isinstance(leaf, torch.Tensor) and leaf.ndim > 0 and leaf.shape[0] == samples


def floating_like(model: nn.Module) -> torch.Tensor:
    """A tensor of the dtype and on the device that images for ``model`` have: its first floating-point parameter."""
    return next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
