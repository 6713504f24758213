"""Writes the report: one HTML file that opens from disk and needs nothing else."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

from torch import nn

import skipvit_fx.page as here
from skipvit_fx.errors import ReportError
from skipvit_fx.graph.module import SkipViTModule
from skipvit_fx.graph.record import record_of
from skipvit_fx.optional import need
from skipvit_fx.page.data import page_data, pictures_of
from skipvit_fx.page.graph import graph_data
from skipvit_fx.page.inputs import inputs_of
from skipvit_fx.page.runs import run
from skipvit_fx.page.summary import figures_of, layer_rows, spans_in_words
from skipvit_fx.reports.environment import device_name, versions
from skipvit_fx.reports.inspection import inspect

SCRIPTS = ("vendor/dagre.min.js", "graph.js", "patches.js", "page.js")
STYLES = ("graph.css", "page.css", "patches.css")
LICENCES = ("vendor/dagre.LICENSE",)


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
        TypeError: ``images`` is none of the above.
        SkipViTError: the model does not run on the images.
    """
    record = record_of(fast)
    assert isinstance(fast, SkipViTModule)
    if not isinstance(rounds, int) or rounds < 0:
        raise ReportError(f"{rounds!r} rounds cannot be measured", hint="pass 0 or more")
    if any(parameter.is_meta for parameter in fast.parameters()):
        raise ReportError("the model has no weights (meta device)", hint="load its weights first")
    target = Path(path)
    check_folder(target)
    template = _template()
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
        data=page_data(fast, record, inputs, runs),
        graph=graph_data(fast, inspection),
        diff=inspection.diff().splitlines(),
        made_on=device_name(fast),
        made_with=versions("timm", "transformers", "skipvit_fx"),
    )
    _write(target, html)
    return target


def _template() -> Any:
    """The page's template, with everything that it inserts escaped."""
    jinja2 = need("jinja2", "report", ReportError)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("skipvit_fx.page", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    static = files(here) / "static"
    own = need("markupsafe", "report", ReportError).Markup
    for kind, names in (("scripts", SCRIPTS), ("styles", STYLES), ("licences", LICENCES)):
        environment.globals[kind] = [own((static / n).read_text(encoding="utf-8")) for n in names]
    return environment.get_template("page.html.j2")


def check_folder(path: Path) -> None:
    """Check early that a file can be written later.

    Raises:
        ReportError: its folder does not exist, or it is itself a folder.
    """
    if path.is_dir():
        raise ReportError(f"{path} is a folder", hint="give the name of a file in it")
    if not path.parent.is_dir():
        raise ReportError(f"the folder {path.parent} does not exist", hint="create it first")


def _write(path: Path, text: str) -> None:
    """Write to a file beside ``path`` and rename it, so that no reader ever finds a partial file."""
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        raise ReportError(
            f"{path} could not be written: {error.strerror or error}", hint="choose another folder"
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)
