"""Multiply-adds against arithmetic on paper."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import VisionTransformer

import skipvit_fx
from skipvit_fx.errors import TraceError
from skipvit_fx.ops.switch import Switchable
from skipvit_fx.reports.macs import count_macs
from support.checks import fast_vit_small
from support.models import BY_NAME
from support.once import made_once

WIDTH, HEADS, DEPTH, PATCHES = 384, 6, 12, 196


def block(keys: int, queries: int, rows: int) -> int:
    """One layer of ViT-S: projections, two attention products, output projection, FFN."""
    return (
        3 * keys * WIDTH**2 + 2 * queries * keys * WIDTH + queries * WIDTH**2 + 8 * rows * WIDTH**2
    )


def vit_small(*blocks: int) -> int:
    embedding = PATCHES * WIDTH * 3 * 16 * 16
    return embedding + sum(blocks) + WIDTH * 1000


FULL = block(197, 197, 197)
LAST = block(197, 1, 1)
SCORE = 197 * WIDTH
SKIPPED = [block(197, 197, 90) + SCORE, *[block(90, 90, 90)] * 4]


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    return timm.create_model("vit_small_patch16_224").eval()


def images(batch: int = 2) -> torch.Tensor:
    return torch.empty(batch, 3, 224, 224, device="meta")


def test_the_model_alone(vit: nn.Module) -> None:
    total = count_macs(vit, (images(),)).total
    assert total == vit_small(*[FULL] * DEPTH)
    assert round(total / 1e9, 4) == 4.5989


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plan", "eliminate", "wanted", "giga"),
    [
        ("6(55%)+11", False, vit_small(*[FULL] * 5, *SKIPPED, FULL, FULL), 3.621),
        ("6(55%)+11", True, vit_small(*[FULL] * 5, *SKIPPED, FULL, LAST), 3.331),
        ("", True, vit_small(*[FULL] * 11, LAST), 4.309),
        ("", False, vit_small(*[FULL] * 12), 4.599),
    ],
)
def test_rewritten(vit: nn.Module, plan: str, eliminate: bool, wanted: int, giga: float) -> None:
    fast = skipvit_fx.rewrite(vit, plan, eliminate_dead_tokens=eliminate)
    on = count_macs(fast, (images(),))
    assert on.total == sum(on.nodes.values()) == wanted
    assert round(on.total / 1e9, 3) == giga
    assert count_macs(fast, (images(),), skipping=False).total == vit_small(*[FULL] * DEPTH)
    assert list(on.nodes) == [node.name for node in fast.graph.nodes]


@pytest.mark.slow
def test_one_node_at_a_time() -> None:
    count = count_macs(fast_vit_small(), (images(),))
    assert count.nodes["blocks_5_attn_qkv"] == 3 * 197 * WIDTH**2
    assert count.nodes["blocks_6_attn_qkv"] == 3 * 90 * WIDTH**2
    assert count.nodes["scaled_dot_product_attention_5"] == 2 * 197**2 * WIDTH
    assert count.nodes["scaled_dot_product_attention_6"] == 2 * 90**2 * WIDTH
    assert count.nodes["stage_1_scores"] == SCORE
    assert count.nodes["stage_1_returned"] == 0
    assert count.shapes["blocks_6_mlp"] == (1, 90, WIDTH)


@pytest.mark.parametrize("batch", [1, 3])
def test_batches_count_as_one_image(vit: nn.Module, batch: int) -> None:
    assert count_macs(vit, (images(batch),)).total == vit_small(*[FULL] * DEPTH)


class Attention(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if self.fused:
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])
        return (q @ k.transpose(-2, -1)).softmax(-1) @ v


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_attention_products_count(fused: bool, dtype: torch.dtype) -> None:
    q, k, v = (torch.empty(2, 4, n, 8, dtype=dtype) for n in (5, 7, 7))
    assert count_macs(Attention(fused), (q, k, v)).total == 2 * 4 * 5 * 7 * 8


def test_shared_key_heads_count_for_every_query_head() -> None:
    q, k, v = (torch.empty(2, heads, 5, 8) for heads in (4, 2, 2))
    assert count_macs(Attention(True), (q, k, v)).total == 2 * 4 * 5 * 5 * 8


@pytest.mark.parametrize("training", [False, True])
def test_attention_inside_multihead_attention_counts(training: bool) -> None:
    model = VisionTransformer(64, 16, 2, 4, 64, 128, num_classes=10).train(training)
    before = torch.backends.mha.get_fastpath_enabled()
    n, c = 17, 64
    layer = 4 * n * c * c + 2 * n * n * c + 2 * n * c * 128
    wanted = 16 * c * 3 * 16 * 16 + 2 * layer + c * 10
    assert count_macs(model, (torch.empty(2, 3, 64, 64),)).total == wanted
    assert torch.backends.mha.get_fastpath_enabled() is before


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("enabled", [False, True])
def test_nothing_is_changed(training: bool, enabled: bool) -> None:
    """Switch, mode, statistics, random state and tensors stay as they are; also on failure."""
    family = BY_NAME["vit"]
    model, example = family.build(rate=0.1, depth=2), family.input()
    embed = model.patch_embed
    embed.proj = nn.Sequential(embed.proj, nn.BatchNorm2d(embed.proj.out_channels))
    fast = skipvit_fx.rewrite(model, "1(50%)+2", example_inputs=example)
    fast.train(training)
    skipvit_fx.set_skipping(fast, enabled)
    state = copy.deepcopy(fast.state_dict())
    random = torch.get_rng_state()
    for skipping in (None, True, False):
        count_macs(fast, (family.input(),), skipping=skipping)
    with pytest.raises(TraceError, match="cannot be counted"):
        count_macs(fast, (torch.empty(2, 5, 7, 7),), skipping=not enabled)
    assert all(m.training is training for m in fast.modules())
    assert {m.enabled for m in fast.modules() if isinstance(m, Switchable)} == {enabled}
    assert torch.equal(torch.get_rng_state(), random)
    for key, value in fast.state_dict().items():
        assert torch.equal(value, state[key]), key
        assert type(value) is torch.Tensor


@made_once
def small() -> Any:
    """Two layers, with dropout."""
    family = BY_NAME["vit"]
    model, example = family.build(rate=0.1, depth=2), family.input()
    return skipvit_fx.rewrite(model, "1(50%)+2", example_inputs=example)


@pytest.mark.slow
def test_train_mode_counts_the_same() -> None:
    fast, x = small(), (BY_NAME["vit"].input(),)
    assert count_macs(fast.train(), x) == count_macs(fast.eval(), x)


def test_patches_dropped_in_training_count() -> None:
    model = BY_NAME["vit"].build(patch_drop_rate=0.5)
    x = (BY_NAME["vit"].input(),)
    assert count_macs(model.train(), x) == count_macs(model.eval(), x)


def test_after_a_change_of_dtype() -> None:
    fast, x = small(), (BY_NAME["vit"].input(),)
    wanted = count_macs(fast, x).total
    assert count_macs(fast.bfloat16(), x).total == wanted


def test_by_name() -> None:
    family = BY_NAME["vit"]
    fast = skipvit_fx.rewrite(
        family.build(depth=2), "1(50%)+2", example_inputs={"x": family.input()}
    )
    assert (
        count_macs(fast, (), {"x": family.input()}).total
        == count_macs(fast, (family.input(),)).total
    )


def test_a_score_that_reads_data_is_named() -> None:
    family = BY_NAME["vit"]
    model, x = family.build(depth=2), family.input()
    fast = skipvit_fx.rewrite(model, "1(50%)+2", example_inputs=x, score=lambda t: t.sum(-1))
    assert count_macs(fast, (x,)).total > 0
    fast.get_submodule("skipvit.stage_1.score").function = lambda t: t[..., 0] * t.sum().item()
    with pytest.raises(TraceError, match="without computing") as caught:
        count_macs(fast, (x,))
    assert "score function" in caught.value.hint
