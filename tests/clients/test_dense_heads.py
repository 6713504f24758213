"""Depth, segmentation, pose and detection: heads that read several layers, rewritten whole or with their backbone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BeitConfig,
    BeitForSemanticSegmentation,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTConfig,
    DPTForDepthEstimation,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    VitPoseBackboneConfig,
    VitPoseConfig,
    VitPoseForPoseEstimation,
    YolosConfig,
    YolosForObjectDetection,
)

import skipvit_fx
from skipvit_fx.errors import UnsupportedModelError
from support.client_models import PLAN, SMALL, STAGES, pixels
from support.models import scramble
from support.outside import MIDDLES
from support.reference import Layout, Point, masked_reference

PAIR = {"image_size": [32, 32], "patch_size": [8, 8]}
EVERY_LAYER = {"out_indices": [1, 2, 3, 4]}
NECK: dict[str, Any] = {"neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8}


def dpt() -> Any:
    return DPTForDepthEstimation(
        DPTConfig(
            **SMALL, **NECK, backbone_out_indices=[0, 1, 2, 3], reassemble_factors=[4, 2, 1, 0.5]
        )
    )


def depth_anything() -> Any:
    backbone = Dinov2Config(**SMALL, **EVERY_LAYER, reshape_hidden_states=False)
    return DepthAnythingForDepthEstimation(
        DepthAnythingConfig(
            backbone_config=backbone, **NECK, reassemble_hidden_size=32, patch_size=8
        )
    )


def upernet() -> Any:
    backbone = Dinov2Config(**SMALL, **EVERY_LAYER)
    return UperNetForSemanticSegmentation(
        UperNetConfig(
            backbone_config=backbone, hidden_size=16, pool_scales=[1, 2], use_auxiliary_head=False
        )
    )


def beit() -> Any:
    return BeitForSemanticSegmentation(
        BeitConfig(**SMALL, **EVERY_LAYER, pool_scales=[1, 2], use_auxiliary_head=False)
    )


def vitpose() -> Any:
    backbone = VitPoseBackboneConfig(**{**SMALL, **PAIR}, out_indices=[4])
    return VitPoseForPoseEstimation(VitPoseConfig(backbone_config=backbone))


def yolos() -> Any:
    return YolosForObjectDetection(
        YolosConfig(**{**SMALL, "image_size": [32, 32]}, num_detection_tokens=5)
    )


MODELS: dict[Callable[[], Any], tuple[str, str, int, int]] = {
    dpt: ("predicted_depth", "dpt", 1, 0),
    depth_anything: ("predicted_depth", "backbone", 1, 0),
    upernet: ("logits", "backbone", 1, 0),
    beit: ("logits", "beit", 1, 0),
    vitpose: ("heatmaps", "backbone", 0, 0),
    yolos: ("logits", "vit", 1, 5),
}
"""What is read, where the backbone is, and its prefix and trailing tokens."""


def built(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return scramble(make()).eval()


def layout(model: nn.Module, prefix: int, suffix: int) -> Layout:
    (blocks,) = (
        list(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and name.rpartition(".")[2] in ("layer", "layers")
        and any(hasattr(module[0], middle) for middle in MIDDLES)
    )
    (name,) = (name for name in MIDDLES if hasattr(blocks[0], name))
    mid = [Point(getattr(block, name)) for block in blocks]
    taps = [Point(block, "output") for block in blocks]
    return Layout(blocks, mid, prefix, suffix, cls=0 if prefix else None, taps=taps)


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "backbone"])
@pytest.mark.parametrize("make", MODELS)
@pytest.mark.client(
    "dense heads", "{case}", caveat="features of layers under a drop: fill_taps=True"
)
@pytest.mark.slow
def test_a_dense_head(make: Callable[[], Any], whole: bool) -> None:
    output, backbone, prefix, suffix = MODELS[make]
    model = built(make)
    x = pixels()
    score = None if prefix else "mean"
    wanted = masked_reference(model, x, layout(model, prefix, suffix), score=score, **STAGES).output
    with torch.no_grad():
        plain = model(x)[output]
        options: Any = {"example_inputs": x, "fill_taps": True}
        if whole:
            fast = skipvit_fx.rewrite(model, PLAN, **options)
        else:
            fast = model
            setattr(fast, backbone, skipvit_fx.rewrite(getattr(model, backbone), PLAN, **options))
        got = fast(x)[output]
        assert (got - plain).abs().max() > 1e-3 * plain.abs().max()
        torch.testing.assert_close(got, wanted[output], rtol=1e-4, atol=1e-4)
        skipvit_fx.set_skipping(fast, False)
        assert torch.equal(fast(x)[output], plain)


@pytest.mark.slow
def test_features_under_a_drop_are_named() -> None:
    with pytest.raises(UnsupportedModelError, match="is under the drop at layer 2") as caught:
        skipvit_fx.rewrite(built(dpt), PLAN, example_inputs=pixels())
    assert "fill_taps=True" in caught.value.hint
