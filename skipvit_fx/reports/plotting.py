"""Figures, by matplotlib, which only this module imports."""

from __future__ import annotations

import io
from collections.abc import Sequence

from matplotlib.figure import Figure
from torch import Tensor


class ShownFigure(Figure):
    """A figure that notebooks show by themselves, and that leaves nothing open."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png", dpi=100)
        return file.getvalue()


def draw_panels(panels: Sequence[tuple[str, Tensor]]) -> Figure:
    """Pictures ``[3, height, width]`` side by side, each below its title."""
    _, height, width = panels[0][1].shape
    figure = ShownFigure(
        figsize=(2.4 * len(panels), 2.4 * height / width + 0.3), layout="constrained"
    )
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, picture) in zip(all_axes, panels, strict=True):
        axes.imshow(picture.permute(1, 2, 0).numpy())
        axes.set_title(title, fontsize=9)
        axes.set_axis_off()
    return figure
