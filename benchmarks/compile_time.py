"""The time that a rewrite takes, for ViT-S/16 with 12, 24, 48 and 96 layers.

The first call in the process is timed separately; then every depth takes its turn in each round, so that other load
affects all alike. One model is in memory at a time. Processor seconds, over all threads, show how busy the machine was
otherwise: on a quiet machine they are close to wall-clock seconds.

Run it with `make bench`, or `python benchmarks/compile_time.py --rounds 5`.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import sys
from collections.abc import Sequence
from statistics import median
from time import perf_counter, process_time
from typing import NamedTuple

import timm
from rich.console import Console
from rich.table import Table
from torch import nn

import skipvit_fx
from skipvit_fx.reports.environment import hardware, versions

DEPTHS = (12, 24, 48, 96)
TARGETS = {"12 layers, first call": 3.0, "12 layers": 2.0, "96 layers / 12 layers": 9.0}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and return 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="profile a 12-layer rewrite")
    args = parser.parse_args(argv)

    first = measure(vit(DEPTHS[0]))
    if args.profile:
        profile(vit(DEPTHS[0]))
        return 0
    rounds = [{depth: measure(vit(depth)) for depth in DEPTHS} for _ in range(args.rounds)]

    table = Table(title="Seconds to rewrite ViT-S/16 with two stages")
    for heading in ("layers", "median", "min", "max", "median / 12 layers", "processor, median"):
        table.add_column(heading, justify="right")
    typical = {depth: median(times[depth].clock for times in rounds) for depth in DEPTHS}
    table.add_row("12, first call", f"{first.clock:.2f}", "", "", "", f"{first.processor:.2f}")
    for depth in DEPTHS:
        clock = [times[depth].clock for times in rounds]
        processor = median(times[depth].processor for times in rounds)
        ratio = typical[depth] / typical[DEPTHS[0]]
        figures = (typical[depth], min(clock), max(clock), ratio, processor)
        table.add_row(str(depth), *(f"{figure:.2f}" for figure in figures))
    console = Console()
    console.print(table)
    console.print(f"{hardware()}; {versions('timm')}; {args.rounds} rounds.", highlight=False)

    reached = {
        "12 layers, first call": first.clock,
        "12 layers": typical[12],
        "96 layers / 12 layers": typical[96] / typical[12],
    }
    missed = [name for name, figure in reached.items() if figure > TARGETS[name]]
    for name in missed:
        console.print(
            f"missed: {name} {reached[name]:.2f}, the target is at most {TARGETS[name]:g}"
        )
    return 1 if missed else 0


class Seconds(NamedTuple):
    """Wall-clock and processor seconds."""

    clock: float
    processor: float


def vit(depth: int) -> nn.Module:
    """ViT-S/16 of the given depth."""
    return timm.create_model("vit_small_patch16_224", depth=depth).eval()


def measure(model: nn.Module) -> Seconds:
    """One rewrite."""
    depth = len(model.get_submodule("blocks")._modules)
    plan = f"{depth // 3},{depth // 2}(30%,30%)+{depth - 1}"
    clock, processor = perf_counter(), process_time()
    skipvit_fx.rewrite(model, plan)
    return Seconds(perf_counter() - clock, process_time() - processor)


def profile(model: nn.Module) -> None:
    """Print the functions that take most of the time of one rewrite."""
    profiler = cProfile.Profile()
    profiler.runcall(measure, model)
    pstats.Stats(profiler).sort_stats("cumulative").print_stats(45)


if __name__ == "__main__":
    sys.exit(main())
