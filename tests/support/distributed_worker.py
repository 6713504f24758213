"""What every process of test_distributed.py runs under torchrun: ``python distributed_worker.py FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from timm.models import VisionTransformer
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import skipvit_fx as sv
from support.models import scramble

PLAN = "1(30%)+2;2,3(30%,20%)+4+merged"
BATCH = 4


def build() -> Any:
    size: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4}
    model = scramble(VisionTransformer(**size, num_heads=2, num_classes=5))
    return sv.rewrite(model, PLAN, example_inputs=torch.zeros(2, 3, 32, 32)).train()


def data() -> tuple[Tensor, Tensor]:
    images = torch.randn(BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return images, torch.arange(BATCH)


def step(model: nn.Module, parameters: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """One step of training; returns the gradients that it was made with, by name."""
    optimizer = torch.optim.SGD(parameters.parameters(), lr=0.1)
    F.cross_entropy(model(x), y).backward()
    named = parameters.named_parameters()
    gradients = {name: whole(p.grad).clone() for name, p in named if p.grad is not None}
    optimizer.step()
    return gradients


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def sharded_alone(fast: Any) -> list[nn.Module]:
    """Every linear layer: what fully_shard may wrap besides the whole."""
    return [module for module in fast.modules() if isinstance(module, nn.Linear)]


def main(folder: Path) -> None:
    distributed.init_process_group("gloo")
    rank, count = distributed.get_rank(), distributed.get_world_size()
    x, y = data()
    mine = slice(rank * BATCH // count, (rank + 1) * BATCH // count)
    results: dict[str, Any] = {}

    fast = build()
    schedule = sv.SkipSchedule(fast, 1)
    parallel = DistributedDataParallel(fast)
    results["warm-up"] = step(parallel, fast, x[mine], y[mine])
    fast = build()
    schedule = sv.SkipSchedule(parallel := DistributedDataParallel(fast), 1)
    schedule.step(1)
    results["ddp"] = step(parallel, fast, x[mine], y[mine])

    for name in ("root", "linear"):
        fast = build()
        if name == "linear":
            for module in sharded_alone(fast):
                fully_shard(module)
        fully_shard(fast)
        results[name] = step(fast, fast, x[mine], y[mine])
        results[f"{name} weights"] = {n: whole(p) for n, p in fast.named_parameters()}
        assert all(isinstance(p, DTensor) for p in fast.parameters())
    if rank == 0:
        torch.save(results, folder / "results.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
