"""The commands. Each mirrors one public call and prints its result."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import skipvit_fx
from skipvit_fx.cli import export
from skipvit_fx.cli.bench import bench
from skipvit_fx.cli.look import report, trace
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
from skipvit_fx.cli.view import view
from skipvit_fx.errors import ExportError, PlanError, ReportError, SearchError, SkipViTError
from skipvit_fx.plan import Plan

AT_FAULT = (PlanError, SpecError, ExportError, ReportError, SearchError)
"""Errors of the command line, a file or a plan."""


class _Group(TyperGroup):
    """Prints an error of this package as one message, without a traceback, which would not help."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except SkipViTError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(BAD_INPUT if isinstance(error, AT_FAULT) else REFUSED) from error


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Give any Vision Transformer a token-level skip connection.",
)
export.register(app)
app.command()(bench)
app.command()(trace)
app.command()(report)
app.command()(view)
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
    found = skipvit_fx.find_attention(built, prefix_tokens=prefix_tokens)
    said = {place: found.explain(place) for place in explain or ()}
    text = "\n".join(said.values()) if said else str(found)
    show({**found.to_dict(), "explain": said}, text, as_json)
    if found.refusal is not None and not said:
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
    inspection = skipvit_fx.inspect(fast)
    if diff:
        text = inspection.diff()
        show({"plan": str(wanted), "diff": text.splitlines()}, text, as_json)
    else:
        show(inspection.to_dict(), str(inspection), as_json)
    if save is not None:
        skipvit_fx.save(fast, save)
        typer.echo(f"saved to {save}", err=True)
