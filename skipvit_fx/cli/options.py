"""Arguments and options that several commands share, and how they are used."""

from __future__ import annotations

import json
from typing import Annotated, Any

import torch
import typer
from torch import nn

import skipvit_fx
from skipvit_fx.cli.models import SOURCES, SpecError, imported, parse_spec
from skipvit_fx.cli.progress import waiting
from skipvit_fx.graph.module import SkipViTModule
from skipvit_fx.plan import Plan
from skipvit_fx.scores import BUILT_IN, ScoreFunction, known_scores

BAD_INPUT = 2
"""Exit status if the command line, a file or a plan is at fault."""

REFUSED = 1
"""Exit status if the answer is no: a refused model, or a check that found something."""

Model = Annotated[str, typer.Argument(help=SOURCES, show_default=False)]
PlanText = Annotated[
    str, typer.Argument(metavar="PLAN", help="such as 6(55%)+11, 1-12(8) or 4(30%)+5;5(30%)+6")
]
ImgSize = Annotated[
    int | None, typer.Option(min=1, help="image size, if not the model's own", show_default=False)
]
Depth = Annotated[
    int | None, typer.Option(min=1, help="layers, if not the model's own", show_default=False)
]
Pretrained = Annotated[bool, typer.Option("--pretrained", help="fetch the published weights")]
PrefixTokens = Annotated[
    int | None, typer.Option(min=0, help="leading tokens that are not patches", show_default=False)
]
Cut = Annotated[str, typer.Option(help="attention or block")]
Score = Annotated[
    str,
    typer.Option(
        help=f"{', '.join(BUILT_IN)}, a name that the model's module registers, or module:pkg.mod:function"
    ),
]
KeepDead = Annotated[
    bool, typer.Option("--keep-dead-tokens", help="also compute rows that nothing reads")
]
Validate = Annotated[
    bool, typer.Option("--validate/--no-validate", help="run the result once beside the model")
]
Json = Annotated[bool, typer.Option("--json", help="machine-readable, nothing else on stdout")]
Cann = Annotated[str, typer.Option(help="release of CANN to check against")]
Soc = Annotated[str, typer.Option(help="chip, as ATC's --soc_version")]


def build(spec: str, img_size: int | None, depth: int | None, pretrained: bool) -> nn.Module:
    """The named model in eval mode; if its weights are random, a note is printed to stderr.

    Raises:
        SpecError: it cannot be built.
    """
    wanted = parse_spec(spec, pretrained=pretrained, img_size=img_size, depth=depth)
    torch.manual_seed(0)
    model = wanted.build()
    if not pretrained and wanted.source != "module":
        typer.echo(
            f"{wanted} with random weights; --pretrained fetches the published ones", err=True
        )
    return model


def note_on_weights(spec: str, pretrained: bool) -> str:
    """What a report says of a model's weights: nothing if they are published ones, or the user's own."""
    if pretrained or parse_spec(spec).source == "module":
        return ""
    return (
        "The weights are random: multiply-adds and times are as with others, but answers, scores and the choice of "
        "patches mean nothing."
    )


def rewritten(
    model: nn.Module,
    plan: Plan,
    prefix_tokens: int | None,
    cut: str,
    score: str,
    keep_dead: bool,
    validate: bool,
) -> SkipViTModule:
    """The model rewritten.

    Raises:
        SpecError: ``cut`` or ``score`` is not known.
        SkipViTError: as :func:`skipvit_fx.rewrite` does.
    """
    if cut not in ("attention", "block"):
        raise SpecError(f"--cut {cut!r} is not known", hint="choose from attention, block")
    chosen = score_named(score)
    with waiting("Rewriting"):
        return skipvit_fx.rewrite(
            model,
            plan,
            prefix_tokens=prefix_tokens,
            cut=cut,  # type: ignore[arg-type]
            score=chosen,
            eliminate_dead_tokens=not keep_dead,
            validate=validate,
        )


def score_named(text: str) -> str | ScoreFunction:
    """The score that a name, or ``module:pkg.mod:function``, stands for.

    Raises:
        SpecError: there is none.
    """
    source, colon, place = text.partition(":")
    if colon and source == "module":
        function = imported(place, text, "function")
        if not callable(function):
            raise SpecError(
                f"--score {text!r} is not a function", hint="name a function, or an object to call"
            )
        return function  # type: ignore[no-any-return]
    if text not in known_scores():
        known = ", ".join(known_scores())
        raise SpecError(
            f"--score {text!r} is not known",
            hint=f"choose from {known}, or write module:package.module:function",
        )
    return text


def show(value: Any, text: str, as_json: bool) -> None:
    """Print ``value`` for machines or ``text`` for people."""
    typer.echo(json.dumps(value, indent=2) if as_json else text)
