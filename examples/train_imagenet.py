"""Train a ViT with a token-level skip connection on folders of images, with timm's data, optimisers and schedules.

    python examples/train_imagenet.py --make-synthetic out/pictures      # a few tiny images, to try it
    python examples/train_imagenet.py out/pictures --model-kwargs img_size=32 patch_size=8 depth=4 embed_dim=48 \\
        --plan "2(50%)+4" --epochs 4 --warmup-epochs 2 --batch 8

    torchrun --nproc-per-node=8 examples/train_imagenet.py /data/imagenet --amp bfloat16 --compile

DIR holds train/CLASS/*.jpg and val/CLASS/*.jpg. Every epoch ends with a checkpoint in --out that is complete or absent;
--resume continues from it to the same weights. Defaults follow DeiT. On an NPU: --device npu.
"""

from __future__ import annotations

import os

# An installed torch_npu without CANN would make `import torch` fail. Here --device npu imports it.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

import argparse
import csv
import importlib
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from time import perf_counter
from typing import Any

import timm
import torch
from PIL import Image
from rich.progress import track
from timm.data import Mixup, create_dataset, create_loader, resolve_data_config
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, ParseKwargs, random_seed
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import skipvit_fx as sv


def main(argv: Sequence[str] | None = None) -> None:
    """Train."""
    args = parse(argv)
    if args.make_synthetic:
        make_synthetic(args.make_synthetic)
        return
    device = start(args.device)
    try:
        train(args, device)
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, nargs="?", metavar="DIR")
    parser.add_argument(
        "--make-synthetic", type=Path, metavar="DIR", help="write images, then stop"
    )
    parser.add_argument("--out", type=Path, default=Path("out/train"), help="default: %(default)s")
    parser.add_argument(
        "--resume", action="store_true", help="continue from the checkpoint in --out"
    )
    parser.add_argument("--model", default="vit_small_patch16_224", help="default: %(default)s")
    parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs)
    parser.add_argument("--plan", default="6(55%)+11", help='default: %(default)s; "" for none')
    parser.add_argument("--warmup-epochs", type=int, default=15, help="epochs without skipping")
    parser.add_argument("--ramp-epochs", type=int, default=0, help="epochs in which ratios rise")
    parser.add_argument("--multiple-of", type=int, default=1, help="of shortened sequences")
    parser.add_argument("--train-only", action="store_true", help="validate on all tokens")
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--batch", type=int, default=256, help="images per device")
    parser.add_argument("--opt", default="adamw")
    parser.add_argument("--lr", type=float, help="default: 5e-4 per 512 images of a step")
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--lr-warmup-epochs", type=int, default=5)
    parser.add_argument("--clip-grad", type=float, default=1.0)
    parser.add_argument("--drop-path", type=float, default=0.1)
    parser.add_argument("--augment", default="rand-m9-mstd0.5-inc1", help="timm's RandAugment")
    parser.add_argument("--mixup", type=float, default=0.8)
    parser.add_argument("--cutmix", type=float, default=1.0)
    parser.add_argument("--smoothing", type=float, default=0.1)
    parser.add_argument("--erase", type=float, default=0.25, help="probability")
    parser.add_argument("--ema", type=float, default=0.9998, help="decay; 0 for no average")
    parser.add_argument("--amp", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", choices=["cuda", "npu", "cpu"], default="cuda")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tensorboard", action="store_true", help="in addition to log.csv")
    args = parser.parse_args(argv)
    if not args.data and not args.make_synthetic:
        parser.error("name the folder that holds train and val, or make one: --make-synthetic DIR")
    return args


def start(name: str) -> torch.device:
    """The device of this process, which is one of several if torchrun started it."""
    if name == "npu":
        try:
            importlib.import_module("torch_npu")
        except (ImportError, RuntimeError, OSError) as error:
            sys.exit(
                f"--device npu needs torch_npu and CANN: {error}\n`skipvit doctor` tells more."
            )
    if not torch.get_device_module(name).is_available():
        sys.exit(f"There is no {name} device here. --device cpu works everywhere.")
    if "LOCAL_RANK" not in os.environ:
        return torch.device(name)
    device = torch.device("cpu" if name == "cpu" else f"{name}:{os.environ['LOCAL_RANK']}")
    if name != "cpu":
        torch.get_device_module(name).set_device(device)
    distributed.init_process_group({"cuda": "nccl", "npu": "hccl", "cpu": "gloo"}[name])
    return device


def rank() -> int:
    """The number of this process."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def processes() -> int:
    """The number of processes."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


# -- training ---------------------------------------------------------------------------------------------------------


