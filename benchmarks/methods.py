"""Every method of ``skipvit_fx.METHODS`` on one model: how much faster it is, and which patches it keeps.

Timed as by ``throughput.py``, against the unmodified model: inference, or a training step for methods
that skip in training only. ToMe is also timed with 13 tokens in each layer. Beside ToMe stands a forward pass
written by hand that cuts the sequence to the same lengths and chooses nothing: what no merging can be faster than.

How fast the unmodified model is depends on glibc's allocator: with its defaults, large tensors are new pages of memory
in each call, until a process has grown. Set ``MALLOC_TRIM_THRESHOLD_`` and ``MALLOC_MMAP_THRESHOLD_`` to
1073741824, and no variant gains by its smaller tensors. The pages say what was set.

    python benchmarks/methods.py --rounds 15 --out docs/results/methods.md --page docs/methods.md \\
        --picture docs/results/methods.png
    python benchmarks/methods.py --results docs/results/methods.json --page docs/methods.md

The second command measures nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from timm.utils import ParseKwargs
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import skipvit_fx as sv
from skipvit_fx.page.inputs import read_picture
from skipvit_fx.reports.environment import device_name, versions
from skipvit_fx.reports.grid import Grid
from skipvit_fx.reports.pictures import after_stage, shown
from throughput import Result, Setting, measure, rows, sections, tables, write, write_json

MODEL = "vit_small_patch16_224"

MORE = (replace(sv.METHODS["tome"], name="ToMe, r = 13", plan="1-12(13)+merged"),)
"""What is timed besides the methods."""

CUT = "the lengths of {}, cut by hand"
"""The variant beside a method that merges."""

TARGETS = {"ToMe": 0.97, "ToMe, r = 13": 0.97}
"""On a CPU and in float32: the least share of the limit to reach."""

IMAGE = Path(__file__).resolve().parents[1] / "examples" / "images" / "chelsea.png"


@dataclass(frozen=True)
class Measured:
    """One model.

    Attributes:
        model: its name in timm.
        macs: multiply-adds of one image, by variant.
        results: in all settings.
    """

    model: str
    macs: dict[str, int]
    results: list[Result]

    def of(self, variant: str) -> list[Result]:
        """Those of one variant, by batch."""
        found = [result for result in self.results if result.variant == variant]
        return sorted(found, key=lambda result: result.setting.batch)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write, and return 1 if a target is missed."""
    args = parse(argv)
    console = Console()
    if args.results:
        caption, measured = read(args.results)
    else:
        caption, measured = conditions(args), [timed(name, args) for name in args.models]
    for one in measured:
        console.print(one.model, *tables(one.results), sep="\n")
    console.print(caption, highlight=False)
    if args.out:
        write(args.out, results_page(measured, caption))
        write_json(args.out.with_suffix(".json"), {"on": caption, "models": as_json(measured)})
    if args.page:
        write(args.page, methods_page(measured[0], caption))
    if args.picture:
        save_picture(args.picture, build(args.models[0], args).eval(), args.image)
    missed = list(misses(args, measured))
    for line in missed:
        console.print(line, highlight=False)
    return 1 if missed else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--models",
        nargs="+",
        default=[MODEL],
        help="plain ViTs of timm; the page is about the first",
    )
    parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs)
    parser.add_argument("--pretrained", action="store_true", help="timm's weights; needs network")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="float32", help="or bfloat16")
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--results", type=Path, help="a .json file: measure nothing, read these")
    parser.add_argument("--out", type=Path, help="a .md file; a .json file goes beside it")
    parser.add_argument("--page", type=Path, help="a .md file that explains the methods")
    parser.add_argument("--picture", type=Path, help="a .png file")
    parser.add_argument("--image", type=Path, default=IMAGE, help="what the picture shows")
    return parser.parse_args(argv)


def build(name: str, args: argparse.Namespace) -> nn.Module:
    """The model, with the same weights every time."""
    torch.manual_seed(0)
    return timm.create_model(name, args.pretrained, **args.model_kwargs).to(args.device)


