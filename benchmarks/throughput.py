"""How much of the saved multiply-adds turns into saved time and memory, in training and in inference.

In each round every rewrite runs right after the unmodified model with its own fused attention, in one process and in an
order that changes from round to round. Weights are random: the work does not depend on them. A training step is a
forward and a backward pass, without an optimiser, whose cost is the same for all.

    python benchmarks/throughput.py --rounds 15 --out docs/results/throughput.md
    python benchmarks/throughput.py --device cuda --batches 64 256 --precisions float32 bfloat16 --compile
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import groupby, product
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import timm
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from timm.utils import ParseKwargs
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import skipvit_fx as sv
from skipvit_fx.reports.environment import device_name, versions

MODEL, PLAN = "vit_small_patch16_224", "6(55%)+11"

TARGETS = {"plan": 0.97, "plan, no dead rows": 0.95, "0 %": 0.99, "skipping off": 0.99}
"""For ``MODEL`` and ``PLAN`` on a CPU, eager and in float32: the least share of the limit to reach."""


@dataclass(frozen=True)
class Setting:
    """A setting whose variants are timed together."""

    mode: str
    precision: str
    compiled: bool
    batch: int

    def __str__(self) -> str:
        how = "compiled" if self.compiled else "eager"
        return f"{self.mode}, {self.precision}, {how}, batch {self.batch}"


@dataclass(frozen=True)
class Result:
    """One variant in one setting.

    Attributes:
        images_per_second: median.
        speed: the time of the model, run right before, over this variant's: median, minimum and maximum.
        limit: the same ratio of multiply-adds.
        megabytes: peak of the allocator (CUDA), or what is saved for the backward pass (CPU, eager); training only.
    """

    setting: Setting
    variant: str
    images_per_second: float
    speed: tuple[float, float, float]
    limit: float
    megabytes: float | None

    @property
    def reached(self) -> float:
        return self.speed[0] / self.limit


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write, and return 1 if a target is missed."""
    args = parse(argv)
    torch.manual_seed(0)
    device = torch.device(args.device)
    model = timm.create_model(args.model, **args.model_kwargs).to(device)
    models, limits = variants(model, args.plan)
    settings = [
        Setting(*values)
        for values in product(
            args.modes, args.precisions, (False, True) if args.compile else (False,), args.batches
        )
    ]
    results = [
        result
        for setting in settings
        for result in measure(setting, models, limits, device, args.rounds)
    ]
    console = Console()
    caption = f"{device_name(device)}; {versions('timm')}; random weights; {args.rounds} rounds."
    console.print(f"{args.model} {args.plan}", *tables(results), sep="\n")
    console.print(caption, highlight=False)
    if args.out:
        write(args.out, page(args.model, args.plan, results, caption))
        write_json(args.out.with_suffix(".json"), {"on": caption, "results": rows(results)})
    missed = list(misses(args, results))
    for line in missed:
        console.print(line, highlight=False)
    return 1 if missed else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs)
    parser.add_argument("--plan", default=PLAN)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--modes", nargs="+", default=["training", "inference"])
    parser.add_argument("--precisions", nargs="+", default=["float32"], help="or bfloat16")
    parser.add_argument("--compile", action="store_true", help="compiled in addition to eager")
    parser.add_argument("--batches", nargs="+", type=int, default=[8])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="a .md file; a .json file goes beside it")
    return parser.parse_args(argv)


def variants(model: nn.Module, text: str) -> tuple[dict[str, nn.Module], dict[str, float]]:
    """The model and its rewrites, which share its weights, and by which factor each has fewer multiply-adds."""
    plan = sv.Plan.parse(text)
    nothing = sv.Plan(
        tuple(
            replace(span, stages=tuple(sv.Stage(stage.layer, 0) for stage in span.stages))
            for span in plan.spans
        )
    )
    rewrites: dict[str, Any] = {
        "plan": sv.rewrite(model, plan, eliminate_dead_tokens=False),
        "plan, no dead rows": sv.rewrite(model, plan),
        "0 %": sv.rewrite(model, nothing),
        "skipping off": sv.rewrite(model, plan),
    }
    reports = {name: sv.inspect(fast) for name, fast in rewrites.items()}
    limits = {name: report.baseline_macs / report.macs for name, report in reports.items()}
    sv.set_skipping(rewrites["skipping off"], False)
    return {"model": model, **rewrites}, limits | {"model": 1.0, "skipping off": 1.0}


