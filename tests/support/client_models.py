"""Small models for tests of other people's tools, scrambled, with their inputs."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

import skipvit_fx
from support.models import scramble
from support.once import made_once

PLAN = "2(50%)+4"
STAGES: Any = {"stages": [(2, "0.5")], "return_layer": 4}
LABELS = torch.tensor([0, 3])
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
"""Of an encoder of Hugging Face's."""


def pixels(batch: int = 2, size: int = 32) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def classifier(**options: Any) -> Any:
    """Hugging Face's."""
    torch.manual_seed(0)
    return scramble(
        ViTForImageClassification(ViTConfig(**{**SMALL, "num_labels": 5, **options}))
    ).eval()


def vit(**options: Any) -> Any:
    """timm's."""
    torch.manual_seed(0)
    small = {"img_size": 32, "patch_size": 8, "depth": 4, "embed_dim": 32, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", **{**small, "num_classes": 5, **options})
    return scramble(model).eval()


def rewritten(model: Any, **options: Any) -> Any:
    return skipvit_fx.rewrite(model, PLAN, example_inputs=pixels(), **options)


@made_once
def fast_vit(**options: Any) -> Any:
    """timm's, rewritten."""
    return rewritten(vit(**options))


@made_once
def fast_classifier(**options: Any) -> Any:
    """Hugging Face's, rewritten."""
    return rewritten(classifier(**options))
