"""A model that cannot be rewritten as a whole: the refusal says which part can, and that part can."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

import skipvit_fx
from skipvit_fx import TraceError, UnsupportedModelError
from support.client_models import PLAN, SMALL, pixels, vit
from support.models import scramble

TOWER: dict[str, Any] = {**SMALL, "num_hidden_layers": 2}


class Mixing(nn.Module):
    """A head that mixes tokens which never return."""

    def __init__(self) -> None:
        super().__init__()
        self.body = vit(depth=3, num_classes=0, global_pool="")
        self.neck = nn.Conv1d(32, 32, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        out: Tensor = self.neck(self.body(image).transpose(1, 2))
        return out


class Deciding(Mixing):
    """A head whose way depends on what it sees."""

    def forward(self, image: Tensor) -> Tensor:
        x: Tensor = self.body(image)
        return x * 2 if x.mean() > 0 else x


def clip() -> nn.Module:
    text = {
        k: v
        for k, v in {**TOWER, "vocab_size": 99}.items()
        if k not in ("image_size", "patch_size")
    }
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return scramble(CLIPModel(CLIPConfig(text_config={**text, **special}, vision_config=TOWER)))


def named(parts: str, hint: str) -> str:
    """The part that a hint names last."""
    found = re.search(r"or rewrite (.*) alone and put it back: model\.(\S+) = ", hint)
    assert found is not None
    assert found[1] == parts
    return found[2]


@pytest.mark.parametrize(
    ("model", "plan", "error"),
    [(Mixing, "2(50%)", UnsupportedModelError), (Deciding, PLAN, TraceError)],
)
@pytest.mark.slow
def test_a_backbone(model: Any, plan: str, error: Any) -> None:
    whole = model().eval()
    with pytest.raises(error) as caught:
        skipvit_fx.rewrite(whole, plan, example_inputs=pixels())
    assert named("body", caught.value.hint) == "body"
    whole.body = skipvit_fx.rewrite(whole.body, PLAN, example_inputs=pixels())
    with torch.no_grad():
        whole(pixels())


@pytest.mark.slow
def test_one_of_two_towers() -> None:
    whole: Any = clip().eval()
    words = torch.ones(2, 8, dtype=torch.long)
    with pytest.raises(UnsupportedModelError) as caught:
        skipvit_fx.rewrite(
            whole, "2(50%)+3", example_inputs={"input_ids": words, "pixel_values": pixels()}
        )
    assert named("one of text_model, vision_model", caught.value.hint) == "vision_model"
    whole.vision_model = skipvit_fx.rewrite(
        whole.vision_model, "2(50%)+3", example_inputs={"pixel_values": pixels()}
    )
    with torch.no_grad():
        whole(input_ids=words, pixel_values=pixels())


def test_of_a_plain_model_no_part_is_named() -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        skipvit_fx.rewrite(
            vit(depth=2, class_token=False, global_pool="avg"), "2(50%)", score="cls"
        )
    assert "alone" not in caught.value.hint
