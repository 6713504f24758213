"""The commands ``skipvit export``, ``skipvit atc-check`` and ``skipvit doctor``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

import skipvit_fx
from skipvit_fx.errors import ExportError
from skipvit_fx.export import doctor as doctor_
from skipvit_fx.export.atc import CANN, SOC, atc_check
from skipvit_fx.export.to_onnx import export_onnx

FOUND = 1
"""Exit status where the check found what ``--fail-on`` names."""


class TargetName(StrEnum):
    """``--target``."""

    onnxruntime = "onnxruntime"
    ascend = "ascend"


class FailOn(StrEnum):
    """``--fail-on``: from which level on the exit status is 1."""

    fail = "fail"
    slow = "slow"
    unknown = "unknown"


def register(app: typer.Typer) -> None:
    """Add the three commands to an application."""
    app.command()(export)
    app.command("atc-check")(check)
    app.command()(doctor)


def export(
    model: Annotated[str, typer.Argument(help="as for the other commands", show_default=False)],
    plan: Annotated[
        str | None,
        typer.Argument(
            metavar="[PLAN]", help="such as 6(55%)+11; without: the original", show_default=False
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="the file to write")] = Path(
        "model.onnx"
    ),
    target: Annotated[TargetName, typer.Option(help="who reads the file")] = TargetName.onnxruntime,
    opset: Annotated[
        int | None, typer.Option(help="11-16 for ascend, 11-18 for onnxruntime", show_default=False)
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(help="a number, or dynamic for onnxruntime", show_default=False),
    ] = None,
    cann: Annotated[str, typer.Option(help="release of CANN to check against")] = CANN,
    soc: Annotated[str, typer.Option(help="chip to check for")] = SOC,
    expose_kept: Annotated[
        bool, typer.Option("--expose-kept", help="also return the kept positions")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="run the file in onnxruntime and compare")
    ] = False,
    img_size: Annotated[int | None, typer.Option(show_default=False)] = None,
    depth: Annotated[int | None, typer.Option(help="layers", show_default=False)] = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="fetch the published weights")
    ] = False,
) -> None:
    """Write a model as ONNX, rewritten with PLAN or as it is."""
    from skipvit_fx.cli.models import parse_spec

    torch.manual_seed(0)
    spec = parse_spec(model, pretrained=pretrained, img_size=img_size, depth=depth)
    module = spec.build()
    if plan is not None:
        module = skipvit_fx.rewrite(module, plan)
    if not pretrained and spec.source != "module":
        typer.echo(f"{spec} with random weights; --pretrained fetches the published ones", err=True)
    written = export_onnx(
        module,
        out,
        target=target.value,
        opset=opset,
        batch=_batch(batch),
        cann=cann,
        soc=soc,
        expose_kept=expose_kept,
        verify=verify,
    )
    for file in written.files:
        typer.echo(f"written to {file}, opset {written.opset}, batch {written.batch or 'dynamic'}")
    if written.difference is not None:
        typer.echo(f"onnxruntime differs from the module by {written.difference:.2g} at most")
    if written.check is not None:
        typer.echo(str(written.check))


def _batch(text: str | None) -> int | Literal["dynamic"] | None:
    if text is None or text == "dynamic":
        return text  # type: ignore[return-value]
    if not text.isdecimal():
        raise ExportError(f"--batch {text!r} is no batch size", hint="a number, or dynamic")
    return int(text)


def check(
    file: Annotated[Path, typer.Argument(help="any ONNX file", show_default=False)],
    cann: Annotated[str, typer.Option(help="release of CANN")] = CANN,
    soc: Annotated[str, typer.Option(help="chip, as ATC's --soc_version")] = SOC,
    baseline: Annotated[
        Path | None,
        typer.Option(
            help="the original model's file, to compare fusible patterns", show_default=False
        ),
    ] = None,
    fail_on: Annotated[FailOn, typer.Option(help="exit with 1 from this level on")] = FailOn.fail,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
    as_sarif: Annotated[bool, typer.Option("--sarif", help="for continuous integration")] = False,
) -> None:
    """Check an ONNX file against what is publicly known of Ascend's ATC, without running it."""
    report = atc_check(file, cann=cann, soc=soc, baseline=baseline)
    typer.echo(report.to_sarif() if as_sarif else report.to_json() if as_json else str(report))
    levels = ("fail", "slow", "unknown")
    counted = levels[: levels.index(fail_on.value) + 1]
    if any(finding.level in counted for finding in report.findings):
        raise typer.Exit(FOUND)


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
) -> None:
    """Say what is installed, what works, and what to do about the rest."""
    lines = doctor_.examine()
    typer.echo(doctor_.as_json(lines) if as_json else doctor_.as_text(lines))
