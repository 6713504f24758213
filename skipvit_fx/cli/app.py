"""The commands. Each mirrors one public call and prints what it returns."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from typer.core import TyperGroup

import skipvit_fx
from skipvit_fx.capture.example import example_of
from skipvit_fx.cli import export, picture, zoo
from skipvit_fx.cli.bench import bench
from skipvit_fx.cli.models import SpecError, expand
from skipvit_fx.cli.options import (
    BAD_INPUT,
    REFUSED,
    Cut,
    Depth,
    ImgSize,
    Json,
    KeepDead,
    Model,
    PlanFile,
    PlanText,
    PrefixTokens,
    Pretrained,
    Score,
    Validate,
    build,
    plan_of,
    rewritten,
    show,
)
from skipvit_fx.errors import ExportError, PlanError, SkipViTError


class _Group(TyperGroup):
    """Prints an error of this package as one message; its traceback would help nobody."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except SkipViTError as error:
            typer.echo(f"error: {error}", err=True)
            code = BAD_INPUT if isinstance(error, (PlanError, SpecError, ExportError)) else REFUSED
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
    plan: PlanText = None,
    plan_file: PlanFile = None,
    save: Annotated[
        Path | None,
        typer.Option(help="file for plan and weights, .safetensors", show_default=False),
    ] = None,
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
    """Rewrite a model and print its layer table."""
    wanted = plan_of(plan, plan_file)
    built = build(model, img_size, depth, pretrained)
    fast = rewritten(built, wanted, prefix_tokens, cut, score, keep_dead_tokens, validate)
    report = skipvit_fx.inspect(fast)
    show(report.to_dict(), str(report), as_json)
    if save is not None:
        skipvit_fx.save(fast, save)
        typer.echo(f"saved to {save}", err=True)


@app.command()
def inspect(
    model: Model,
    plan: PlanText = None,
    plan_file: PlanFile = None,
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
    """Show what a plan does to every layer: tokens and multiply-adds."""
    wanted = plan_of(plan, plan_file)
    built = build(model, img_size, depth, pretrained)
    report = skipvit_fx.inspect(
        rewritten(built, wanted, prefix_tokens, cut, score, keep_dead_tokens, validate)
    )
    show(report.to_dict(), str(report), as_json)


@app.command()
def diff(
    model: Model,
    plan: PlanText = None,
    plan_file: PlanFile = None,
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
    """Show every node that a rewrite inserts, rewires or erases."""
    wanted = plan_of(plan, plan_file)
    built = build(model, img_size, depth, pretrained)
    fast = rewritten(built, wanted, prefix_tokens, cut, score, keep_dead_tokens, validate)
    text = str(skipvit_fx.inspect(fast).diff())
    show({"plan": str(wanted), "diff": text.splitlines()}, text, as_json)


@app.command()
def trace(
    model: Model,
    image: Annotated[Path, typer.Argument(help="an image file", show_default=False)],
    plan: PlanText = None,
    plan_file: PlanFile = None,
    out: Annotated[
        Path | None, typer.Option(help="picture of the kept patches to write", show_default=False)
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
    """Show which patches of an image are kept and dropped."""
    wanted = plan_of(plan, plan_file)
    if not wanted.stages:
        raise PlanError("the plan drops nothing", hint="give one that does, such as 6(55%)+11")
    built = build(model, img_size, depth, pretrained)
    (example, *_), _ = example_of(built, None)
    shown, x = picture.read_image(image, tuple(example.shape[1:]), built)
    fast = rewritten(built, wanted, prefix_tokens, cut, score, keep_dead=False, validate=validate)
    traces = skipvit_fx.trace_tokens(fast, x)
    if out is not None:
        _draw(shown, [stage.kept[0] for stage in traces], traces[0].scores.shape[1], out)
    lines = []
    stages = []
    for stage in traces:
        kept, dropped = stage.kept[0].tolist(), stage.dropped[0].tolist()
        lines.append(f"layer {stage.layer}: kept {len(kept)}, dropped {len(dropped)}")
        lines.append(f"  dropped: {' '.join(map(str, dropped))}")
        stages.append({"layer": stage.layer, "kept": kept, "dropped": dropped})
    show({"plan": str(wanted), "stages": stages}, "\n".join(lines), as_json)


def _draw(shown: Tensor, kept: list[Tensor], patches: int, out: Path) -> None:
    _, height, width = shown.shape
    grid = picture.patch_grid(patches, height, width)
    if grid is None:
        raise SpecError(
            f"{patches} patches are no grid over {height} x {width} pixels, so none is drawn",
            hint="leave out --out; the indices are right all the same",
        )
    panels = [picture.dim_dropped(shown, indices, grid) for indices in kept]
    picture.write_picture([shown, *panels], out)
    typer.echo(f"picture written to {out}", err=True)


@app.command(name="zoo")
def run_zoo(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="models; timm: and torchvision: take wildcards", show_default=False),
    ] = None,
    isotropic: Annotated[
        bool, typer.Option("--isotropic", help="all isotropic models of timm")
    ] = False,
    others: Annotated[
        bool, typer.Option("--others", help="one model of every other module of timm")
    ] = False,
    elsewhere: Annotated[
        bool, typer.Option("--elsewhere", help="torchvision, Hugging Face and open_clip")
    ] = False,
    out: Annotated[
        Path, typer.Option(help="the page to write; rows are kept beside it as .jsonl")
    ] = Path("zoo.md"),
    limit: Annotated[
        float, typer.Option(help="GiB of parameters; larger models are made shallower")
    ] = 3.0,
    img_size: ImgSize = None,
    depth: Depth = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="forget the rows of an earlier run")
    ] = False,
    as_json: Json = False,
) -> None:
    """Rewrite many models with random weights, compare each with the reference, write a table.

    Interrupt it and run it again: finished models are skipped.
    """
    wanted = [full for name in names or () for full in expand(name)]
    wanted += zoo.isotropic_names() if isotropic else []
    wanted += zoo.other_names() if others else []
    wanted += zoo.ELSEWHERE if elsewhere else []
    wanted = list(dict.fromkeys(wanted))
    if not wanted:
        raise SpecError(
            "no models named", hint="name some, such as 'timm:vit_tiny*', or --isotropic"
        )
    log = out.with_suffix(".jsonl")
    if fresh:
        log.unlink(missing_ok=True)
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(wanted))

        def advance(name: str) -> None:
            progress.update(task, description=name, completed=wanted.index(name))

        options = {"img_size": img_size, "depth": depth}
        rows = zoo.run(wanted, log, advance, limit=limit * 2**30, **options)
        progress.update(task, description="", completed=len(wanted))
    text = zoo.page(rows, " ".join(["skipvit", *map(shlex.quote, sys.argv[1:])]))
    out.write_text(text, encoding="utf-8")
    summary = "\n".join(f"{row.status:<8} {row.name}  {row.reason}".rstrip() for row in rows)
    show([asdict(row) for row in rows], f"{summary}\nwritten to {out}", as_json)
    if any(row.status in ("wrong", "error") for row in rows):
        raise typer.Exit(REFUSED)
