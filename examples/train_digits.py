"""The paper's Table 1 in miniature: train a 12-layer ViT from scratch, row by row, and compare accuracy and speed.

Handwritten digits lie at random places on larger canvases, cluttered with pieces of other digits; the class is that of
the only complete digit. For the same seed, every row starts from the same weights and sees the same images.

    python examples/train_digits.py             # all rows, three seeds; about two hours on one core
    python examples/train_digits.py --quick     # three tiny rows: shows that it runs, learns nothing

Every finished run is a line in digits.jsonl, and is not repeated: stop and continue at any time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from time import perf_counter
from typing import Any

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

import skipvit_fx as sv
from skipvit_fx.reports.environment import hardware, versions


@dataclass(frozen=True)
class Row:
    """One line of the table: a plan ("" for the baseline), and the paper's figures for ViT-small on ImageNet."""

    name: str
    plan: str
    warmup: bool = True
    paper_speed: float | None = None
    paper_top1: float | None = None


ROWS = (
    Row("ViT", "", paper_speed=1.0, paper_top1=70.17),
    Row("6(45%)+fused", "6(45%)+fused", paper_speed=1.1023, paper_top1=68.39),
    Row("4,7(30%,30%)+10", "4,7(30%,30%)+10", paper_speed=1.131, paper_top1=69.73),
    Row("4,7(30%,30%)+11", "4,7(30%,30%)+11", paper_speed=1.1609, paper_top1=69.4),
    Row("5,8(35%,35%)+10", "5,8(35%,35%)+10", paper_speed=1.0462, paper_top1=70.53),
    Row("5,8(35%,35%)+11", "5,8(35%,35%)+11", paper_speed=1.0745, paper_top1=70.41),
    Row("6(45%)+11", "6(45%)+11", paper_speed=1.098, paper_top1=70.64),
    Row("6(50%)+11", "6(50%)+11", paper_speed=1.1151, paper_top1=70.27),
    Row("6(55%)+11", "6(55%)+11", paper_speed=1.1323, paper_top1=70.16),
    Row("4,7(30%,30%)+10, no warm-up", "4,7(30%,30%)+10", warmup=False),
)


@dataclass(frozen=True)
class Settings:
    """The task and the recipe; runs with different settings are never mixed in one table."""

    canvas: int = 32
    patch: int = 4
    pieces: int = 10
    width: int = 48
    heads: int = 3
    epochs: int = 8
    warmup_epochs: int = 1
    images: int = 4096
    batch: int = 32
    rate: float = 1e-3
    validation: int = 1800


