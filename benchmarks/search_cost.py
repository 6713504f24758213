"""What a search costs: the time of evaluating plans, beside as many forward passes, and everything else it does.

    python benchmarks/search_cost.py --out docs/results/search-cost.md

The images are noise and the weights random: both make no difference to the time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import timm
import torch

import skipvit_fx as sv
from skipvit_fx.planner.replay import Replay
from skipvit_fx.reports.environment import hardware, versions


class Clock:
    """Sums up the time of calls of a method, in seconds and in seconds of the processor."""

    def __init__(self, owner: type, name: str) -> None:
        self.wall = self.processor = 0.0
        self.calls = 0
        method = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start, used = perf_counter(), process_time()
            try:
                return method(*args, **kwargs)
            finally:
                self.wall += perf_counter() - start
                self.processor += process_time() - used
                self.calls += 1

        setattr(owner, name, timed)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and write a page and a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("docs/results/search-cost.md"))
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = timm.create_model(args.model).eval()
    shape = (args.images, *model.pretrained_cfg["input_size"])
    batches = list(torch.randn(shape).split(args.batch))
    begun, replayed = Clock(Replay, "begin"), Clock(Replay, "run")

    def forward() -> tuple[float, float]:
        start, used = perf_counter(), process_time()
        with torch.no_grad():
            for x in batches:
                model(x)
        return perf_counter() - start, process_time() - used

    forward()
    passes = [forward() for _ in range(2)]
    start, used = perf_counter(), process_time()
    result = sv.search(model, batches, trials=args.trials, holdout=0, measure=False)
    total = perf_counter() - start, process_time() - used
    passes += [forward() for _ in range(2)]
    one = [median(times) for times in zip(*passes, strict=True)]
    count = len(result.candidates)
    found = {
        "model": args.model,
        "images": args.images,
        "plans": count,
        "threads": args.threads,
        "hardware": hardware(),
        "versions": versions("timm", "optuna"),
        "forward": one,
        "evaluating": [replayed.wall, replayed.processor],
        "share": [replayed.wall / (count * one[0]), replayed.processor / (count * one[1])],
        "beside": [
            total[0] - replayed.wall - begun.wall,
            total[1] - replayed.processor - begun.processor,
        ],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    args.out.write_text(page(found), encoding="utf-8")
    print(page(found))


def page(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    wall, processor = (
        [found[name][i] for name in ("forward", "evaluating", "share", "beside")] for i in (0, 1)
    )
    lines = [
        "# What a search costs",
        "",
        f"Written by `python benchmarks/search_cost.py` on {found['hardware']}; {found['versions']}; float32, "
        f"{found['threads']} thread{'s' if found['threads'] > 1 else ''}, a shared machine, so seconds of the "
        "processor are shown as well.",
        "",
        f"`sv.search` with {found['plans']} plans of up to two stages, the profile and published plans among them, on "
        f"{found['images']} images for {found['model']} (random weights, noise). *Beside*: everything but the model: "
        "capturing and analysing it once, judging, editing and counting every plan, and the sampler.",
        "",
        "| | seconds | of the processor |",
        "|---|---:|---:|",
        f"| one forward pass of all images | {wall[0]:.2f} | {processor[0]:.2f} |",
        f"| evaluating {found['plans']} plans | {wall[1]:.1f} | {processor[1]:.1f} |",
        f"| the same, as a share of {found['plans']} forward passes | {wall[2]:.3f} | {processor[2]:.3f} |",
        f"| beside | {wall[3]:.1f} | {processor[3]:.1f} |",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
