"""Rewrite many models, compare each with the mask-and-freeze reference, and record the results.

``python benchmarks/zoo.py --isotropic --elsewhere --out docs/zoo.md``. Interrupt it and run it again: finished models
are skipped. Weights are random.
"""

from __future__ import annotations

import fnmatch
import gc
import json
import math
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import skipvit_fx
from skipvit_fx.capture.example import example_of
from skipvit_fx.cli.models import Spec, SpecError, need, parse_spec
from skipvit_fx.cli.options import REFUSED, ImgSize, Json, show
from skipvit_fx.errors import SkipViTError, UnsupportedModelError
from skipvit_fx.reports.environment import hardware, versions
from skipvit_fx.testing import TOLERANCE, Reference, randomize

ISOTROPIC = (
    "vision_transformer",
    "vision_transformer_hybrid",
    "vision_transformer_relpos",
    "deit",
    "beit",
    "eva",
    "cait",
    "naflexvit",
)
"""Modules of timm in which every model is one sequence of tokens from the first layer to the last."""

ELSEWHERE = (
    *(f"torchvision:vit_{size}" for size in ("b_16", "b_32", "l_16", "l_32", "h_14")),
    "hf:vit",
    "hf:deit",
    "hf:dinov2",
    "hf:dinov2_with_registers",
    "hf:dinov3_vit",
    "hf:beit",
    "hf:data2vec-vision",
    "hf:clip_vision_model",
    "hf:siglip_vision_model",
    "hf:vit_mae",
    "hf:vit_msn",
    "hf:ijepa",
    "hf:aimv2_vision_model",
    "hf:chinese_clip_vision_model",
    "hf:idefics3_vision",
    "hf:internvl_vision",
    "hf:mlcd_vision_model",
    "hf:smolvlm_vision",
    "hf:tipsv2_vision_model",
    "hf:AltCLIPVisionModel",
    "hf:BlipVisionModel",
    "hf:Blip2VisionModel",
    "hf:CLIPSegVisionModel",
    "hf:FlavaImageModel",
    "hf:GitVisionModel",
    "hf:InstructBlipVisionModel",
    "hf:JanusVisionModel",
    "hf:MetaClip2VisionModel",
    "hf:OwlViTVisionModel",
    "hf:Owlv2VisionModel",
    "hf:yolos",
    "open_clip:ViT-S-32",
    "open_clip:ViT-M-16",
    "open_clip:ViT-B-32",
    "open_clip:ViT-B-16",
    "open_clip:ViT-L-14",
    "open_clip:coca_ViT-B-32",
    "open_clip:ViT-B-16-SigLIP",
    "open_clip:EVA02-B-16",
    "open_clip:RN50",
)
"""Encoders of torchvision, Hugging Face and open_clip; the last is not a Transformer, and must be refused."""

DEPTHS = (24, 16, 12, 8, 6, 4, 3, 2)
"""Depths for a model that is too large: the largest of these that fits is used."""

_TOO_LARGE = "raise --limit, on a machine with the memory for it"

FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    NotImplementedError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""Errors that one model may raise without stopping the others; each becomes a row that names it."""


@dataclass(frozen=True)
class Row:
    """The result for one model.

    Attributes:
        name: the name that the command takes.
        status: ``exact``, ``refused``, ``wrong``, ``skipped`` or ``error``.
        layers, prefix, patches: what was found; ``None`` if nothing was.
        plan: the plan of the rewrite.
        error: largest relative error against the reference.
        seconds: the duration of the rewrite.
        reason: why it was refused, skipped or failed.
        note: what was done to the model beforehand.
        on: the versions and the machine.
    """

    name: str
    status: str
    layers: int | None = None
    prefix: int | None = None
    patches: int | None = None
    plan: str = ""
    error: float | None = None
    seconds: float | None = None
    reason: str = ""
    note: str = ""
    on: str = ""


def isotropic_names() -> list[str]:
    """All of timm's isotropic Vision Transformers."""
    timm = need("timm", "timm")
    return [f"timm:{name}" for module in ISOTROPIC for name in timm.list_models(module=module)]


