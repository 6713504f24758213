"""The commands ``skipvit export``, ``skipvit atc-check`` and ``skipvit doctor``."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from skipvit_fx.ascend import doctor as doctor_
from skipvit_fx.ascend.atc import CANN, SOC, atc_check
from skipvit_fx.cli.options import (
    REFUSED,
    Cann,
    Cut,
    Depth,
    ImgSize,
    Json,
    KeepDead,
    Model,
    PrefixTokens,
    Pretrained,
    Score,
    Soc,
    Validate,
    build,
    rewritten,
    show,
)
from skipvit_fx.errors import ExportError
from skipvit_fx.export.to_onnx import ExportedFile, export_onnx
from skipvit_fx.plan import Plan
from skipvit_fx.reports.table import columns


class TargetName(StrEnum):
    """``--target``."""

    onnxruntime = "onnxruntime"
    ascend = "ascend"


class FailOn(StrEnum):
    """``--fail-on``: the lowest level for which the exit status is 1."""

    fail = "fail"
    slow = "slow"
    unknown = "unknown"


def register(app: typer.Typer) -> None:
    """Add the three commands to an application."""
    app.command()(export)
    app.command("atc-check")(check)
    app.command()(doctor)


Out = Annotated[Path, typer.Option("--out", "-o", help="the file to write")]
Target = Annotated[TargetName, typer.Option(help="what will read the file")]
Opset = Annotated[
    int | None, typer.Option(help="11-16 for ascend, 11-18 for onnxruntime", show_default=False)
]
Batch = Annotated[
    str | None, typer.Option(help="a number, or dynamic for onnxruntime", show_default=False)
]
ExposeKept = Annotated[bool, typer.Option("--expose-kept", help="also return the kept positions")]
Verify = Annotated[bool, typer.Option("--verify", help="run the file in onnxruntime and compare")]
PlanOrNone = Annotated[
    str | None,
    typer.Argument(
        metavar="[PLAN]", help="such as 6(55%)+11; without it, the original", show_default=False
    ),
]


def export(
    model: Model,
    plan: PlanOrNone = None,
    out: Out = Path("model.onnx"),
    target: Target = TargetName.onnxruntime,
    opset: Opset = None,
    batch: Batch = None,
    cann: Cann = CANN,
    soc: Soc = SOC,
    expose_kept: ExposeKept = False,
    verify: Verify = False,
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
    """Write a model as ONNX, rewritten with PLAN or unchanged."""
    size = _batch(batch)
    wanted = Plan.parse(plan) if plan is not None else None
    module = build(model, img_size, depth, pretrained)
    if wanted is not None:
        module = rewritten(module, wanted, prefix_tokens, cut, score, keep_dead_tokens, validate)
    written = export_onnx(
        module,
        out,
        target=target.value,
        opset=opset,
        batch=size,
        cann=cann,
        soc=soc,
        expose_kept=expose_kept,
        verify=verify,
    )
    lines = [
        f"written to {file}, opset {written.opset}, batch {written.batch or 'dynamic'}"
        for file in written.files
    ]
    if written.difference is not None:
        lines.append(f"onnxruntime differs from the module by {written.difference:.2g} at most")
    if written.check is not None:
        lines.append(str(written.check))
    show(_plain(written), "\n".join(lines), as_json)


def _plain(written: ExportedFile) -> dict[str, Any]:
    """What was written, for JSON."""
    listed = {name: list(getattr(written, name)) for name in ("inputs", "outputs")}
    return listed | {
        "files": [str(file) for file in written.files],
        "target": written.target,
        "opset": written.opset,
        "batch": written.batch or "dynamic",
        "difference": written.difference,
        "check": None if written.check is None else json.loads(written.check.to_json()),
    }


def _batch(text: str | None) -> int | Literal["dynamic"] | None:
    if text is None or text == "dynamic":
        return text  # type: ignore[return-value]
    if not (text.isascii() and text.isdecimal()):
        raise ExportError(f"--batch {text!r} is not a batch size", hint="give a number, or dynamic")
    return int(text)


def check(
    file: Annotated[Path, typer.Argument(help="any ONNX file", show_default=False)],
    cann: Cann = CANN,
    soc: Soc = SOC,
    fail_on: Annotated[
        FailOn, typer.Option(help="exit with 1 at this level or a worse one")
    ] = FailOn.fail,
    as_json: Json = False,
    as_sarif: Annotated[bool, typer.Option("--sarif", help="for continuous integration")] = False,
) -> None:
    """Check an ONNX file against what is publicly known about Ascend's ATC, without running it."""
    report = atc_check(file, cann=cann, soc=soc)
    typer.echo(report.to_sarif() if as_sarif else report.to_json() if as_json else str(report))
    levels = ("fail", "slow", "unknown")
    counted = levels[: levels.index(fail_on.value) + 1]
    if any(finding.level in counted for finding in report.findings):
        raise typer.Exit(REFUSED)


def doctor(
    as_json: Json = False,
) -> None:
    """Show what is installed, what works, and what to do about the rest."""
    lines = doctor_.examine()
    rows: list[tuple[str, ...]] = []
    for line in lines:
        rows.append((line.what, line.state, line.detail))
        if line.advice:
            rows.append(("", "", line.advice))
    show([asdict(line) for line in lines], "\n".join(columns(rows, to_the_left=range(3))), as_json)
