"""Run a rewritten ViT on an Ascend NPU if torch-npu is available, else on the CPU.

    python examples/infer_npu.py --model vit_small_patch16_224 --plan "6(55%)+11" --batch 16

Weights are random: the time does not depend on them. The authors of this file have not run it on an NPU.
"""

from __future__ import annotations

import argparse
import time
from contextlib import AbstractContextManager, nullcontext

import timm
import torch
from torch import Tensor, nn

import skipvit_fx
from skipvit_fx.ascend.npu import find_device, npu_operators, synchronise


def images_per_second(model: nn.Module, x: Tensor, seconds: float, half: bool) -> float:
    """Throughput over about this many seconds, after a warm-up."""
    precision: AbstractContextManager[object] = nullcontext()
    if half:
        precision = torch.autocast(x.device.type, dtype=torch.float16)
    with torch.no_grad(), precision:
        for _ in range(3):
            model(x)
        synchronise(x)
        start, batches = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            model(x)
            synchronise(x)
            batches += 1
        return batches * x.shape[0] / (time.perf_counter() - start)


def main() -> None:
    """Compare the original and the rewritten model on one device."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--plan", default="6(55%)+11")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=5.0)
    options = parser.parse_args()

    device = find_device()
    torch.manual_seed(0)
    model = timm.create_model(options.model).eval()
    fast = skipvit_fx.rewrite(model, options.plan)
    size = timm.data.resolve_model_data_config(model)["input_size"]
    x = torch.randn(options.batch, *size)

    bad = [operator.name for operator in npu_operators(fast, x[:1]) if operator.known_bad]
    print(f"operators known to leave an NPU or to stop the host: {', '.join(bad) or 'none'}")
    if device.type == "cpu":
        print("no NPU can be used here, so this runs on the CPU; `skipvit doctor` shows why")
    half = device.type == "npu"  # its attention is fused only in half precision
    x = x.to(device)
    speeds = [images_per_second(one.to(device), x, options.seconds, half) for one in (model, fast)]
    print(f"{device}, batch {options.batch}: original {speeds[0]:.1f} images/s")
    print(f"{device}, batch {options.batch}: {options.plan} {speeds[1]:.1f} images/s")
    print(f"speed-up {speeds[1] / speeds[0]:.2f}")


if __name__ == "__main__":
    main()