def other_names() -> list[str]:
    """One model of every other module of timm, a small one if its name says so."""
    timm = need("timm", "timm")
    names = []
    for module in timm.list_modules():
        if module not in ISOTROPIC and (known := timm.list_models(module=module)):
            small = [
                name for name in known if any(word in name for word in ("nano", "tiny", "xxs"))
            ]
            names.append(f"timm:{(small or known)[0]}")
    return names


class Kind(StrEnum):
    """What the plan of every model does."""

    DROPPED = "dropped"
    SPANS = "spans"
    MERGED = "merged"


_TITLES = {
    Kind.DROPPED: "# The zoo",
    Kind.SPANS: "# The zoo, with two spans",
    Kind.MERGED: "# The zoo, merging",
}


def default_plan(depth: int, kind: Kind = Kind.DROPPED) -> str:
    """A plan for a model with so many layers, or as much of it as these allow.

    Two stages of 30 % and a return before the end; or two spans, the second of which begins where the first returns; or
    10 % merged in every layer but the last two, and returned before the last.
    """
    first = max(1, depth // 3)
    second = max(first + 1, 2 * depth // 3)
    if kind is Kind.MERGED:
        last = max(1, depth - 2)
        layers = f"1-{last}" if last > 1 else "1"
        return f"{layers}(10%)+{min(last + 2, depth + 1)}+merged"
    if second > depth:
        return f"{first}(30%)+{first + 1}"
    if kind is Kind.SPANS:
        return f"{first}(30%)+{second};{second}(9)+{min(second + 2, depth + 1)}"
    return f"{first},{second}(30%,30%)+{min(second + 2, depth + 1)}"


def survey(
    name: str, *, limit: float, seed: int = 0, kind: Kind = Kind.DROPPED, **options: Any
) -> Row:
    """Build, rewrite and check one model. Never raises because of a model; see :data:`FAILURES`."""
    note = ""
    try:
        options, note = _fit(name, limit, options)
        torch.manual_seed(seed)
        model = randomize(parse_spec(name, **options).build(), seed)
        return _check(name, model, seed, note, kind)
    except SpecError as error:
        return Row(name, "skipped", reason=error.message, note=note)
    except SkipViTError as error:
        reason = error.reason if isinstance(error, UnsupportedModelError) else error.message
        return Row(name, "refused", reason=reason, note=note)
    except FAILURES as error:
        return Row(name, "error", reason=f"{type(error).__name__}: {error}", note=note)


def _fit(name: str, limit: float, options: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Options with which the model's parameters fit into ``limit`` bytes, and what these change."""
    try:
        size = parameter_bytes(parse_spec(name, **options))
    except SpecError as error:
        if options.get("depth"):
            return _fit(name, limit, {**options, "depth": None})
        if isinstance(error.__cause__, (NotImplementedError, RuntimeError, ValueError)):
            return options, "size not known beforehand"
        raise
    if size <= limit:
        return options, ""
    for depth in DEPTHS:
        shallow = {**options, "depth": depth}
        try:
            smaller = parameter_bytes(parse_spec(name, **shallow))
        except SpecError as error:
            raise SpecError(
                f"{size / 2**30:.1f} GiB of parameters, and its depth cannot be set",
                hint=_TOO_LARGE,
            ) from error
        if smaller <= limit:
            return shallow, f"made {depth} layers deep ({size / 2**30:.1f} GiB of parameters)"
    raise SpecError(
        f"{size / 2**30:.1f} GiB of parameters, and still too large with {DEPTHS[-1]} layers",
        hint=_TOO_LARGE,
    )


def _check(name: str, model: nn.Module, seed: int, note: str, kind: Kind) -> Row:
    (example, *_), _ = example_of(model, None)
    x = torch.randn(example.shape, generator=torch.Generator().manual_seed(seed))
    reference = Reference(model, x)
    plan = default_plan(reference.depth, kind)
    start = perf_counter()
    fast = skipvit_fx.rewrite(model, plan, example_inputs=x)
    seconds = perf_counter() - start
    check = reference.check(fast, x)
    skipvit_fx.set_skipping(fast, False)
    with torch.no_grad():
        torch.manual_seed(seed)  # an autoencoder draws its mask
        off = fast(x)
        torch.manual_seed(seed)
        own = model(x)
    reason = ""
    if not check.exact:
        reason = "differs from the reference"
    elif type(off) is not type(own):
        reason = f"returns a {type(off).__name__}, the model a {type(own).__name__}"
    elif not _same_bits(off, own):
        reason = "with skipping off, differs from the model"
    status = "wrong" if reason else "exact"
    return Row(
        name,
        status,
        reference.depth,
        reference.prefix_tokens,
        reference.patches,
        plan,
        check.error,
        seconds,
        reason,
        note,
    )


def _same_bits(a: Any, b: Any) -> bool:
    pairs = zip(tree_leaves(a), tree_leaves(b), strict=True)
    return all(torch.equal(x, y) for x, y in pairs if isinstance(y, Tensor))


# -- models -----------------------------------------------------------------------------------------------------------


def expand(text: str) -> list[str]:
    """The models that a name stands for: itself, or every one that its wildcards match.

    Raises:
        SpecError: nothing matches.
    """
    spec = parse_spec(text)
    if not any(mark in spec.name for mark in "*?["):
        return [str(spec)]
    if spec.source == "timm":
        names = need("timm", "timm").list_models(spec.name)
    elif spec.source == "torchvision":
        names = fnmatch.filter(need("torchvision", "demo").models.list_models(), spec.name)
    else:
        raise SpecError(
            f"no wildcards in {text!r}", hint="only timm and torchvision list their models"
        )
    if not names:
        raise SpecError(f"no model matches {text!r}", hint="try fewer letters before the *")
    return [f"{spec.source}:{name}" for name in names]


def parameter_bytes(spec: Spec) -> int:
    """Bytes of the model's parameters and buffers, found without allocating them.

    Raises:
        SpecError: it cannot be built, or not on the meta device.
    """
    try:
        with torch.device("meta"):
            model = spec.build()
    except (AssertionError, NotImplementedError, RuntimeError, ValueError) as error:
        raise SpecError(
            f"{spec} cannot be built on the meta device: {error}", hint="check its options"
        ) from error
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# -- many models ----------------------------------------------------------------------------------------------


def read_rows(path: Path) -> dict[str, Row]:
    """Finished rows by name; a line cut off when the command was killed does not count."""
    rows: dict[str, Row] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = Row(**json.loads(line))
            except (json.JSONDecodeError, TypeError):
                continue
            rows[row.name] = row
    return rows


def run(
    names: Iterable[str],
    log: Path,
    advance: Callable[[str], None],
    *,
    limit: float,
    **options: Any,
) -> list[Row]:
    """Survey every name that ``log`` does not have, or had to skip; each row is written to ``log`` at once."""
    finished = read_rows(log)
    here = f"{versions('timm', 'torchvision', 'transformers')}, on {hardware()}"
    rows = []
    log.parent.mkdir(parents=True, exist_ok=True)
    for name in names:
        advance(name)
        if name not in finished or finished[name].status == "skipped":
            finished[name] = replace(survey(name, limit=limit, **options), on=here)
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(finished[name])) + "\n")
            gc.collect()
        rows.append(finished[name])
    return rows


# -- the page -------------------------------------------------------------------------------------------------


def page(rows: Sequence[Row], command: str, kind: Kind = Kind.DROPPED) -> str:
    """The table as Markdown."""
    counts = {status: sum(row.status == status for row in rows) for status in _MEANING}
    lines = [
        _TITLES[kind],
        "",
        f"Written by `{command}`, with {_places(rows)}.",
        "",
        "All weights are random, moved far from initialisation so that every term matters; they say nothing about "
        "accuracy. Each model is rewritten, run on random images and compared with a reference that keeps all tokens "
        "in place, masks the dropped ones and freezes their state, or holds the mean of merged ones; with skipping off "
        "it must equal the model to the last bit. The reference shares the finding of layers with the compiler; see "
        "`skipvit_fx/testing.py`.",
        "",
        *(f"- {count} {status}: {_MEANING[status]}" for status, count in counts.items() if count),
        "",
        "| model | layers | prefix | patches | plan | result | max. relative error | seconds | |",
        "|---|---:|---:|---:|---|---|---:|---:|---|",
        *(_line(row) for row in rows),
        "",
    ]
    return "\n".join(lines)


def _places(rows: Sequence[Row]) -> str:
    counts = Counter(row.on for row in rows)
    if len(counts) == 1:
        return next(iter(counts))
    return "; and with ".join(f"{on} ({count} of the models)" for on, count in counts.items())


_MEANING = {
    "exact": f"relative error at most {TOLERANCE:g}, and the model itself with skipping off",
    "refused": "with the reason given",
    "wrong": "rewritten, but not equal",
    "skipped": "could not be built here; where memory is the reason, a larger `--limit` on a larger machine runs it",
    "error": "failed in a way that is not a refusal",
}


def _line(row: Row) -> str:
    def number(value: float | None, spec: str) -> str:
        return "" if value is None or math.isnan(value) else format(value, spec)

    cells = [
        row.name,
        number(row.layers, "d"),
        number(row.prefix, "d"),
        number(row.patches, "d"),
        f"`{row.plan}`" if row.plan else "",
        row.status,
        number(row.error, ".1e"),
        number(row.seconds, ".1f"),
        "; ".join(part for part in (row.reason, row.note) if part),
    ]
    return f"| {' | '.join(_cell(cell) for cell in cells)} |"


def _cell(text: str, most: int = 200) -> str:
    flat = " ".join(text.split()).replace("|", "\\|")
    return flat if len(flat) <= most else f"{flat[: most - 1]}…"


# -- the command ------------------------------------------------------------------------------------------------------


def main(
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
    kind: Annotated[
        Kind, typer.Option(help="what plans do: two stages dropped, two spans, or tokens merged")
    ] = Kind.DROPPED,
    img_size: ImgSize = None,
    depth: Annotated[
        int | None, typer.Option(help="layers of every model whose depth can be set")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="forget the rows of an earlier run")
    ] = False,
    as_json: Json = False,
) -> None:
    """Rewrite many models with random weights, compare each with the reference, write a table.

    Interrupt it and run it again: finished models are skipped.
    """
    wanted = [full for name in names or () for full in expand(name)]
    wanted += isotropic_names() if isotropic else []
    wanted += other_names() if others else []
    wanted += ELSEWHERE if elsewhere else []
    if not wanted:
        raise SpecError(
            "no models named", hint="name some, such as 'timm:vit_tiny*', or --isotropic"
        )
    log = out.with_suffix(".jsonl")
    if fresh:
        log.unlink(missing_ok=True)
    options = {"img_size": img_size, "depth": depth, "kind": kind}
    rows = _with_progress(list(dict.fromkeys(wanted)), log, limit, options)
    command = " ".join(["python benchmarks/zoo.py", *map(shlex.quote, sys.argv[1:])])
    text = page(rows, command, kind)
    out.write_text(text, encoding="utf-8")
    summary = "\n".join(f"{row.status:<8} {row.name}  {row.reason}".rstrip() for row in rows)
    show([asdict(row) for row in rows], f"{summary}\nwritten to {out}", as_json)
    if any(row.status in ("wrong", "error") for row in rows):
        raise typer.Exit(REFUSED)


def _with_progress(names: list[str], log: Path, limit: float, options: dict[str, Any]) -> list[Row]:
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(names))

        def advance(name: str) -> None:
            progress.update(task, description=name, completed=names.index(name))

        rows = run(names, log, advance, limit=limit * 2**30, **options)
        progress.update(task, description="", completed=len(names))
    return rows


if __name__ == "__main__":
    try:
        typer.run(main)
    except SkipViTError as error:
        sys.exit(f"error: {error}")
