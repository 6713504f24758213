"""How sensitive each layer is: one stage at each, with several amounts."""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from skipvit_fx.plan import Plan
from skipvit_fx.reports.table import columns

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Sensitivity:
    """What one stage does.

    Attributes:
        layer: where it is.
        percent: how many of the patches leave.
        plan: the whole plan.
        macs: multiply-adds of one image.
        quality, spread: on the images searched with, and its standard error.
    """

    layer: int
    percent: int
    plan: Plan
    macs: int
    quality: float
    spread: float | None


@dataclass(frozen=True)
class Profile:
    """Quality with one stage at each layer. Its text is a table: a line for every layer, a column for every amount.

    Attributes:
        entries: by layer, then by amount.
        baseline_macs: multiply-adds of one image by the unmodified model.
        metric: what quality is.
    """

    entries: tuple[Sensitivity, ...]
    baseline_macs: int
    metric: str

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers at which a stage may be."""
        return tuple(dict.fromkeys(entry.layer for entry in self.entries))

    @property
    def percents(self) -> tuple[int, ...]:
        """The amounts that were tried."""
        return tuple(dict.fromkeys(entry.percent for entry in self.entries))

    def at(self, layer: int, percent: int) -> Sensitivity:
        """What one stage at a layer does.

        Raises:
            KeyError: it was not tried.
        """
        found = self.find(layer, percent)
        if found is None:
            raise KeyError((layer, percent))
        return found

    def find(self, layer: int, percent: int) -> Sensitivity | None:
        """The same; ``None`` if it was not tried."""
        wanted = (layer, percent)
        return next((one for one in self.entries if (one.layer, one.percent) == wanted), None)

    def plot(self) -> Figure:
        """Quality over layers, a line for every amount.

        Raises:
            SearchError: matplotlib is not installed.
        """
        from skipvit_fx.planner.drawing import draw_profile

        return draw_profile(self)

    def to_dict(self) -> list[dict[str, Any]]:
        """The entries as plain values."""
        return [{**vars(entry), "plan": str(entry.plan)} for entry in self.entries]

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"

    def _lines(self) -> Iterator[str]:
        yield f"{self.metric} with one stage, and its multiply-adds as a share of the model's"
        rows = [["layer", *(cell for p in self.percents for cell in (f"{p}%", ""))]]
        for layer in self.layers:
            row = [str(layer)]
            for percent in self.percents:
                entry = self.find(layer, percent)
                row += (
                    ["", ""]
                    if entry is None
                    else [f"{entry.quality:.4f}", f"{entry.macs / self.baseline_macs:.1%}"]
                )
            rows.append(row)
        yield from columns(rows, to_the_left=())
