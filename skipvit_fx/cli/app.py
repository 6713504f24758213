"""The commands. Each mirrors one public call and prints its result."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor
from typer.core import TyperGroup

import skipvit_fx
from skipvit_fx.capture.example import example_of
from skipvit_fx.cli import export, picture
from skipvit_fx.cli.bench import bench
from skipvit_fx.cli.models import SpecError
from skipvit_fx.cli.options import (
    BAD_INPUT,
    REFUSED,
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
    rewritten,
    show,
)
from skipvit_fx.cli.search import search
from skipvit_fx.errors import ExportError, PlanError, SearchError, SkipViTError
from skipvit_fx.plan import Plan
from skipvit_fx.reports.tokens import TokenTrace

BAD = (PlanError, SpecError, ExportError, SearchError)
"""Errors that are the fault of the command line, a file or a plan."""


class _Group(TyperGroup):
    """Prints an error of this package as one message, without a traceback, which would not help."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except SkipViTError as error:
            typer.echo(f"error: {error}", err=True)
            code = BAD_INPUT if isinstance(error, BAD) else REFUSED
            raise typer.Exit(code) from error


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Give any Vision Transformer a token-level skip connection.",
)
export.register(app)
app.command()(bench)
app.command()(search)


@app.command()
def sites(
    model: Model,
    explain: Annotated[
        list[str] | None, typer.Option(help="a module or node; may be repeated", show_default=False)
    ] = None,
    img_size: ImgSize = None,
    depth: Depth = None,
    pretrained: Pretrained = False,
    prefix_tokens: PrefixTokens = None,
    as_json: Json = False,
) -> None:
    """Show the attention and the layers found in a model, and explain why a place did not match."""
    built = build(model, img_size, depth, pretrained)
    report = skipvit_fx.find_attention(built, prefix_tokens=prefix_tokens)
    said = {place: report.explain(place) for place in explain or ()}
    text = "\n".join(said.values()) if said else str(report)
    show({**report.to_dict(), "explain": said}, text, as_json)
    if report.refusal is not None and not said:
        raise typer.Exit(REFUSED)


@app.command()
def rewrite(
    model: Model,
    plan: PlanText,
    save: Annotated[
        Path | None,
        typer.Option(help="write plan and weights to this file, .safetensors", show_default=False),
    ] = None,
    diff: Annotated[
        bool, typer.Option("--diff", help="list inserted, rewired and erased nodes instead")
    ] = False,
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
    """Rewrite a model and print its layer table: tokens and multiply-adds."""
    wanted = Plan.parse(plan)
    built = build(model, img_size, depth, pretrained)
    fast = rewritten(built, wanted, prefix_tokens, cut, score, keep_dead_tokens, validate)
    report = skipvit_fx.inspect(fast)
    if diff:
        text = str(report.diff())
        show({"plan": str(wanted), "diff": text.splitlines()}, text, as_json)
    else:
        show(report.to_dict(), str(report), as_json)
    if save is not None:
        skipvit_fx.save(fast, save)
        typer.echo(f"saved to {save}", err=True)


@app.command()
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
    """Show which patches of an image are kept, and dropped or merged."""
    wanted = Plan.parse(plan)
    if not wanted.stages:
        raise PlanError("the plan drops nothing", hint="give one that does, such as 6(55%)+11")
    built = build(model, img_size, depth, pretrained)
    (example, *_), _ = example_of(built, None)
    shown, x = picture.read_image(image, tuple(example.shape[1:]), built)
    fast = rewritten(built, wanted, prefix_tokens, cut, score, keep_dead=False, validate=validate)
    traces = skipvit_fx.trace_tokens(fast, x)
    if out is not None:
        _draw(shown, traces, out)
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


def _draw(shown: Tensor, traces: list[TokenTrace], out: Path) -> None:
    _, height, width = shown.shape
    patches = traces[0].scores.shape[1]
    grid = picture.patch_grid(patches, height, width)
    if grid is None:
        raise SpecError(
            f"{patches} patches do not form a grid over {height} x {width} pixels, so no picture is drawn",
            hint="leave out --out; the indices are right anyway",
        )
    panels = [picture.after_stage(shown, stage, grid) for stage in traces]
    picture.write_picture([shown, *panels], out)
    typer.echo(f"picture written to {out}", err=True)
