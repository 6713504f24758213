"""What the page's script draws, as plain values for JSON."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from skipvit_fx.errors import ReportError
from skipvit_fx.graph.record import RewriteRecord
from skipvit_fx.optional import need
from skipvit_fx.page.inputs import Inputs
from skipvit_fx.page.runs import Runs
from skipvit_fx.reports.grid import Grid
from skipvit_fx.reports.pictures import as_image, shown

LARGEST = 640
"""Pixels along the longer side of a picture in the page, at most."""

IN_A_LINE = 28
"""Patches in a line where their grid is not known, at most."""


def page_data(record: RewriteRecord, inputs: Inputs, runs: Runs) -> dict[str, Any]:
    """Where the patches are, the stages of the plan, and for each image what they kept."""
    return {**map_data(record, inputs, runs.grid), **plan_data(record, inputs, runs)}


def map_data(record: RewriteRecord, inputs: Inputs, grid: Grid | None) -> dict[str, Any]:
    """Where the patches are, whatever the plan."""
    lines = math.ceil(record.patches / IN_A_LINE)
    rows, columns = grid or (lines, math.ceil(record.patches / lines))
    image = inputs.image
    aspect = columns / rows
    if image is not None and grid is not None:
        aspect = image.shape[3] / image.shape[2]
    return {
        "depth": len(record.layers),
        "patches": record.patches,
        "columns": columns,
        "rows": rows,
        "known": grid is not None,
        "aspect": aspect,
    }


def plan_data(record: RewriteRecord, inputs: Inputs, runs: Runs) -> dict[str, Any]:
    """The stages of the plan, and for each image what they kept."""
    return {
        "stages": [
            {
                "layer": stage.layer,
                "returns": record.plan.spans[stage.span].return_layer,
                "span": stage.span,
                "merged": record.plan.spans[stage.span].merged,
            }
            for stage in record.stages
        ],
        "images": [_stages(record, runs, sample) for sample in range(len(inputs.names))],
    }


def _stages(record: RewriteRecord, runs: Runs, sample: int) -> list[dict[str, Any]]:
    """What each stage did to one image.

    ``scores`` has one for every patch, ``None`` for those that were not scored; ``owner`` has for every patch the place
    of the one whose token it is part of, in a span with ``+merged``.
    """
    found: list[dict[str, Any]] = []
    span, present = -1, torch.empty(0)
    for stage, trace in zip(record.stages, runs.traces, strict=True):
        if stage.span != span:  # all patches are there again
            span, present = stage.span, torch.arange(record.patches)
        kept = trace.kept_of(sample)
        here: dict[str, Any] = {
            "dropped": trace.dropped_of(sample).tolist(),
            "scores": _by_place(present, trace.scores[sample], record.patches),
            "fused": 0 if trace.fused_kept is None else int(trace.fused_kept[sample].sum()),
        }
        if trace.owner is not None:
            here["owner"] = kept[trace.owner[sample] - record.prefix].tolist()
        found.append(here)
        present = kept
    return found


def _by_place(present: Tensor, scores: Tensor, patches: int) -> list[float | None]:
    """Scores, in the order of the patches that are present, by the patch's place in the full grid; with four digits."""
    placed: list[float | None] = [None] * patches
    for place, score in zip(present.tolist(), scores.tolist()[: len(present)], strict=True):
        if math.isfinite(score):
            placed[place] = float(f"{score:.4g}")
    return placed


def pictures_of(model: nn.Module, images: Tensor | None, samples: int) -> Sequence[str | None]:
    """Every image as a data URL; ``None`` where the model takes no images ``[batch, channels, height, width]``."""
    if images is None:
        return [None] * samples
    return [_data_url(shown(image, model)) for image in images]


def _data_url(picture: Tensor) -> str:
    image = as_image(picture)
    lanczos = need("PIL.Image", "report", ReportError).Resampling.LANCZOS
    image.thumbnail((LARGEST, LARGEST), lanczos)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