def train(args: argparse.Namespace, device: torch.device) -> None:
    """Run all remaining epochs."""
    checkpoint = args.out / "last.pt"
    if checkpoint.exists() != args.resume:
        found = (
            "holds a checkpoint: --resume it, or choose" if checkpoint.exists() else "holds none:"
        )
        sys.exit(f"{args.out} {found} another --out")
    args.out.mkdir(parents=True, exist_ok=True)
    training, validation, classes = loaders(args, device)
    random_seed(args.seed)
    model = build(args, classes).to(device)
    average = ModelEmaV3(model, decay=args.ema) if args.ema else None
    # The average is a copy, with its own switch.
    schedules = [
        sv.SkipSchedule(one, args.warmup_epochs, ramp_epochs=args.ramp_epochs)
        for one in (model, average)
        if one is not None and args.plan
    ]
    optimizer, rates = optimizer_of(args, model)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "float16")
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "rates": rates}
    parts |= {"scaler": scaler} | ({"average": average} if average else {})
    history = resumed(checkpoint, parts, device) if args.resume else []
    learner: Any = DistributedDataParallel(model) if processes() > 1 else model
    if args.compile:
        torch._dynamo.config.recompile_limit += args.ramp_epochs  # one more for every new ratio
        learner = torch.compile(learner)
    log = logger(args) if rank() == 0 else None
    precision = autocast(args.amp, device)
    mix = Mixup(args.mixup, args.cutmix, label_smoothing=args.smoothing, num_classes=classes)

    def update(loss: Tensor) -> None:
        optimizer.zero_grad()
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        if average is not None:
            average.update(model)

    for epoch in range(len(history), args.epochs):
        # Depends only on the epoch, so that a resumed run draws the same numbers.
        random_seed(args.seed + processes() * epoch, rank())
        if hasattr(training.sampler, "set_epoch"):
            training.sampler.set_epoch(epoch)
        for each in (*schedules, rates):
            each.step(epoch)
        begin = perf_counter()
        loss = one_epoch(learner, training, mix, precision, update, f"epoch {epoch}")
        speed = len(training) * args.batch * processes() / (perf_counter() - begin)
        row = {"epoch": epoch, "share": float(schedules[0].share(epoch)) if schedules else 0.0}
        row |= {"loss": loss, "images_per_second": speed, "lr": optimizer.param_groups[0]["lr"]}
        row["top1"] = accuracy(model, validation, device, precision)
        if average is not None:
            row["average_top1"] = accuracy(average.module, validation, device, precision)
        history.append(row)
        if log is not None:
            log(history)
            save({"history": history} | {k: p.state_dict() for k, p in parts.items()}, checkpoint)
    if rank() == 0 and args.plan:
        sv.save(model, args.out / "model.safetensors")


def optimizer_of(args: argparse.Namespace, model: nn.Module) -> tuple[Any, Any]:
    """timm's optimizer, and its schedule of learning rates."""
    rate = args.lr or 5e-4 * args.batch * processes() / 512
    optimizer = create_optimizer_v2(model, args.opt, rate, args.weight_decay)
    rates, _ = create_scheduler_v2(
        optimizer,
        num_epochs=args.epochs,
        min_lr=1e-5,
        warmup_lr=1e-6,
        warmup_epochs=args.lr_warmup_epochs,
    )
    return optimizer, rates


