"""What three plans leave of three pictures in three models: ``docs/gallery.md`` and its pictures.

    python benchmarks/gallery.py

The weights are random, since none are downloaded: which patches stay means nothing, how many and where does.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor

import skipvit_fx as sv
from skipvit_fx.cli.models import parse_spec
from skipvit_fx.page.inputs import inputs_of
from skipvit_fx.reports.environment import versions
from skipvit_fx.reports.grid import find_grid
from skipvit_fx.reports.pictures import after_stage, shown

ROOT = Path(__file__).resolve().parents[1]
MODELS = (
    "timm:vit_small_patch16_224",
    "hf:dinov2_with_registers",
    "timm:vit_base_patch16_siglip_224",
)
PLANS = ("6(55%)+11", "4,7(40%,40%)+11+fused", "1-8(16)+merged")
TITLES = {
    "timm:vit_small_patch16_224": "ViT-S/16 of timm, with a class token",
    "hf:dinov2_with_registers": "DINOv2 with registers, of Hugging Face: five prefix tokens",
    "timm:vit_base_patch16_siglip_224": "SigLIP of timm, which has no class token: the mean query scores",
}
INTRODUCTION = """\
# Gallery

What is left of three pictures after the last stage of three plans: patches that were dropped are dark, those that were
merged have their token's mean colour. **The weights are random**, since none were downloaded: how many patches leave is
right, which ones means nothing. `skipvit report` shows the same for your model and your pictures, stage by stage
([the report](report.md)).
"""
SOURCES = """\
| picture | by | licence |
|---|---|---|
| chelsea.png | Stéfan van der Walt, in [scikit-image](https://scikit-image.org) | CC0 |
| china.jpg | [danielbuechele](https://www.flickr.com/photos/danielbuechele/6061409035), in [scikit-learn](https://scikit-learn.org) | [CC BY 2.0](https://creativecommons.org/licenses/by/2.0/) |
| flower.jpg | [vultilion](https://www.flickr.com/photos/vultilion/6056698931), in [scikit-learn](https://scikit-learn.org) | [CC BY 2.0](https://creativecommons.org/licenses/by/2.0/) |

They were cropped, resized, and changed as described.
"""  # noqa: E501


@dataclass(frozen=True)
class Shown:
    """One plan on one model.

    Attributes:
        plan: as text.
        left: patches after the last stage.
        inspection: the other numbers.
        panels: for every picture, what is left after the last stage.
    """

    plan: str
    left: int
    inspection: sv.Inspection
    panels: list[Tensor]


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page and its pictures."""
    args = parse(argv)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    parts = []
    for spec in args.models:
        originals, rows = look(spec, args.plans, pictures(), args.options)
        name = f"gallery-{spec.partition(':')[2].replace('_', '-')}.png"
        draw(originals, rows, args.out.parent / "images" / name)
        parts.append(section(spec, rows, name))
        print(f"{spec}: {name}", flush=True)
    command = " ".join(["python benchmarks/gallery.py", *map(shlex.quote, argv or sys.argv[1:])])
    args.out.write_text(page(parts, command.strip()), encoding="utf-8")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--plans", nargs="+", default=PLANS)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "gallery.md")
    parser.set_defaults(options={})
    return parser.parse_args(argv)


def pictures() -> list[Any]:
    """Three pictures with a free licence."""
    found: list[Any] = [ROOT / "examples" / "images" / "chelsea.png"]
    for name in ("china.jpg", "flower.jpg"):
        picture: Any = Image.fromarray(load_sample_image(name))
        picture.filename = name
        found.append(picture)
    return found


def look(
    spec: str, plans: Sequence[str], images: Sequence[Any], options: dict[str, Any]
) -> tuple[list[Tensor], list[Shown]]:
    """The pictures as the model sees them, and what each plan leaves of them."""
    torch.manual_seed(0)
    model = parse_spec(spec, **options).build()
    rows: list[Shown] = []
    originals: list[Tensor] = []
    for plan in plans:
        fast = sv.rewrite(model, plan)
        inputs = inputs_of(fast, images)
        assert inputs.image is not None
        originals = [shown(image, fast) for image in inputs.image]
        with torch.no_grad():
            last = sv.trace_tokens(fast, *inputs.args, **inputs.kwargs)[-1]
        grid = find_grid(fast, inputs.args, inputs.kwargs)
        assert grid is not None, f"{spec}: it is not known where its patches are"
        panels = [after_stage(picture, last, grid, i) for i, picture in enumerate(originals)]
        rows.append(Shown(plan, last.kept.shape[1], sv.inspect(fast), panels))
    return originals, rows


def draw(originals: list[Tensor], rows: list[Shown], path: Path) -> None:
    """A row for the pictures and one for every plan. 128 colours make a small file."""
    lines = [("the pictures", originals), *((row.plan, row.panels) for row in rows)]
    figure = Figure(
        figsize=(1.7 * len(originals) + 0.3, 1.7 * len(lines)), dpi=100, layout="constrained"
    )
    for axes, (title, panels) in zip(
        figure.subplots(len(lines), len(originals), squeeze=False), lines, strict=True
    ):
        for place, panel in zip(axes, panels, strict=True):
            place.imshow(panel.permute(1, 2, 0).numpy())
            place.set_xticks([])
            place.set_yticks([])
            for side in place.spines.values():
                side.set_visible(False)
        axes[0].set_ylabel(title, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    with Image.open(path) as drawn:
        drawn.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


def section(spec: str, rows: list[Shown], name: str) -> str:
    """A model's part of the page."""
    lines = [
        f"## {TITLES.get(spec, spec)}",
        "",
        f"![What is left of three pictures in {spec}, plan by plan](images/{name})",
        "",
        "| plan | patches left | multiply-adds | of the model's |",
        "|---|---:|---:|---:|",
    ]
    for row in rows:
        found = row.inspection
        share = found.macs / found.baseline_macs
        lines.append(
            f"| `{row.plan}` | {row.left} of {found.patches} | {found.macs / 1e9:.2f} G | {share:.1%} |"
        )
    return "\n".join([*lines, ""])


def page(parts: Sequence[str], command: str) -> str:
    """The whole page."""
    foot = f"## Pictures\n\n{SOURCES}\nMade by `{command}` with {versions('timm', 'transformers', 'skipvit_fx')}.\n"
    return "\n".join([INTRODUCTION, *parts, foot])


if __name__ == "__main__":
    raise SystemExit(main())
