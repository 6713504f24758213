"""Both of torch's own ONNX exporters take a rewritten model, and onnxruntime computes what it does."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import skipvit_fx as sv
from skipvit_fx.ops.select import Select
from support.rewrites import assert_close, rewritten

pytestmark = [
    pytest.mark.filterwarnings("ignore:You are using the legacy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The feature will be removed:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]
DYNAMO = [True, False]


def export(module: nn.Module, x: Tensor, path: Path, dynamo: bool, **options: Any) -> None:
    if dynamo:
        options["verbose"] = False
    torch.onnx.export(module, (x,), path, dynamo=dynamo, **options)


def run(path: Path, x: Tensor) -> list[Tensor]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    return [torch.from_numpy(value) for value in session.run(None, {given.name: x.numpy()})]


@pytest.mark.parametrize(
    ("case", "dynamo"), [("vit", True), ("torchvision", False), ("fused", False), ("tied", False)]
)
@pytest.mark.client("torch.onnx.export", "both exporters, any batch size")
def test_a_file_for_any_batch(case: str, dynamo: bool, tmp_path: Path) -> None:
    _, fast, x, output = rewritten(case)
    path = tmp_path / "fast.onnx"
    free: dict[str, Any] = {"dynamic_shapes": ({0: torch.export.Dim("batch")},)}
    if (
        not dynamo
    ):  # which takes a module that has a graph for one of its own, unless all names are given
        free = {"input_names": ["x"], "output_names": ["y"], "dynamic_axes": {"x": {0: "batch"}}}
    export(fast, x, path, dynamo, **free)
    (more,) = run(path, torch.cat([x, x.flip(0)]))
    assert_close(more, torch.cat([output, output.flip(0)]))
    (one,) = run(path, x[:1])
    assert_close(one, output[:1])


class Chosen(nn.Module):
    """What a selection keeps and drops, as outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.select = Select(Fraction(55, 100))

    def forward(self, scores: Tensor) -> Any:
        return self.select(scores)


@pytest.mark.parametrize("dynamo", DYNAMO)
@pytest.mark.client("torch.onnx.export", "the same patches are kept")
def test_the_same_patches_are_kept(dynamo: bool, tmp_path: Path) -> None:
    """Also of equal scores, whatever the runtime does with these."""
    scores = torch.randint(0, 4, (8, 50), generator=torch.Generator().manual_seed(0)).float()
    export(Chosen().eval(), scores, tmp_path / "select.onnx", dynamo)
    for got, wanted in zip(run(tmp_path / "select.onnx", scores), Chosen()(scores), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.client("torch.onnx.export", "patches of equal score")
def test_tied_patches_stay_from_the_front() -> None:
    """What the file above was compared with."""
    _, fast, x, _ = rewritten("tied")
    (stage,) = sv.trace_tokens(fast, x)
    assert torch.equal(stage.kept, torch.arange(stage.kept.shape[1]).expand_as(stage.kept))
