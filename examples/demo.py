"""One picture through a timm ViT and through its rewrite: what is dropped, what changes, and how fast each is.

Run it with `make demo`, or `python examples/demo.py --plan "4,7(30%,30%)+10" --pretrained`.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from time import perf_counter

import timm
import torch
from matplotlib.figure import Figure
from PIL import Image
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config
from torch import Tensor, nn

import skipvit_fx as sv

MODEL = "vit_small_patch16_224"
PICTURE = Path(__file__).parent / "images" / "chelsea.png"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the demo."""
    args = parse(argv)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    model = build(args.pretrained, args.seed).to(device)
    try:
        fast = sv.rewrite(model, args.plan)
    except sv.SkipViTError as error:
        sys.exit(str(error))
    report = sv.inspect(fast)
    print(report)

    data = resolve_model_data_config(model)
    x = create_transform(**data)(Image.open(args.picture).convert("RGB"))[None].to(device)
    with torch.inference_mode():
        print(f"\n{compare(model(x)[0], fast(x)[0])}")
        stages = sv.trace_tokens(fast, x)

    mean, std = (torch.tensor(data[key])[:, None, None] for key in ("mean", "std"))
    picture = (x[0].cpu() * std + mean).clamp(0, 1)
    kept = {stage.layer: stage.kept[0].cpu() for stage in stages}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    draw(picture, kept, grid(model)).savefig(args.out)
    print(f"\nDropped patches, dimmed: {args.out}")

    batch = args.batch or (8 if device.type == "cpu" else 256)
    with torch.inference_mode():
        seconds = measure([model, fast], x.expand(batch, -1, -1, -1).contiguous(), args.rounds)
    print(f"\n{speed_report(seconds, batch, report.baseline_macs / report.macs)}")
    print(f"On {hardware(device)}; torch {torch.__version__}, float32, {args.rounds} rounds.")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--plan", default="6(55%)+11", help="default: %(default)s")
    parser.add_argument("--pretrained", action="store_true", help="timm's weights; needs network")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="any image file")
    parser.add_argument(
        "--out", type=Path, default=Path("out/demo.png"), help="default: %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights")
    parser.add_argument(
        "--rounds", type=int, default=15, help="rounds of timing, default: %(default)s"
    )
    parser.add_argument(
        "--batch", type=int, help="images per timed batch, default: 8, on a GPU 256"
    )
    return parser.parse_args(argv)


def build(pretrained: bool, seed: int) -> nn.Module:
    """The model, in eval mode."""
    torch.manual_seed(seed)
    if not pretrained:
        print(
            f"{MODEL} with random weights (seed {seed}): the speed is real, the classes and the "
            "choice of patches mean nothing. --pretrained fetches timm's weights.\n"
        )
        return timm.create_model(MODEL).eval()
    print(f"{MODEL} with timm's weights\n")
    try:
        return timm.create_model(MODEL, pretrained=True).eval()
    except OSError as error:
        sys.exit(
            f"Could not fetch the weights: {error}\nWithout --pretrained, no network is needed."
        )


def compare(before: Tensor, after: Tensor, top: int = 5) -> str:
    """The best classes of two rows of logits side by side, and how far apart the logits are."""
    names = ImageNetInfo()

    def best(logits: Tensor) -> list[str]:
        shares, classes = logits.softmax(-1).topk(top)
        return [
            f"{share:6.2%}  {names.index_to_description(index)[:28]}"
            for share, index in zip(shares.tolist(), classes.tolist(), strict=True)
        ]

    rows = [("model", "rewritten"), *zip(best(before), best(after), strict=True)]
    table = "\n".join(f"{left:<38}{right}".rstrip() for left, right in rows)
    apart, size = (before - after).abs().max(), before.abs().max()
    return f"{table}\nLogits differ by at most {apart:.3g}; the largest is {size:.3g}."


def grid(model: nn.Module) -> tuple[int, int]:
    """Rows and columns of patches."""
    if not isinstance(model, timm.models.VisionTransformer):
        raise TypeError(f"no patch grid in a {type(model).__name__}")
    rows, columns = model.patch_embed.grid_size
    return rows, columns


def dim(picture: Tensor, kept: Tensor, rows: int, columns: int) -> Tensor:
    """The picture [3, H, W] with all patches except the kept ones darkened."""
    _, height, width = picture.shape
    light = torch.full((rows * columns,), 0.25)
    light[kept] = 1.0
    light = light.view(rows, columns)
    light = light.repeat_interleave(height // rows, 0).repeat_interleave(width // columns, 1)
    return picture * light


def draw(picture: Tensor, kept: dict[int, Tensor], patches: tuple[int, int]) -> Figure:
    """The picture, and beside it one panel per stage with the patches left after each drop."""
    rows, columns = patches
    panels = {"what the model sees": picture}
    for layer, indices in kept.items():
        title = f"after layer {layer}: {len(indices)} of {rows * columns} patches"
        panels[title] = dim(picture, indices, rows, columns)
    figure = Figure(figsize=(4 * len(panels), 4.4), dpi=120, layout="constrained")
    for axes, (title, panel) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        axes.imshow(panel.permute(1, 2, 0).numpy())
        axes.set_title(title, fontsize=11)
        axes.axis("off")
    return figure


def measure(models: Sequence[nn.Module], x: Tensor, rounds: int) -> list[list[float]]:
    """Seconds of each model in each round. The models take turns, so that drift affects all alike."""

    def seconds(model: nn.Module) -> float:
        start = perf_counter()
        model(x)
        if x.device.type != "cpu":
            torch.accelerator.synchronize()
        return perf_counter() - start

    for model in models:  # warm up
        seconds(model)
        seconds(model)
    turns = [[seconds(model) for model in models] for _ in range(rounds)]
    return [list(times) for times in zip(*turns, strict=True)]


def speed_report(seconds: list[list[float]], batch: int, limit: float) -> str:
    """Times per picture of the model and its rewrite, and the ratio within each round."""
    milliseconds = [[1000 * time / batch for time in times] for times in seconds]
    ratios = [before / after for before, after in zip(*milliseconds, strict=True)]
    lines = [
        f"{name:<10} {spread(times, '.2f')} ms per picture, in batches of {batch}"
        for name, times in zip(("model", "rewritten"), milliseconds, strict=True)
    ]
    return "\n".join(
        [
            *lines,
            f"speed-up   {spread(ratios, '.3f')} as measured in this run (median, min-max)",
            f"limit      {limit:.3f} by the multiply-adds saved",
        ]
    )


def spread(values: Sequence[float], spec: str) -> str:
    """The median with its range."""
    return f"{median(values):{spec}} ({min(values):{spec}}-{max(values):{spec}})"


def hardware(device: torch.device) -> str:
    """The name of the device that runs the model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return str(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        fields = (line.partition(":") for line in cpuinfo.read_text().splitlines())
        name = next(
            (value.strip() for key, _, value in fields if key.strip() == "model name"), name
        )
    return f"{name}, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
