"""Hugging Face's own ways to call, train and keep a model, on a rewritten one."""

from __future__ import annotations

import pickle
from typing import Any

import torch
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

import skipvit_fx
from models import scramble

PLAN = "2(50%)+4"
LABELS = torch.tensor([0, 3])


def pixels(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def classifier() -> Any:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        num_labels=5,
    )
    return scramble(ViTForImageClassification(config)).eval()


def rewritten() -> Any:
    return skipvit_fx.rewrite(classifier(), PLAN, example_inputs={"pixel_values": pixels()})


def step(fast: Any) -> tuple[Tensor, dict[str, Tensor], int]:
    """Loss and gradients of a training step, and how often a linear layer ran in it."""
    ran: list[int] = []
    fc1 = fast.get_submodule("vit.layers.1.mlp.fc1")
    hook = fc1.register_forward_hook(lambda *_: ran.append(1))
    fast.train()(
        pixel_values=pixels(), labels=LABELS
    )  # makes the graph for it, where there is none
    fast.zero_grad()
    ran.clear()
    loss = fast(pixel_values=pixels(), labels=LABELS).loss
    loss.backward()
    hook.remove()
    gradients = {n: p.grad.clone() for n, p in fast.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, len(ran)


def test_gradient_checkpointing_switched_on_and_off() -> None:
    fast = rewritten()
    plain = step(fast)
    assert plain[2] == 1
    fast.activation_checkpointing_enable()
    assert fast.is_activation_checkpointing
    for reloaded in (fast, pickle.loads(pickle.dumps(fast))):
        loss, gradients, ran = step(reloaded)
        assert ran == 2  # once more for the gradients
        torch.testing.assert_close(loss, plain[0])
        torch.testing.assert_close(gradients, plain[1])
    with torch.no_grad():
        assert torch.equal(fast(pixel_values=pixels()).logits, fast.eval()(pixels()).logits)
    fast.activation_checkpointing_disable()
    assert step(fast)[2] == 1