def measure(
    setting: Setting,
    models: dict[str, nn.Module],
    limits: dict[str, float],
    device: torch.device,
    rounds: int,
) -> Iterator[Result]:
    """Time all variants in one setting."""
    torch._dynamo.reset()
    first = next(iter(models.values()))
    size = timm.data.resolve_model_data_config(first)["input_size"]
    side = getattr(getattr(first, "patch_embed", None), "img_size", None) or size[1:]
    x = torch.randn(setting.batch, size[0], *side, device=device)
    runs = {}
    for name, model in models.items():
        model.train(setting.mode == "training")
        call = torch.compile(model) if setting.compiled else model
        runs[name] = runner(setting, call, x)
    memory = {name: megabytes(setting, models[name], run, device) for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    ratios: dict[str, list[float]] = {name: [] for name in runs}
    shuffled = random.Random(0)
    order = list(runs)
    for i in track(range(rounds + 2), str(setting), transient=True):
        shuffled.shuffle(order)
        for name in order:
            own, its = timed(runs["model"], device), timed(runs[name], device)
            if i >= 2:  # the first two warm up
                seconds[name].append(its)
                ratios[name].append(own / its)
    for name, times in seconds.items():
        yield Result(
            setting,
            name,
            setting.batch / median(times),
            (median(ratios[name]), min(ratios[name]), max(ratios[name])),
            limits[name],
            memory[name],
        )


def timed(run: Callable[[], None], device: torch.device) -> float:
    """Seconds, until the device has finished."""
    start = perf_counter()
    run()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return perf_counter() - start


def runner(setting: Setting, model: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], None]:
    """One step of training, or one inference."""

    def precision() -> AbstractContextManager[Any]:
        if setting.precision == "float32":
            return nullcontext()
        return torch.autocast(x.device.type, dtype=getattr(torch, setting.precision))

    def train() -> None:
        with precision():
            loss = model(x).square().mean()
        loss.backward()

    def infer() -> None:
        with torch.inference_mode(), precision():
            model(x)

    return train if setting.mode == "training" else infer


def megabytes(
    setting: Setting, model: nn.Module, run: Callable[[], None], device: torch.device
) -> float | None:
    """Memory of one training step; see :class:`Result`."""
    if setting.mode != "training":
        return None
    if device.type == "cuda":
        run()  # gradients exist from now on
        gc.collect()
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) / 1e6
    if device.type != "cpu" or setting.compiled:
        return None
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(saved.values()) / 1e6


# -- what is shown ----------------------------------------------------------------------------------------------------

HEADINGS = ("variant", "images/s", "speed-up", "limit", "reached", "MB")


def cells(result: Result) -> tuple[str, ...]:
    """One line of either table."""
    middle, least, most = result.speed
    return (
        result.variant,
        f"{result.images_per_second:.1f}",
        f"{middle:.3f} ({least:.3f} to {most:.3f})",
        f"{result.limit:.3f}",
        f"{result.reached:.3f}",
        "" if result.megabytes is None else f"{result.megabytes:.0f}",
    )


def tables(results: Sequence[Result]) -> Iterator[Table]:
    """Tables for the terminal, one per setting."""
    for setting, group in groupby(results, key=lambda result: result.setting):
        drawn = Table(title=str(setting))
        for heading in HEADINGS:
            drawn.add_column(heading, justify="left" if heading == "variant" else "right")
        for result in group:
            drawn.add_row(*cells(result))
        yield drawn


def page(model: str, plan: str, results: Sequence[Result], caption: str) -> str:
    """The results as Markdown."""
    lines = [
        f"# Throughput of {model} with {plan}",
        "",
        f"Written by `benchmarks/throughput.py` on {caption}",
        "",
        "Speed-up: the time of the model, run right before, over the variant's, median (minimum to maximum). Limit: "
        "the same ratio of multiply-adds. Reached: the former over the latter. MB of a training step: the allocator's "
        "peak on CUDA, what is saved for the backward pass on a CPU. `plan` computes rows that nothing reads; `0 %` "
        "and `skipping off` drop nothing and show what the inserted nodes cost.",
        *sections(results),
        "",
    ]
    return "\n".join(lines)


def sections(results: Sequence[Result]) -> Iterator[str]:
    """Lines of Markdown: a heading and a table per setting."""
    for setting, group in groupby(results, key=lambda result: result.setting):
        yield from ("", f"## {setting}", "", f"| {' | '.join(HEADINGS)} |")
        yield "|---|" + "---:|" * (len(HEADINGS) - 1)
        yield from (f"| {' | '.join(cells(result))} |" for result in group)


def rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The results as values of JSON."""
    return [asdict(result) | {"reached": result.reached} for result in results]


def write(path: Path, text: str) -> None:
    """Write a file; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """The same with a value."""
    write(path, json.dumps(value, indent=1) + "\n")


def misses(args: argparse.Namespace, results: Sequence[Result]) -> Iterator[str]:
    """Targets that were not reached."""
    if (args.model, args.plan, args.device, args.model_kwargs) != (MODEL, PLAN, "cpu", {}):
        return
    for result in results:
        setting = result.setting
        if setting.compiled or setting.precision != "float32" or result.variant == "model":
            continue
        if result.reached < TARGETS[result.variant]:
            yield (
                f"missed: {setting}, {result.variant}: {result.reached:.3f} of the limit, "
                f"the target is at least {TARGETS[result.variant]:g}"
            )


if __name__ == "__main__":
    sys.exit(main())
