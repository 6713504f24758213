"""The user's batches: checked, and split into images to search with and images held out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skipvit_fx.capture.example import arguments_of, batch_size, has_samples
from skipvit_fx.errors import SearchError
from skipvit_fx.torch_internals import pytree

_SAMPLED = 4096
"""About so many numbers of a tensor tell it from others."""

_HINT = "pass a list or a loader of what the model is called with: tensors, tuples of arguments or dicts of them"


@dataclass(frozen=True)
class Batch:
    """One call of the model.

    Attributes:
        args, kwargs: its arguments.
        given: what the user passed, for a metric: the same, or a pair of it and labels.
        images: how many there are.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    given: Any
    images: int

    def to(self, device: torch.device) -> Batch:
        """The same with its tensors on a device."""
        args, kwargs = pytree.tree_map(
            lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf,
            (self.args, self.kwargs),
        )
        return Batch(args, kwargs, self.given, self.images)

    def of(self, chosen: Tensor, labelled: bool) -> Batch:
        """Some of its images."""

        def pick(leaf: Any) -> Any:
            return leaf[chosen.to(leaf.device)] if has_samples(leaf, self.images) else leaf

        return read(pytree.tree_map(pick, self.given), labelled)


def read(given: Any, labelled: bool) -> Batch:
    """What the user passed as a batch.

    Raises:
        SearchError: it is not a batch of images.
    """
    inputs = given
    if labelled:
        if not isinstance(given, tuple | list) or len(given) != 2:
            raise SearchError(
                f"a labelled batch must be a pair of what the model is called with and labels, got {_kind(given)}",
                hint="let the loader return (images, labels)",
            )
        inputs = given[0]
    try:
        args, kwargs = arguments_of(inputs)
    except TypeError as error:
        raise SearchError(f"a batch is a {_kind(inputs)}", hint=_HINT) from error
    images = batch_size(args, kwargs)
    if not images:
        raise SearchError("a batch holds no images", hint=_HINT)
    if labelled and not has_samples(given[1], images):
        raise SearchError(
            f"the labels of a batch of {images} images are {_kind(given[1])}",
            hint="let the loader return (images, labels), with one label for each image",
        )
    return Batch(args, kwargs, given, images)


def read_all(batches: Any, labelled: bool) -> list[Batch]:
    """All batches, read once.

    Raises:
        SearchError: there are none, or one of them is not a batch of images.
    """
    if isinstance(batches, Tensor | dict) or not isinstance(batches, Iterable):
        raise SearchError(
            f"batches must be a list or a loader of batches, got a {_kind(batches)}",
            hint="put a single batch into a list: [images]",
        )
    found = [read(given, labelled) for given in batches]
    if not found:
        raise SearchError("there are no batches", hint=_HINT)
    return found


def split(
    batches: list[Batch], holdout: float, seed: int, labelled: bool
) -> tuple[list[Batch], list[Batch]]:
    """The images to search with, and those held out: of every batch the same share, chosen by chance.

    Raises:
        SearchError: one of the two would be empty.
    """
    if not holdout:
        return batches, []
    generator = torch.Generator().manual_seed(seed)
    ours: list[Batch] = []
    held: list[Batch] = []
    seen = held_so_far = 0
    for batch in batches:
        seen += batch.images
        order = torch.randperm(batch.images, generator=generator)
        count = min(batch.images, round(holdout * seen) - held_so_far)
        held_so_far += count
        for part, chosen in ((held, order[:count]), (ours, order[count:])):
            if len(chosen):
                part.append(batch.of(chosen.sort().values, labelled))
    if not ours or not held:
        raise SearchError(
            f"{seen} images cannot be split with holdout={holdout}",
            hint="pass more images, or holdout=0 to search with all of them",
        )
    return ours, held


def images_of(batches: Iterable[Batch]) -> int:
    """The number of images."""
    return sum(batch.images for batch in batches)


def contents(batches: Iterable[Batch]) -> Iterator[bytes]:
    """What tells these images from others."""
    for batch in batches:
        for leaf in pytree.tree_leaves(batch.given):
            yield sample(leaf) if isinstance(leaf, Tensor) else repr(leaf).encode()


def sample(tensor: Tensor) -> bytes:
    """Shape, dtype and some of the numbers of a tensor: the same on every machine, unlike its sum."""
    kind = f"{tensor.dtype} {list(tensor.shape)}".encode()
    if tensor.is_meta or not tensor.numel():
        return kind
    numbers = tensor.detach().flatten()[:: max(1, tensor.numel() // _SAMPLED)]
    return kind + bytes(numbers.cpu().contiguous().view(torch.uint8).numpy())


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"tensor {list(value.shape)}"
    return type(value).__name__
