"""The command ``skipvit search``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

import skipvit_fx
from skipvit_fx.capture.example import example_of
from skipvit_fx.cli.bench import device_named
from skipvit_fx.cli.models import SpecError
from skipvit_fx.cli.options import (
    Cut,
    Depth,
    ImgSize,
    Json,
    Model,
    PrefixTokens,
    Pretrained,
    Score,
    build,
    note_on_weights,
    score_named,
    show,
)
from skipvit_fx.cli.picture import write_picture
from skipvit_fx.cli.progress import counting, searching
from skipvit_fx.errors import ReportError
from skipvit_fx.files import check_folder
from skipvit_fx.optional import need
from skipvit_fx.page.inputs import read_picture

PICTURES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
REPORTED = 4
"""So many pictures are in the report."""

SHOWN = 0.75
"""Without a budget, progress shows the best plan with at most this share of the multiply-adds."""


def search(
    model: Model,
    images: Annotated[Path, typer.Option(help="a folder of pictures, also in folders below it")],
    labels: Annotated[
        Path | None,
        typer.Option(
            help="a file with lines NAME,CLASS, for --metric accuracy", show_default=False
        ),
    ] = None,
    metric: Annotated[str, typer.Option(help="agreement, cosine or accuracy")] = "agreement",
    budget: Annotated[
        str | None,
        typer.Option(help="a share of multiply-adds, or a time such as 12ms", show_default=False),
    ] = None,
    stages: Annotated[int, typer.Option(min=1, help="the most stages in a plan")] = 2,
    trials: Annotated[int, typer.Option(min=0, help="plans to evaluate")] = 200,
    holdout: Annotated[float, typer.Option(help="share of the pictures to hold out")] = 0.5,
    storage: Annotated[
        str | None,
        typer.Option(help="study.log, sqlite:///study.db, postgresql://...", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="of pictures held out, and of plans")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="pictures at once")] = 32,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="time the plans of the front")
    ] = True,
    plot: Annotated[
        Path | None, typer.Option(help="write a picture of the front", show_default=False)
    ] = None,
    plot_profile: Annotated[
        Path | None, typer.Option(help="write a picture of the profile", show_default=False)
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            help="write an HTML file with the front, and its plans on the first four pictures",
            show_default=False,
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="such as cpu, cuda or npu")] = "cpu",
    img_size: ImgSize = None,
    depth: Depth = None,
    pretrained: Pretrained = False,
    prefix_tokens: PrefixTokens = None,
    cut: Cut = "attention",
    score: Score = "auto",
    as_json: Json = False,
) -> None:
    """Find the plans that cost least and preserve most of a model on your own pictures. Ctrl-C ends it early."""
    place = device_named(device)
    if report is not None:
        check_folder(report, ReportError)
        need("jinja2", "report", ReportError)
    built = build(model, img_size, depth, pretrained).to(place)
    files, classes = _pictures(images, labels)
    batches = _batches(files, classes, built, batch)
    share = _budget(budget)
    with searching(share if isinstance(share, float) else SHOWN) as progress:
        result = skipvit_fx.search(
            built,
            batches,
            metric=metric,
            budget=share,
            stages=stages,
            trials=trials,
            holdout=holdout,
            storage=storage,
            seed=seed,
            labelled=labels is not None,
            measure=measure,
            progress=progress,
            prefix_tokens=prefix_tokens,
            cut=cut,
            score=score_named(score),
        )
    for path, picture in ((plot, result), (plot_profile, result.profile)):
        if path is not None:
            write_picture(picture.plot().savefig, path)
    if report is not None:
        note = note_on_weights(model, pretrained)
        with counting("Writing the report") as count:
            skipvit_fx.report_search(
                result, built, files[:REPORTED], report, title=model, note=note, progress=count
            )
        typer.echo(f"report written to {report}", err=True)
    show(result.to_dict(), f"{result}\n\n{result.profile}", as_json)


def _budget(text: str | None) -> float | str | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


def _pictures(folder: Path, labels: Path | None) -> tuple[list[Path], dict[str, int] | None]:
    """The files of the pictures, and their classes by name if there are labels.

    Raises:
        SpecError: a file cannot be read, or there are none.
    """
    known = None if labels is None else _classes(labels)
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES)
    if known is not None:
        files = [path for path in files if path.name in known]
    if not files:
        raise SpecError(
            f"{folder} holds no pictures{'' if known is None else f' that {labels} names'}",
            hint=f"give a folder of files that end in {', '.join(sorted(PICTURES))}",
        )
    return files, known


def _batches(
    files: list[Path], known: dict[str, int] | None, model: nn.Module, size: int
) -> list[Any]:
    """The pictures as the model takes them; pairs with their classes if these are known."""
    (example, *_), _ = example_of(model, None)
    size_of_images = tuple(example.shape[-2:])
    pixels = torch.stack([read_picture(path, size_of_images, model) for path in files])
    parts = [slice(i, i + size) for i in range(0, len(files), size)]
    if known is None:
        return [pixels[part] for part in parts]
    classes = torch.tensor([known[path.name] for path in files])
    return [(pixels[part], classes[part]) for part in parts]


def _classes(path: Path) -> dict[str, int]:
    """Classes by file name, from lines ``NAME,CLASS``.

    Raises:
        SpecError: the file cannot be read.
    """
    found = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path} cannot be read: {error}", hint="give a text file") from error
    for number, line in enumerate(lines, start=1):
        name, comma, label = line.rpartition(",")
        if not line.strip():
            continue
        if not comma or not label.strip().isdigit():
            raise SpecError(
                f"line {number} of {path} is {line!r:.60}",
                hint="write a line for every picture: its name, a comma, and the number of its class",
            )
        found[name.strip()] = int(label)
    return found
