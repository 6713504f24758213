"""The command ``skipvit bench``."""

from __future__ import annotations

from typing import Annotated

import torch
import typer

from skipvit_fx.ascend.npu import npu_is_available
from skipvit_fx.capture.example import example_of
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
    rewritten,
    show,
)
from skipvit_fx.cli.progress import counting
from skipvit_fx.errors import first_line
from skipvit_fx.plan import Plan
from skipvit_fx.reports.environment import device_name, versions
from skipvit_fx.reports.latency import measure_latency


def bench(
    model: Model,
    plan: PlanText,
    device: Annotated[str, typer.Option(help="such as cpu, cuda or npu")] = "cpu",
    batch: Annotated[int, typer.Option(min=1, help="images at once")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="rounds of measurements")] = 10,
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
    """Time a rewritten model and the original alternately: predicted and measured, layer by layer."""
    wanted = Plan.parse(plan)
    place = device_named(device)
    original = build(model, img_size, depth, pretrained).to(place)
    fast = rewritten(original, wanted, prefix_tokens, cut, score, keep_dead_tokens, validate)
    (example, *_), _ = example_of(original, None)
    images = torch.randn(batch, *example.shape[1:], dtype=example.dtype, device=place)
    with counting("Measuring") as progress:
        report = measure_latency(original, fast, images, rounds=rounds, progress=progress)
    where = device_name(place)
    made_of = versions("timm", "skipvit_fx")
    text = f"{report}\n\n{where}; {made_of}"
    show(report.to_dict() | {"hardware": where, "versions": made_of}, text, as_json)


def device_named(text: str) -> torch.device:
    """The named device, if it works.

    Raises:
        SpecError: it does not work.
    """
    if text.partition(":")[0] == "npu" and not npu_is_available():
        raise SpecError("torch-npu sees no device", hint="skipvit doctor shows what is missing")
    hint = "skipvit doctor shows what is available; cpu always works"
    try:
        device = torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:
        raise SpecError(
            f"the device {text!r} cannot be used: {first_line(error)}", hint=hint
        ) from error
    if device.type == "meta":
        raise SpecError(f"the device {text!r} cannot be used: it computes nothing", hint=hint)
    return device
