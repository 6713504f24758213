"""The result of :func:`skipvit_fx.trace_tokens`: which patches were kept, as tensors and as pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from skipvit_fx.capture.example import batch_size, image_of
from skipvit_fx.errors import SkipViTError
from skipvit_fx.graph.module import SkipViTModule
from skipvit_fx.optional import need
from skipvit_fx.reports.grid import find_grid
from skipvit_fx.reports.html import Markup, patch_map, table
from skipvit_fx.reports.pictures import after_stage, shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class TokenTrace:
    """The patches that one stage of a plan kept and dropped, by their position in the full grid, from 0.

    In a span with ``+fused``, the fused token of an earlier stage takes part in a later one, where some samples of a
    batch keep it and others drop it. It is not a patch and is in none of the tensors; the samples' rows then differ in
    length, and shorter ones are padded at the end with -1 (scores with NaN).

    Attributes:
        layer: the layer that scored, from 1.
        kept: ``[batch, K]`` int64, in the order of the shorter sequence, which is ascending if nothing was merged. A
            merged token has the position of the one that others were merged into.
        dropped: ``[batch, N - K]`` int64, in the order of the sequence before; in a span with ``+merged``, those that
            became part of others.
        scores: ``[batch, N]``, those of the N patches present at this stage, in the order of the sequence before. In a
            span with ``+merged``, how similar the key of each that may become part of another is to the nearest of
            these, and -inf for the others.
        owner: in a span with ``+merged``, ``[batch, patches]`` int64: for every patch of the full grid, the place in
            the sequence, prefix tokens counted, of the token that it is part of after this stage; else ``None``.
        fused_kept: ``[batch, F]`` bool: whether the fused token of each of the F earlier stages that dropped something
            is still present after this stage; ``None`` in a span without ``+fused``.
    """

    layer: int
    kept: Tensor
    dropped: Tensor
    scores: Tensor
    owner: Tensor | None = None
    fused_kept: Tensor | None = None

    def kept_of(self, sample: int) -> Tensor:
        """The kept patches of one sample, ``[K]`` int64, without padding."""
        return self.kept[sample][self.kept[sample] >= 0]

    def dropped_of(self, sample: int) -> Tensor:
        """The dropped patches of one sample, ``[N - K]`` int64, without padding."""
        return self.dropped[sample][self.dropped[sample] >= 0]


class TokenTraces(list[TokenTrace]):
    """What each stage of a plan kept and dropped in one call: a list of :class:`TokenTrace`, in order."""

    def __init__(
        self,
        traces: Iterable[TokenTrace],
        model: SkipViTModule,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> None:
        super().__init__(traces)
        self._model, self._args, self._kwargs = model, args, kwargs

    def plot(self, sample: int = 0) -> Figure:
        """One panel for the image and one for what is left after each stage, for papers: ``.savefig("kept.pdf")``.

        Dropped patches are dark; patches that were merged have their token's mean colour.

        Args:
            sample: which one of the batch.

        Returns:
            A ``matplotlib.figure.Figure``; notebooks show it.

        Raises:
            SkipViTError: matplotlib is not installed, there is no such sample, or it is not known where in the image
                the patches are.
        """
        need("matplotlib", "report")
        from skipvit_fx.reports.plotting import draw_panels

        image, samples = image_of(self._args, self._kwargs), self._samples()
        if not -samples <= sample < samples:
            raise SkipViTError(f"there is no sample {sample}", hint=f"the batch has {samples}")
        grid = find_grid(self._model, self._args, self._kwargs)
        if grid is None or image is None:
            raise SkipViTError(
                "it is not known where in the image the patches are, so nothing can be drawn",
                hint="the indices in kept and dropped are right anyway",
            )
        picture = shown(image[sample], self._model)
        panels = [("input", picture)]
        for stage in self:
            title = (
                f"layer {stage.layer}: {len(stage.kept_of(sample))} of {grid.rows * grid.columns}"
            )
            panels.append((title, after_stage(picture, stage, grid, sample)))
        return draw_panels(panels)

    def _samples(self) -> int:
        return batch_size(self._args, self._kwargs) or 0

    def _repr_html_(self) -> Markup:
        """A table for notebooks; of the first samples with a map of the patches where their grid is known."""
        grid = find_grid(self._model, self._args, self._kwargs)
        some = range(min(self._samples(), 4)) if grid is not None else ()
        head = ["layer", "kept", "left", *(f"sample {i}" for i in some)]
        rows = []
        for stage in self:
            maps = [patch_map(stage.kept_of(i).tolist(), grid) for i in some if grid is not None]
            left = "merged into others" if stage.owner is not None else "dropped"
            rows.append(
                [stage.layer, stage.kept.shape[1], f"{stage.dropped.shape[1]} {left}", *maps]
            )
        return table(head, rows)