def conditions(args: argparse.Namespace) -> str:
    """On what, with what and how often is measured."""
    where = device_name(torch.device(args.device))
    weights = "timm's" if args.pretrained else "random"
    memory = [
        f"{key}={value}" for key, value in sorted(os.environ.items()) if key.startswith("MALLOC_")
    ]
    described = [where, versions("timm"), f"{weights} weights", f"{args.rounds} rounds", *memory]
    return f"{'; '.join(described)}."


# -- time -------------------------------------------------------------------------------------------------------------


def only_trains(method: sv.Method) -> bool:
    """Whether it skips in training only."""
    return bool(method.options.get("train_only"))


def timed(name: str, args: argparse.Namespace) -> Measured:
    """Time a model and its rewrites."""
    model = build(name, args)
    methods = {method.name: method for method in (*sv.METHODS.values(), *MORE)}
    fast = {key: sv.rewrite(model, m.plan, **m.options) for key, m in methods.items()}
    reports = {variant: sv.inspect(rewritten) for variant, rewritten in fast.items()}
    limits = {variant: report.baseline_macs / report.macs for variant, report in reports.items()}
    macs = {variant: report.macs for variant, report in reports.items()}
    macs["model"] = next(iter(reports.values())).baseline_macs
    cuts: dict[str, nn.Module] = {
        CUT.format(key): OnlyCut(model, lengths(fast[key], args)) for key in TARGETS
    }
    macs |= {variant: counted(cut, args) for variant, cut in cuts.items()}
    limits |= {variant: macs["model"] / macs[variant] for variant in cuts}
    results: list[Result] = []
    for mode in ("inference", "training"):
        models = {v: m for v, m in fast.items() if only_trains(methods[v]) == (mode == "training")}
        if mode == "inference":
            models |= cuts
        for batch in args.batches:
            results += measure(
                Setting(mode, args.precision, False, batch),
                {"model": model, **models},
                limits | {"model": 1.0},
                torch.device(args.device),
                args.rounds,
            )
    return Measured(name, macs, results)