QUICK = Settings(canvas=24, width=24, epochs=2, images=64, validation=128)
TIMING_BATCH = 128


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, time all rows alternately, write the table."""
    args = parse(argv)
    settings, rows = (QUICK, ROWS[:3]) if args.quick else (Settings(), ROWS)
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / "digits.jsonl"
    runs = finished(log, settings)
    for seed in range(args.seeds):
        for row in rows:
            if (row.name, seed) not in runs:
                top1, seconds = train(row, seed, settings)
                runs[row.name, seed] = top1
                line = {"row": row.name, "seed": seed, "top1": top1, "seconds": seconds}
                with log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line | {"settings": asdict(settings)}) + "\n")
                print(f"seed {seed}, {row.name}: {top1:.2%} in {seconds:.0f} s", flush=True)
    speeds = measure(rows, settings, args.rounds)
    lines = [summary(row, runs, speeds, args.seeds) for row in rows]
    (args.out / "digits.json").write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
    text = page(lines, settings, args.seeds, args.rounds, quick=args.quick)
    (args.out / "digits.md").write_text(text, encoding="utf-8")
    draw(lines).savefig(args.out / "digits.png")
    print(text)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="folder")
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of timing, rows alternating")
    parser.add_argument("--quick", action="store_true", help="a tiny model, for a test")
    return parser.parse_args(argv)


def finished(log: Path, settings: Settings) -> dict[tuple[str, int], float]:
    """Accuracy by row and seed of the runs in the log that have these settings."""
    if not log.exists():
        return {}
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    ours = asdict(settings)
    return {(x["row"], x["seed"]): x["top1"] for x in lines if x["settings"] == ours}


# -- the task ---------------------------------------------------------------------------------------------------------


class Digits:
    """scikit-learn's 1797 digits of 8 x 8 pixels, four fifths to train with."""

    def __init__(self, settings: Settings) -> None:
        bunch = load_digits()
        order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))
        self.pixels = torch.tensor(bunch.images, dtype=torch.float32)[order] / 16
        self.classes = torch.tensor(bunch.target)[order]
        self.split = len(order) * 4 // 5
        self.settings = settings

    def training(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """New images ``[images, 1, canvas, canvas]`` and classes ``[images]``."""
        chosen = torch.randint(self.split, (self.settings.images,), generator=generator)
        return self._scenes(chosen, generator)

    def validation(self) -> tuple[Tensor, Tensor]:
        """The same images in every run, of digits that are in no training image."""
        generator = torch.Generator().manual_seed(1)
        count = self.settings.validation
        chosen = torch.randint(self.split, len(self.classes), (count,), generator=generator)
        return self._scenes(chosen, generator)

    def _scenes(self, chosen: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        task = self.settings
        images = scenes(self.pixels, chosen, generator, task.canvas, task.patch, task.pieces)
        return images, self.classes[chosen]


def scenes(
    pixels: Tensor,
    chosen: Tensor,
    generator: torch.Generator,
    canvas: int,
    patch: int,
    pieces: int,
    piece: int = 3,
) -> Tensor:
    """Images ``[images, 1, canvas, canvas]``, each with one whole digit.

    Args:
        pixels: the digits ``[digits, side, side]``, from 0 to 1.
        chosen: the digit of each image, ``[images]``.
        generator: draws the places, and the pieces' digits among the chosen ones.
        canvas: height and width of an image, in pixels.
        patch: the digit lies on a multiple of so many pixels.
        pieces: how many windows of other digits clutter each image.
        piece: height and width of such a window, in pixels.
    """
    side = pixels.shape[-1]
    images = torch.zeros(len(chosen), canvas, canvas)

    def anywhere(room: int) -> tuple[Tensor, Tensor]:
        rows, columns = torch.randint(room + 1, (2, len(chosen)), generator=generator)
        return rows, columns

    for _ in range(pieces):
        others = pixels[chosen[torch.randperm(len(chosen), generator=generator)]]
        window = others[_window(*anywhere(side - piece), size=piece)]
        place = _window(*anywhere(canvas - piece), size=piece)
        images[place] = torch.maximum(images[place], window)
    row, column = anywhere((canvas - side) // patch)
    place = _window(row * patch, column * patch, size=side)
    images[place] = torch.maximum(images[place], pixels[chosen])
    return images.unsqueeze(1) * 2 - 0.5


def _window(rows: Tensor, columns: Tensor, *, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Index of one ``size`` x ``size`` window per image, from its upper left corner."""
    images = torch.arange(len(rows))[:, None, None]
    steps = torch.arange(size)
    return images, rows[:, None, None] + steps[:, None], columns[:, None, None] + steps


# -- one run ----------------------------------------------------------------------------------------------------------


def build(row: Row, seed: int, settings: Settings) -> nn.Module:
    """The row's model, with the same random weights for every row. As in the paper, unread rows are computed."""
    torch.manual_seed(seed)
    model = vit(settings.canvas, settings.patch, settings.width, settings.heads)
    if not row.plan:
        return model
    example = torch.zeros(2, 1, settings.canvas, settings.canvas)
    return sv.rewrite(model, row.plan, example_inputs=example, eliminate_dead_tokens=False)


def vit(canvas: int, patch: int, width: int, heads: int) -> nn.Module:
    """timm's ViT of 12 layers for ten classes of grey images, with random weights."""
    return VisionTransformer(
        img_size=canvas,
        patch_size=patch,
        in_chans=1,
        num_classes=10,
        embed_dim=width,
        depth=12,
        num_heads=heads,
        mlp_ratio=2,
        weight_init="jax",
    )


def train(row: Row, seed: int, settings: Settings) -> tuple[float, float]:
    """Train from scratch. Returns the share of validation images classified correctly, and the seconds it took."""
    start = perf_counter()
    model = build(row, seed, settings)
    warmup = settings.warmup_epochs if row.warmup else 0
    schedule = sv.SkipSchedule(model, warmup) if row.plan else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.rate, weight_decay=0.05)
    steps = settings.epochs * (settings.images // settings.batch)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.rate, steps, pct_start=0.15)
    digits = Digits(settings)
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(settings.epochs):
        if schedule is not None:
            schedule.step(epoch)
        model.train()
        images, classes = digits.training(generator)
        for i in range(0, settings.images, settings.batch):
            chosen = slice(i, i + settings.batch)
            learn(model, optimizer, images[chosen], classes[chosen])
            rates.step()
    model.eval()
    images, classes = digits.validation()
    with torch.inference_mode():
        guesses = torch.cat([model(x).argmax(1) for x in images.chunk(10)])
    return (guesses == classes).double().mean().item(), perf_counter() - start


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    """One training step."""
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def measure(rows: Sequence[Row], settings: Settings, rounds: int) -> dict[str, list[float]]:
    """Seconds of a training step with skipping on, round by round. Rows take turns, so that drift affects all alike."""
    x, y = (part[:TIMING_BATCH] for part in Digits(settings).validation())
    models = {row.name: build(row, 0, settings).train() for row in rows}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    optimizers = {name: torch.optim.AdamW(m.parameters()) for name, m in models.items()}
    for round_ in range(rounds + 2):
        for name, model in models.items():
            start = perf_counter()
            learn(model, optimizers[name], x, y)
            if round_ >= 2:  # the first two warm up
                seconds[name].append(perf_counter() - start)
    return seconds


# -- the table --------------------------------------------------------------------------------------------------------


def summary(
    row: Row, runs: dict[tuple[str, int], float], speeds: dict[str, list[float]], seeds: int
) -> dict[str, Any]:
    """One row in numbers: accuracies by seed, images per second and the ratio to the baseline within each round."""
    ratios = [a / b for a, b in zip(speeds[ROWS[0].name], speeds[row.name], strict=True)]
    return {
        "row": row.name,
        "top1": [runs[row.name, seed] for seed in range(seeds)],
        "top1_baseline": [runs[ROWS[0].name, seed] for seed in range(seeds)],
        "seconds_a_step": median(speeds[row.name]),
        "speed": {"median": median(ratios), "min": min(ratios), "max": max(ratios)},
        "paper_speed": row.paper_speed,
        "paper_top1": row.paper_top1,
    }


def page(
    lines: Sequence[dict[str, Any]], settings: Settings, seeds: int, rounds: int, *, quick: bool
) -> str:
    """The table as Markdown."""
    tokens = (settings.canvas // settings.patch) ** 2
    total = settings.epochs * settings.images
    text = [
        "# The paper's table in miniature",
        "",
        f"Written by `python examples/train_digits.py{' --quick' if quick else ''}` on {hardware()}; "
        f"{versions('timm', 'scikit-learn')}.",
        "",
        f"A ViT of 12 layers, {settings.width} channels and {tokens} patches, trained from scratch on {total} images "
        "made on the fly: scikit-learn's digits, each at a random place of the patch grid among "
        f"{settings.pieces} pieces of others. {seeds} seeds; the same weights and images for every row "
        f"of a seed. {settings.warmup_epochs} of {settings.epochs} epochs are warm-up. Validation: "
        f"{settings.validation} images of digits not trained on; "
        "chance is 10 %. The paper's columns: ViT-small, ImageNet, Ascend 910A. One task and one machine: agreement "
        "here supports the paper, disagreement does not refute it.",
        "",
        "The difference is to the same seed's baseline, mean (min to max). Speed is that of a training step with "
        f"skipping on, {TIMING_BATCH} images, relative to the baseline's: median (min to max) of {rounds} "
        "alternating rounds. The average over a training with its warm-up is less. Unread rows are computed, "
        "as in the paper.",
        "",
        "| row | top-1 % | difference | speed | images/s | paper top-1 | paper speed |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for line in lines:
        gains = [a - b for a, b in zip(line["top1"], line["top1_baseline"], strict=True)]
        speed = line["speed"]
        paper = (
            ("", "")
            if line["paper_speed"] is None
            else (f"{line['paper_top1']:.2f}", f"{line['paper_speed']:.3f}")
        )
        cells = (
            f"`{line['row']}`",
            _spread([100 * a for a in line["top1"]], ".1f"),
            _spread([100 * gain for gain in gains], "+.1f"),
            f"{speed['median']:.3f} ({speed['min']:.3f} to {speed['max']:.3f})",
            f"{TIMING_BATCH / line['seconds_a_step']:.0f}",
            *paper,
        )
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join([*text, "", "![accuracy against speed](digits.png)", ""])


def _spread(values: Sequence[float], spec: str) -> str:
    return f"{fmean(values):{spec}} ({min(values):{spec}} to {max(values):{spec}})"


def draw(lines: Sequence[dict[str, Any]]) -> Figure:
    """Accuracy of every row against its speed; bars from the worst to the best seed."""
    figure = Figure(figsize=(9, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for line in lines:
        values = [100 * value for value in line["top1"]]
        middle = fmean(values)
        bars = [[middle - min(values)], [max(values) - middle]]
        axes.errorbar(
            line["speed"]["median"], middle, bars, marker="o", capsize=3, label=line["row"]
        )
    axes.axhline(100 * fmean(lines[0]["top1"]), color="grey", linewidth=0.8, linestyle=":")
    axes.set_xlabel("training speed relative to the baseline")
    axes.set_ylabel("top-1 %, mean and range of the seeds")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


if __name__ == "__main__":
    main()
