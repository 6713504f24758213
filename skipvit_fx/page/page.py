"""Writes the report: one HTML file that opens from disk and needs nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from skipvit_fx.capture.example import floating_like
from skipvit_fx.errors import ReportError
from skipvit_fx.files import check_folder
from skipvit_fx.graph.module import SkipViTModule
from skipvit_fx.graph.record import record_of
from skipvit_fx.page.data import page_data, pictures_of
from skipvit_fx.page.graph import graph_data
from skipvit_fx.page.inputs import inputs_of
from skipvit_fx.page.runs import run
from skipvit_fx.page.summary import figures_of, layer_rows, spans_in_words
from skipvit_fx.page.writing import page_template, write
from skipvit_fx.reports.environment import device_name, versions
from skipvit_fx.reports.inspection import inspect

SCRIPTS = ("vendor/dagre.min.js", "graph.js", "patches.js", "copy.js", "page.js")
STYLES = ("graph.css", "page.css", "patches.css")
LICENCES = {"Licence of dagre, which lays out the graph": "vendor/dagre.LICENSE"}


def report(
    fast: nn.Module,
    images: Any,
    path: str | os.PathLike[str],
    *,
    title: str | None = None,
    note: str = "",
    rounds: int = 5,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write what a rewrite did, to the model and to these images, as one HTML file to look at in a browser.

    It shows tokens, multiply-adds and time saved, layer by layer; which patches of each image are kept at every stage,
    with their scores; the graph; and the diff. Nothing is loaded from elsewhere. The model runs in eval mode with
    skipping as its plan says, and with skipping off; ``fast`` is not changed.

    Args:
        fast: what :func:`skipvit_fx.rewrite` returned.
        images: a batch as the model takes it (a tensor, a tuple of arguments or a dict of keyword arguments); or one or
            several pictures, as paths of image files or PIL images, which are cropped, resized and normalised by the
            model's ``pretrained_cfg``, or with mean and standard deviation 0.5.
        path: of the file. It appears complete or not at all.
        title: name of the model; by default that of its class.
        note: a sentence for whoever reads it, such as where the weights are from.
        rounds: how often both models are timed on these images, after a warm-up; 0 for not at all.
        progress: called after each round of the measurements with the number done and their total.

    Returns:
        The path.

    Raises:
        NotRewrittenError: ``fast`` does not come from :func:`skipvit_fx.rewrite`.
        ReportError: a picture cannot be read, these are not inputs for the model, the file cannot be written, or jinja2
            or Pillow is not installed.
        TypeError: ``images`` is something else.
        SkipViTError: the model does not run on the images.
    """
    record = record_of(fast)
    assert isinstance(fast, SkipViTModule)
    if not isinstance(rounds, int) or rounds < 0:
        raise ReportError(f"{rounds!r} rounds cannot be measured", hint="pass 0 or more")
    target = Path(path)
    check_folder(target, ReportError)
    template = page_template("page.html.j2", styles=STYLES, scripts=SCRIPTS, licences=LICENCES)
    inputs = inputs_of(fast, images)
    runs = run(fast, inputs, rounds, progress)
    inspection = inspect(fast)
    pictures = pictures_of(fast, inputs.image, len(inputs.names))
    html = template.render(
        title=title or record.model,
        note=note,
        inspection=inspection,
        inputs=inputs,
        runs=runs,
        words=spans_in_words(record, inspection, runs),
        figures=figures_of(inspection, runs),
        layers=layer_rows(record, inspection, runs),
        pictures=pictures,
        data=page_data(record, inputs, runs),
        graph=graph_data(fast, inspection),
        diff=inspection.diff().splitlines(),
        made_on=device_name(floating_like(fast).device),
        made_with=versions("timm", "transformers", "skipvit_fx"),
    )
    write(target, html)
    return target