class OnlyCut(nn.Module):
    """A ViT of timm that loses the last rows of its sequence after the attention of each layer, and chooses nothing.

    Its outputs mean nothing. Its time is the least that a method needs whose layers are as long.

    Args:
        model: with the same classes of layers as ``vit_small_patch16_224``.
        lengths: of the sequence after each layer.
    """

    def __init__(self, model: nn.Module, lengths: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        self.lengths = lengths

    def forward(self, x: Tensor) -> Tensor:
        model = self.model
        x = model.norm_pre(model._pos_embed(model.patch_embed(x)))
        for block, length in zip(model.blocks, self.lengths, strict=True):
            x = (x + block.ls1(block.attn(block.norm1(x))))[:, :length]
            x = x + block.ls2(block.mlp(block.norm2(x)))
        return model.forward_head(model.norm(x))


def one_image(model: nn.Module, args: argparse.Namespace) -> Tensor:
    """A batch of one."""
    return torch.randn(1, 3, *model.patch_embed.img_size, device=args.device)


def lengths(fast: nn.Module, args: argparse.Namespace) -> list[int]:
    """Tokens after each layer of a plan with a stage in every layer; after the last one only those that are read."""
    prefix = fast.num_prefix_tokens
    stages = sv.trace_tokens(fast.eval(), one_image(fast, args))
    return [*(prefix + stage.kept.shape[1] for stage in stages[:-1]), prefix]


def counted(model: OnlyCut, args: argparse.Namespace) -> int:
    """Multiply-adds of one image."""
    x = one_image(model.model, args)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.eval()(x)
    return counter.get_total_flops() // 2


def misses(args: argparse.Namespace, measured: Sequence[Measured]) -> Iterator[str]:
    """Targets that were not reached."""
    if (args.device, args.precision, args.model_kwargs) != ("cpu", "float32", {}):
        return
    for one in measured:
        for result in one.results:
            if result.reached < TARGETS.get(result.variant, 0):
                yield (
                    f"missed: {one.model}, {result.setting}, {result.variant}: {result.reached:.3f} "
                    f"of the limit, the target is at least {TARGETS[result.variant]:g}"
                )


def as_json(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """The results as values of JSON."""
    return [{"model": m.model, "macs": m.macs, "results": rows(m.results)} for m in measured]


def read(path: Path) -> tuple[str, list[Measured]]:
    """The caption and the results of an earlier run."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    models = []
    for one in stored["models"]:
        results = [
            Result(
                Setting(**row["setting"]),
                row["variant"],
                row["images_per_second"],
                tuple(row["speed"]),
                row["limit"],
                row["megabytes"],
            )
            for row in one["results"]
        ]
        models.append(Measured(one["model"], one["macs"], results))
    return stored["on"], models


# -- the picture ------------------------------------------------------------------------------------------------------


def save_picture(path: Path, model: nn.Module, image: Path) -> None:
    """One panel per method: what is left of an image after its last stage. 256 colours make a small file."""
    prepared = read_picture(image, model.patch_embed.img_size, model)
    picture, x = shown(prepared, model), prepared[None]
    grid = Grid(*model.patch_embed.grid_size)
    panels = {"the image": picture}
    for method in sv.METHODS.values():
        fast = sv.rewrite(model, method.plan, **method.options).train(only_trains(method))
        with torch.no_grad():
            stage = sv.trace_tokens(fast, x.to(next(model.parameters()).device))[-1]
        title = f"{method.name}: {stage.kept.shape[1]} of {math.prod(grid)}"
        panels[title] = after_stage(picture, stage, grid)
    figure = draw(panels)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    with Image.open(path) as drawn:
        drawn.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def draw(panels: Mapping[str, Tensor], columns: int = 5) -> Figure:
    """Panels in a grid, with their names above."""
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(2 * columns, 2.25 * lines), dpi=110, layout="constrained")
    all_axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes in all_axes:
        axes.axis("off")
    for axes, (title, panel) in zip(all_axes, panels.items(), strict=False):
        axes.imshow(panel.permute(1, 2, 0).numpy())
        axes.set_title(title, fontsize=10)
    return figure


# -- the pages --------------------------------------------------------------------------------------------------------


def results_page(measured: Sequence[Measured], caption: str) -> str:
    """All results as Markdown."""
    lines = [
        "# Published methods, measured",
        "",
        f"Written by `benchmarks/methods.py` on {caption}",
        "",
        "Speed-up: the time of the model, run right before, over the variant's, median (minimum to maximum). Limit: "
        "the same ratio of multiply-adds, with rows left out that nothing reads. Reached: the former over the latter. "
        "Methods that skip in training only are measured by their training step. Lengths cut by hand: a forward pass "
        "that loses as many tokens in each layer and chooses nothing; the difference to it is what merging costs. "
        "[What they are](../methods.md).",
    ]
    for one in measured:
        headings = sections(one.results)
        lines += [line.replace("## ", f"## {one.model}, ", 1) for line in headings]
    return "\n".join([*lines, ""])


def methods_page(measured: Measured, caption: str) -> str:
    """What the methods are, how fast, and what they keep, as Markdown."""
    batches = sorted({result.setting.batch for result in measured.results})
    headings = [
        "method",
        "paper",
        "plan",
        "GMACs",
        "limit",
        *(f"batch {batch}" for batch in batches),
    ]
    lines = [
        "# Published methods",
        "",
        "Published ways to drop or merge tokens, as plans for a Vision Transformer with a class token, 12 layers and "
        "196 patches. Each is one line of `skipvit_fx.METHODS`:",
        "",
        "```python",
        'method = sv.METHODS["evit"]',
        "fast = sv.rewrite(model, method.plan, **method.options)",
        "print(method.paper, method.equal, method.differs)",
        "```",
        "",
        f"| {' | '.join(headings)} |",
        "|---|---|---|" + "---:|" * (len(headings) - 3),
        *page_rows(measured),
        "",
        f"Of {measured.model}, on {caption} The model itself has {measured.macs['model'] / 1e9:.3f} GMACs. Limit: the "
        "ratio of multiply-adds; rows that nothing reads are left out as well. By batch: how many times as fast as the "
        "unmodified model, run right before, median (minimum to maximum), in inference, or, marked with *, in a "
        "training step, as these methods skip in training only. Written by `benchmarks/methods.py`; "
        "[all figures](results/methods.md). None of them says how accurate a method is.",
        "",
        *what_merging_costs(measured),
        "On a fast GPU the work of choosing counts for more: in eager mode on an H200, in bfloat16 with batch 256, the "
        "many small operators of a plan that merges or chooses in every layer make it slower than the model itself "
        "([figures](results/methods-h200.md)). Drop or merge more in fewer layers there, and measure.",
        "",
        "## What is equal, and what is not",
        *(line for method in sv.METHODS.values() for line in described(method)),
        "",
        "## What they keep",
        "",
        "![What each method keeps of one image](results/methods.png)",
        "",
        "One image after the last stage of each method, and how many tokens are left of its patches: dropped patches "
        "are dark, and merged ones have the mean colour of the token that they are part of.",
    ]
    if "random weights" in caption:
        lines[-1] += (
            " The weights of the model are random, so the picture shows what the plans do to the tokens, and nothing "
            "about which patches a trained model finds important."
        )
    return "\n".join([*lines, ""])


def what_merging_costs(measured: Measured) -> Iterator[str]:
    """A paragraph: the speed of methods that merge, beside that of the same lengths without merging."""
    told = []
    for name in TARGETS:
        cuts = {result.setting: result.speed[0] for result in measured.of(CUT.format(name))}
        told += [
            f"{name}, batch {its.setting.batch}: {its.speed[0]:.3f} of {cuts[its.setting]:.3f}"
            for its in measured.of(name)
            if its.setting in cuts
        ]
    if not told:  # older results
        return
    yield (
        "What merging itself costs shows beside a forward pass written by hand that cuts the sequence to the same "
        f"lengths and chooses nothing, in the same rounds: {'; '.join(told)} times as fast as the model."
    )
    yield ""


def page_rows(measured: Measured) -> Iterator[str]:
    """The lines of the table."""
    for method in (*sv.METHODS.values(), *MORE):
        results = measured.of(method.name)
        mark = "*" if only_trains(method) else ""
        cells = [
            method.name,
            f"[{method.arxiv}]({method.url})",
            ", ".join(f"`{word}`" for word in (in_short(method.plan), *options(method))),
            f"{measured.macs[method.name] / 1e9:.3f}",
            f"{results[0].limit:.3f}",
        ]
        for result in results:
            middle, least, most = result.speed
            cells.append(f"{middle:.3f}{mark} ({least:.3f} to {most:.3f})")
        yield f"| {' | '.join(cells)} |"


def options(method: sv.Method) -> list[str]:
    """Its options in Python."""
    return [
        f'{key}="{value}"' if isinstance(value, str) else f"{key}={value!r}"
        for key, value in method.options.items()
    ]


def in_short(plan: str) -> str:
    """Of many spans the first and the last."""
    spans = plan.split(";")
    return plan if len(spans) < 3 else f"{spans[0]};...;{spans[-1]}"


def described(method: sv.Method) -> Iterator[str]:
    """One method, with its whole plan."""
    yield from ("", f"### {method.name}", "", f"[{method.paper}]({method.url})", "")
    yield from ("```", method.plan, "```", "")
    if method.options:
        yield f"- **Options**: {', '.join(f'`{option}`' for option in options(method))}"
    yield from (f"- **Equal**: {method.equal}", f"- **Different**: {method.differs}")


if __name__ == "__main__":
    sys.exit(main())
