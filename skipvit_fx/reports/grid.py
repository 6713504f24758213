"""Where in the image each patch is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from skipvit_fx.capture.example import batch_size, has_samples, image_of
from skipvit_fx.errors import GuardError
from skipvit_fx.graph.calls import Call
from skipvit_fx.graph.module import SkipViTModule
from skipvit_fx.reports.latency import copy_to_run
from skipvit_fx.torch_internals import pytree

AT_ONCE = 16
"""Images that are embedded together, at most."""

OBLONG = 4
"""A patch is at most this many times as long as it is wide."""


class Grid(NamedTuple):
    """Patches lie in rows, from left to right and from top to bottom, and tile the image."""

    rows: int
    columns: int


@torch.no_grad()
def find_grid(fast: SkipViTModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Grid | None:
    """The grid in which a rewritten model sees the patches of an image; ``None`` if there is none, or it is not known.

    Nothing is concluded from names or from a number alone. Noise is added to one column of the first image after
    another, and then to one row after another: patch ``i`` must change most for column ``i % columns`` and for row
    ``i // columns``.

    Args:
        fast: what :func:`skipvit_fx.rewrite` returned. It is not changed.
        args, kwargs: of a call. Its largest floating-point tensor is the image, ``[batch, channels, height, width]``.
    """
    image = image_of(args, kwargs)
    if image is None or image.ndim != 4 or not image.shape[0]:
        return None
    embedding = _Embedding(copy_to_run(fast, skipping=True), args, dict(kwargs), image)
    try:
        return next(filter(embedding.is_seen_in, _grids(embedding.patches, image)), None)
    except GuardError:  # the model computes something else for another number of images
        return None


def _grids(patches: int, image: Tensor) -> Iterator[Grid]:
    """Every grid of so many equal patches, those with the squarest patches first."""
    height, width = image.shape[2:]
    found = []
    for rows in range(1, min(patches, height) + 1):
        columns = patches // rows
        if rows * columns == patches and height % rows == 0 and width % columns == 0:
            tall, wide = height // rows, width // columns
            if (oblong := max(tall / wide, wide / tall)) <= OBLONG:
                found.append((oblong, Grid(rows, columns)))
    return (grid for _, grid in sorted(found))


class _Embedding:
    """The part of a model in front of its first layer."""

    def __init__(
        self, model: SkipViTModule, args: tuple[Any, ...], kwargs: dict[str, Any], image: Tensor
    ) -> None:
        self.form = model.prepare(*args, **kwargs)
        call: Call = self.form.call
        self.record = call.record
        self.patches: int = self.record.patches
        self.image, self.samples = image, batch_size(args, kwargs)
        self.args, self.kwargs = args, kwargs
        graph = _up_to(call.graph, self.record.layers[0].input)
        self.run = fx.Interpreter(model, graph=graph).run
        noise = torch.randn(image.shape[1:], generator=torch.Generator().manual_seed(0))
        spread = image[0].float().std() if image[0].numel() > 1 else torch.ones(())
        self.noise = (noise.to(image.device) * spread.clamp(min=0.1)).to(image.dtype)

    def of(self, images: Tensor) -> Tensor:
        """The patch tokens ``[batch, patches, channels]`` of images."""

        def given(leaf: Any) -> Any:
            if leaf is self.image:
                return images
            return (
                leaf[:1].expand(len(images), *leaf.shape[1:])
                if has_samples(leaf, self.samples)
                else leaf
            )

        tokens = self.run(*self.form.values(*pytree.tree_map(given, (self.args, self.kwargs))))
        dim, prefix = self.record.token_dim, self.record.prefix
        return tokens.narrow(dim, prefix, self.patches).movedim(dim, 1).flatten(2).float()  # type: ignore[no-any-return]

    def is_seen_in(self, grid: Grid) -> bool:
        """Whether the patches lie in this grid."""
        here = torch.arange(self.patches, device=self.image.device)
        rows, columns = here // grid.columns, here % grid.columns
        return self._follows(3, grid.columns, columns) and self._follows(2, grid.rows, rows)

    def _follows(self, axis: int, stripes: int, wanted: Tensor) -> bool:
        """Whether each patch changes most for the wanted one of the stripes across an axis of the image."""
        if stripes == 1:
            return True
        plain = self.image[:1]
        width = plain.shape[axis] // stripes
        still = self.of(plain)
        change = []
        for first in range(0, stripes, AT_ONCE):
            some = range(first, min(first + AT_ONCE, stripes))
            images = plain.repeat(len(some), 1, 1, 1)
            for image, stripe in zip(images, some, strict=True):
                place = slice(stripe * width, (stripe + 1) * width)
                part = (slice(None), place) if axis == 2 else (slice(None), slice(None), place)
                image[part] += self.noise[part]
            change.append((self.of(images) - still).norm(dim=2))
        changes = torch.cat(change)
        return bool((changes.argmax(0) == wanted).all() and (changes.amax(0) > 0).all())


def _up_to(graph: fx.Graph, name: str) -> fx.Graph:
    """A copy of a graph that ends at the node of this name, and returns its value."""
    part = fx.Graph()
    twins: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        twins[node] = part.node_copy(node, twins.__getitem__)
        if node.name == name:
            part.output(twins[node])
            break
    return part
