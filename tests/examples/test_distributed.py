"""Two processes compute what one does, and a run that is killed goes on as if nothing had happened."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import skipvit_fx as sv
from support.distributed_worker import build, data, step
from support.scripts import ROOT, load

WORKER = Path(__file__).parents[1] / "support" / "distributed_worker.py"
IMAGENET = "examples/train_imagenet.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("distributed")
    command = ["torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    done = subprocess.run(
        [sys.executable, "-m", *command, str(WORKER), str(folder)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, Tensor]] = torch.load(folder / "results.pt", weights_only=True)
    return found


@pytest.mark.parametrize(
    ("name", "on"), [("warm-up", False), ("ddp", True), ("root", True), ("linear", True)]
)
@pytest.mark.client(
    "torch.distributed", "DDP and FSDP2, of the whole and of every linear layer: gradients"
)
@pytest.mark.slow
def test_gradients_are_those_of_one_process(
    name: str, on: bool, results: dict[str, dict[str, Tensor]]
) -> None:
    fast = build()
    sv.set_skipping(fast, on)
    wanted = step(fast, fast, *data())
    assert list(results[name]) == list(wanted)
    for parameter, gradient in wanted.items():
        torch.testing.assert_close(results[name][parameter], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_skipping_changes_the_gradients(results: dict[str, dict[str, Tensor]]) -> None:
    apart = [
        (results["ddp"][name] - value).abs().max() for name, value in results["warm-up"].items()
    ]
    assert max(apart) > 1e-2


@pytest.mark.parametrize("name", ["root", "linear"])
@pytest.mark.client("torch.distributed", "FSDP2: weights after a step")
@pytest.mark.slow
def test_a_sharded_step_is_that_of_one_process(
    name: str, results: dict[str, dict[str, Tensor]]
) -> None:
    fast = build()
    step(fast, fast, *data())
    for parameter, value in fast.named_parameters():
        torch.testing.assert_close(
            results[f"{name} weights"][parameter], value.detach(), rtol=1e-4, atol=1e-5
        )


# -- a run that is killed -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return load(IMAGENET)


@pytest.fixture(scope="module")
def pictures(example: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    example.main(["--make-synthetic", str(folder)])
    return folder


def arguments(pictures: Path, out: Path) -> list[str]:
    sizes = ["img_size=32", "patch_size=8", "depth=4", "embed_dim=32", "num_heads=2"]
    options = "--epochs 5 --warmup-epochs 1 --ramp-epochs 2 --batch 8 --device cpu --workers 0"
    rates = "--lr 1e-3 --lr-warmup-epochs 1 --ema 0.9"
    plan = ["--plan", "2(50%)+4", "--multiple-of", "4", "--out", str(out)]
    return [str(pictures), *options.split(), *rates.split(), *plan, "--model-kwargs", *sizes]


def rows(out: Path) -> list[dict[str, str]]:
    file = out / "log.csv"
    return list(csv.DictReader(file.read_text().splitlines())) if file.exists() else []


# timm leaves it to the garbage collector to close the images that it read.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(
    example: ModuleType, pictures: Path, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    example.main(arguments(pictures, whole))
    run = subprocess.Popen(
        [sys.executable, str(ROOT / IMAGENET), *arguments(pictures, killed)],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while len(rows(killed)) < 2 and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    run.kill()
    assert run.wait() == -signal.SIGKILL
    before = len(rows(killed))
    assert 2 <= before < 5
    example.main([*arguments(pictures, killed), "--resume"])
    assert len(rows(killed)) == 5
    for one, other in zip(rows(whole), rows(killed), strict=True):
        assert {k: v for k, v in one.items() if k != "images_per_second"} == {
            k: v for k, v in other.items() if k != "images_per_second"
        }
    wanted, got = (torch.load(out / "last.pt", weights_only=True) for out in (whole, killed))
    for part in ("model", "average"):
        assert list(got[part]) == list(wanted[part])
        assert all(torch.equal(got[part][name], wanted[part][name]) for name in wanted[part])
    model = sv.load(killed / "model.safetensors", example_model())
    assert all(torch.equal(model.state_dict()[n], value) for n, value in got["model"].items())
    assert sv.inspect(model).layers[1].ffn_tokens == 12


def example_model() -> Any:
    sizes = {"img_size": 32, "patch_size": 8, "depth": 4, "embed_dim": 32, "num_heads": 2}
    return timm.create_model("vit_small_patch16_224", num_classes=4, drop_path_rate=0.1, **sizes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--resume"], "holds none: another --out"),
        (["--device", "npu"], "needs torch_npu and CANN"),
        (["--batch", "65"], "64 training images do not fill one --batch 65"),
        (["--plan", "9(50%)"], "layer 9 is out of range"),
    ],
)
def test_what_cannot_be_run_is_said(
    change: list[str], message: str, example: ModuleType, pictures: Path, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match=message):
        example.main([*arguments(pictures, tmp_path / "new"), *change])


def test_a_checkpoint_is_not_overwritten(
    example: ModuleType, pictures: Path, tmp_path: Path
) -> None:
    (tmp_path / "last.pt").touch()
    with pytest.raises(SystemExit, match="holds a checkpoint: --resume it, or choose another"):
        example.main(arguments(pictures, tmp_path))
    with pytest.raises(SystemExit, match="has no folder 'train'"):
        example.main(arguments(tmp_path, tmp_path / "new"))
