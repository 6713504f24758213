"""The commands ``skipvit trace`` and ``skipvit report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

import skipvit_fx
from skipvit_fx.cli.models import SpecError
from skipvit_fx.cli.options import (
    Cut,
    Depth,
    ImgSize,
    Json,
    KeepDead,
    Model,
    PlanText,
    PrefixTokens,
    Pretrained,
    Score,
    Validate,
    build,
    note_on_weights,
    rewritten,
    show,
)
from skipvit_fx.cli.picture import print_patches, write_picture
from skipvit_fx.cli.progress import counting
from skipvit_fx.errors import PlanError, ReportError
from skipvit_fx.files import check_folder
from skipvit_fx.page.inputs import inputs_of
from skipvit_fx.plan import Plan
from skipvit_fx.reports.grid import find_grid
from skipvit_fx.reports.pictures import after_stage, as_image, shown


def trace(
    model: Model,
    image: Annotated[Path, typer.Argument(help="an image file", show_default=False)],
    plan: PlanText,
    out: Annotated[
        Path | None,
        typer.Option(help="write a picture of the kept patches to this file", show_default=False),
    ] = None,
    img_size: ImgSize = None,
    depth: Depth = None,
    pretrained: Pretrained = False,
    prefix_tokens: PrefixTokens = None,
    cut: Cut = "attention",
    score: Score = "auto",
    validate: Validate = True,
    as_json: Json = False,
) -> None:
    """Show which patches of an image are kept, and dropped or merged; without --out also as a drawing of blocks."""
    wanted = Plan.parse(plan)
    if not wanted.stages:
        raise PlanError("the plan drops nothing", hint="give one that does, such as 6(55%)+11")
    built = build(model, img_size, depth, pretrained)
    fast = rewritten(built, wanted, prefix_tokens, cut, score, keep_dead=False, validate=validate)
    inputs = inputs_of(fast, image)
    traces = skipvit_fx.trace_tokens(fast, *inputs.args, **inputs.kwargs)
    assert inputs.image is not None
    grid = None if as_json and out is None else find_grid(fast, inputs.args, inputs.kwargs)
    picture = shown(inputs.image[0], fast)
    if out is not None:
        if grid is None:
            raise SpecError(
                "it is not known where in the image the patches are, so no picture is drawn",
                hint="leave out --out; the indices are right anyway",
            )
        panels = [picture, *(after_stage(picture, stage, grid) for stage in traces)]
        write_picture(as_image(torch.cat(panels, dim=2)).save, out)
    lines = []
    stages = []
    for stage in traces:
        kept, dropped = stage.kept[0].tolist(), stage.dropped[0].tolist()
        left = "dropped" if stage.owner is None else "merged into others"
        lines.append(f"layer {stage.layer}: kept {len(kept)}, {left} {len(dropped)}")
        lines.append(f"  {left}: {' '.join(map(str, dropped))}")
        found = {"layer": stage.layer, "kept": kept, "dropped": dropped}
        stages.append(found if stage.owner is None else found | {"owner": stage.owner[0].tolist()})
    show({"plan": str(wanted), "stages": stages}, "\n".join(lines), as_json)
    if grid is not None and out is None and not as_json:
        print_patches(Console(), picture, traces, grid)


def report(
    model: Model,
    plan: PlanText,
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE...", help="image files", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="the file to write")] = Path(
        "report.html"
    ),
    rounds: Annotated[int, typer.Option(min=0, help="rounds of time measurements; 0 for none")] = 5,
    img_size: ImgSize = None,
    depth: Depth = None,
    pretrained: Pretrained = False,
    prefix_tokens: PrefixTokens = None,
    cut: Cut = "attention",
    score: Score = "auto",
    keep_dead_tokens: KeepDead = False,
    validate: Validate = True,
    as_json: Json = False,
) -> None:
    """Write an HTML file that shows what a rewrite did to a model, and to these images."""
    wanted = Plan.parse(plan)
    check_folder(out, ReportError)
    built = build(model, img_size, depth, pretrained)
    fast = rewritten(built, wanted, prefix_tokens, cut, score, keep_dead_tokens, validate)
    note = note_on_weights(model, pretrained)
    with counting("Measuring") as progress:
        written = skipvit_fx.report(
            fast, images, out, title=model, note=note, rounds=rounds, progress=progress
        )
    size = written.stat().st_size
    show(
        {"path": str(written), "bytes": size}, f"written to {written}, {size / 1e6:.1f} MB", as_json
    )
