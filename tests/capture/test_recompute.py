"""Activation checkpoints of the author's: the rewritten model recomputes what the model recomputes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import skipvit_fx as sv
from support.checks import rewrite
from support.models import scramble
from support.odd_models import Block, Odd, image

PLAN = "2(40%)+4"


class Recomputing(Odd):
    """Recomputes its layers one by one, or two and two."""

    reentrant = False
    together = 1
    recompute = True

    def layers(self, x: Tensor) -> Tensor:
        for i in range(0, len(self.blocks), self.together):
            run = nn.Sequential(*self.blocks[i : i + self.together])
            if self.recompute and self.training:
                x = checkpoint(run.forward, x, use_reentrant=self.reentrant)
            else:
                x = run.forward(x)
        return x


def by_hand(depth: int = 3, **options: Any) -> nn.Module:
    model = scramble(type("Made", (Recomputing,), options)([Block() for _ in range(depth)]))
    return model.train()


def by_timm() -> nn.Module:
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=(32, 40),
        patch_size=8,
        embed_dim=48,
        depth=3,
        num_heads=3,
        num_classes=10,
        proj_drop_rate=0.1,
        drop_path_rate=0.1,
    )
    model.set_grad_checkpointing(True)
    return scramble(model).train()


def without(model: nn.Module) -> nn.Module:
    """The same model, which keeps its activations."""
    plain: Any = copy.deepcopy(model)
    if isinstance(plain, Recomputing):
        plain.recompute = False
    else:
        plain.set_grad_checkpointing(False)
    return plain


def gradients(model: nn.Module) -> tuple[int, dict[str, Tensor]]:
    """Bytes saved for the backward pass, and the gradients of one step."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(0)
    model.zero_grad()
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(image()).square().sum()
    loss.backward()
    return sum(saved.values()), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


MODELS: list[Callable[[], nn.Module]] = [
    by_timm,
    by_hand,
    lambda: by_hand(4, together=2),
    lambda: by_hand(reentrant=True),
]


@pytest.mark.parametrize("build", MODELS, ids=["timm", "layers", "pairs", "reentrant"])
@pytest.mark.slow
def test_the_same_gradients_from_less_memory(build: Callable[[], nn.Module]) -> None:
    model = build()
    fast = rewrite(model, PLAN)
    memory, got = gradients(fast)
    more, wanted = gradients(rewrite(without(model), PLAN))
    assert list(got) == list(wanted)
    for name, gradient in wanted.items():
        assert torch.equal(got[name], gradient)
    assert memory < more / 2
    again, twice = gradients(copy.deepcopy(fast))
    assert again == memory
    assert all(torch.equal(twice[name], gradient) for name, gradient in wanted.items())


def test_a_drop_amid_a_checkpoint_is_recomputed_with_it() -> None:
    fast = rewrite(by_hand(4, together=2), PLAN)
    lines = fast.code.splitlines()
    (select,) = (i for i, line in enumerate(lines) if "stage_1.select(" in line)
    starts = [i for i, line in enumerate(lines) if "def recomputed_" in line]
    ends = [i for i, line in enumerate(lines) if "checkpoint(recomputed_" in line]
    assert len(starts) == len(ends) == 2
    assert starts[0] < select < ends[0]


@pytest.mark.slow
def test_evaluation_recomputes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = by_timm()
    fast = rewrite(model, PLAN).eval()
    wanted = rewrite(without(model), PLAN).eval()
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", None)
    with torch.no_grad():
        assert torch.equal(fast(image()), wanted(image()))


@pytest.mark.slow
def test_compiled_as_one_graph() -> None:
    fast = rewrite(by_hand(), PLAN)
    _, wanted = gradients(fast)
    torch._dynamo.reset()
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    _, got = gradients(compiled)
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[f"_orig_mod.{name}"], gradient)


@pytest.mark.slow
def test_an_exported_graph_says_that_it_keeps_activations() -> None:
    with pytest.warns(UserWarning, match="takes more memory in training"):
        fast = rewrite(by_hand(), PLAN, frontend="export")
    _, got = gradients(fast)
    _, wanted = gradients(rewrite(by_hand(), PLAN))
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-4)


def test_saving_in_another_way_is_refused() -> None:
    class Offloaded(Odd):
        def layers(self, x: Tensor) -> Tensor:
            with torch.autograd.graph.save_on_cpu():
                return super().layers(x)

    model = scramble(Offloaded([Block() for _ in range(3)]))
    with pytest.raises(sv.TraceError, match="saves tensors for its backward pass"):
        rewrite(model, PLAN)