def resumed(
    checkpoint: Path, parts: dict[str, Any], device: torch.device
) -> list[dict[str, float]]:
    """The history of an interrupted run, with everything set to where it was."""
    state = torch.load(checkpoint, map_location=device, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    history: list[dict[str, float]] = state["history"]
    return history


def build(args: argparse.Namespace, classes: int) -> nn.Module:
    """The model, rewritten if there is a plan."""
    options = {"drop_path_rate": args.drop_path} | args.model_kwargs
    model = timm.create_model(args.model, num_classes=classes, **options)
    if not args.plan:
        return model
    try:
        return sv.rewrite(
            model,
            args.plan,
            example_inputs=torch.zeros(2, *data_config(args)["input_size"]),
            multiple_of=args.multiple_of,
            train_only=args.train_only,
        )
    except sv.SkipViTError as error:
        sys.exit(str(error))


def one_epoch(
    learner: nn.Module,
    batches: Any,
    mix: Mixup,
    precision: Callable[[], AbstractContextManager[Any]],
    update: Callable[[Tensor], None],
    title: str,
) -> float:
    """Train for one epoch; returns the mean loss of this process."""
    learner.train()
    criterion = SoftTargetCrossEntropy()
    total = 0.0
    for images, labels in track(batches, title, transient=True, disable=rank() != 0):
        x, y = mix(images, labels)
        with precision():
            loss = criterion(learner(x), y)
        update(loss)
        total += loss.item()
    return total / len(batches)


@torch.no_grad()
def accuracy(
    model: nn.Module,
    batches: Any,
    device: torch.device,
    precision: Callable[[], AbstractContextManager[Any]],
) -> float:
    """The share of images classified correctly, over all processes."""
    was_training = model.training
    model.eval()
    counts = torch.zeros(2, device=device)
    for images, labels in batches:
        with precision():
            guesses = model(images).argmax(1)
        counts += torch.stack([(guesses == labels).sum(), torch.tensor(len(labels), device=device)])
    model.train(was_training)
    if distributed.is_initialized():
        distributed.all_reduce(counts)
    return float(counts[0] / counts[1])


def autocast(amp: str, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """The context in which to run a forward pass."""
    if amp == "float32":
        return nullcontext
    return lambda: torch.autocast(device.type, dtype=getattr(torch, amp))


# -- data -------------------------------------------------------------------------------------------------------------


def loaders(args: argparse.Namespace, device: torch.device) -> tuple[Any, Any, int]:
    """Training and validation batches, and the number of classes."""
    for split in ("train", "val"):
        if not (args.data / split).is_dir():
            sys.exit(f"{args.data} has no folder {split!r} with a folder of images for each class")
    config = data_config(args)
    common = {
        "input_size": config["input_size"],
        "mean": config["mean"],
        "std": config["std"],
        "batch_size": args.batch,
        "num_workers": args.workers,
        "persistent_workers": False,  # persistent workers would draw other numbers after a resume
        "distributed": processes() > 1,
        "device": device,
    }
    training_set = create_dataset("", args.data / "train", is_training=True)
    training = create_loader(
        training_set,
        is_training=True,
        auto_augment=args.augment or None,
        re_prob=args.erase,
        re_mode="pixel",
        interpolation="random",
        **common,
    )
    validation_set = create_dataset("", args.data / "val")
    validation = create_loader(
        validation_set,
        interpolation=config["interpolation"],
        crop_pct=config["crop_pct"],
        **common,
    )
    if len(training) == 0:
        sys.exit(f"{len(training_set)} training images do not fill one --batch {args.batch}")
    return training, validation, len(training_set.reader.class_to_idx)


def data_config(args: argparse.Namespace) -> dict[str, Any]:
    """Image size, mean and the like from timm's configuration of the model; a size among its options wins."""
    known = timm.get_pretrained_cfg(args.model)
    config: dict[str, Any] = resolve_data_config(
        args.model_kwargs, pretrained_cfg=known.to_dict() if known else {}
    )
    return config


def make_synthetic(folder: Path, classes: int = 4, size: int = 40) -> None:
    """Stripes in a different direction for each class, 16 images for training and 8 for validation."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    for split, count in (("train", 16), ("val", 8)):
        for label in range(classes):
            place = folder / split / f"class_{label}"
            place.mkdir(parents=True, exist_ok=True)
            angle = torch.tensor(torch.pi * label / classes)
            for i in range(count):
                shift = 6 * torch.rand(1, generator=generator)
                wave = torch.sin(rows * angle.cos() + columns * angle.sin() + shift)
                noise = torch.rand(size, size, 3, generator=generator)
                pixels = ((wave[..., None] + 1) * 0.4 + noise * 0.2) * 255
                Image.fromarray(pixels.byte().numpy()).save(place / f"{i}.png")
    print(f"wrote {classes} classes to {folder}")


# -- what is kept -----------------------------------------------------------------------------------------------------


def save(state: dict[str, Any], path: Path) -> None:
    """Write beside ``path`` and rename: whenever the process dies, there is a complete checkpoint."""
    unfinished = path.with_suffix(".part")
    with unfinished.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def logger(args: argparse.Namespace) -> Callable[[list[dict[str, float]]], None]:
    """Rewrites log.csv after every epoch, prints its last line, and logs to TensorBoard if asked to."""
    board: Any = None
    if args.tensorboard:
        try:
            board = importlib.import_module("torch.utils.tensorboard").SummaryWriter(args.out)
        except ImportError as error:
            sys.exit(f"--tensorboard needs the package: pip install tensorboard ({error})")

    def log(history: list[dict[str, float]]) -> None:
        *_, last = history
        with (args.out / "log.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(last))
            writer.writeheader()
            writer.writerows(history)
        print("  ".join(f"{name} {value:.4g}" for name, value in last.items()), flush=True)
        if board is not None:
            for name, value in last.items():
                board.add_scalar(name, value, int(last["epoch"]))
            board.flush()

    return log


if __name__ == "__main__":
    main()
