"""A rewritten model is used like the model: state, modes, devices, copies, gradients, compilation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, fx, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import skipvit_fx
from support.models import scramble
from support.once import made_once


def small_vit(**options: Any) -> nn.Module:
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=64,
        embed_dim=48,
        depth=3,
        num_heads=3,
        num_classes=10,
        **options,
    )
    scramble(model)
    return model.eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def rewritten(model: nn.Module, plan: str = "1(50%)+3", **options: Any) -> Any:
    return skipvit_fx.rewrite(model, plan, example_inputs=(torch.zeros(2, 3, 64, 64),), **options)


@made_once
def pair() -> tuple[Any, Any]:
    """A model and its rewrite."""
    model = small_vit()
    return model, rewritten(model)


def test_state_is_the_models_own() -> None:
    model, fast = pair()
    assert list(fast.state_dict()) == list(model.state_dict())
    assert [n for n, _ in fast.named_parameters()] == [n for n, _ in model.named_parameters()]
    for (_, ours), (_, theirs) in zip(
        fast.named_parameters(), model.named_parameters(), strict=True
    ):
        assert ours is theirs
    model.load_state_dict(fast.state_dict(), strict=True)
    fast.load_state_dict(model.state_dict(), strict=True)


def test_the_model_keeps_its_modes_and_attributes(images: Tensor) -> None:
    model = small_vit()
    before = {name: module.training for name, module in model.named_modules()}
    keys = {name: sorted(vars(module)) for name, module in model.named_modules()}
    with torch.no_grad():
        wanted = model(images)
        fast = rewritten(model)
        fast.train()(images)
        skipvit_fx.set_skipping(fast, False)
        assert torch.equal(model(images), wanted)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert {name: sorted(vars(module)) for name, module in model.named_modules()} == keys
    assert fast.training
    assert fast.num_classes == model.num_classes


def test_a_model_in_train_mode_is_rewritten_in_train_mode() -> None:
    fast = rewritten(small_vit().train())
    assert all(module.training for module in fast.modules())


def test_dropout_follows_the_mode_of_its_own_module(images: Tensor) -> None:
    fast = rewritten(small_vit(attn_drop_rate=0.5), "1(0%)+3").train()
    with torch.no_grad():
        assert not torch.equal(fast(images), fast(images))
        fast.blocks.eval()
        assert torch.equal(fast(images), fast(images))


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_any_batch_size(batch: int, images: Tensor) -> None:
    _, fast = pair()
    with torch.no_grad():
        together = fast(images.repeat(2, 1, 1, 1)[:batch])
        alone = torch.cat([fast(image[None]) for image in images.repeat(2, 1, 1, 1)[:batch]])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_a_deep_copy_is_its_own(images: Tensor) -> None:
    _, fast = pair()
    twin = copy.deepcopy(fast)
    assert list(twin.state_dict()) == list(fast.state_dict())
    assert twin.meta["skipvit"].layers == fast.meta["skipvit"].layers
    with torch.no_grad():
        wanted = fast(images)
        assert torch.equal(twin(images), wanted)
        for parameter in twin.parameters():
            parameter.zero_()
        skipvit_fx.set_skipping(twin, False)
        assert torch.equal(fast(images), wanted)


def _swap_query_and_key(graph: fx.Graph) -> None:
    node = next(n for n in graph.nodes if n.target is F.scaled_dot_product_attention)
    query, key, *others = node.args
    node.args = (key, query, *others)


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("replaced", [False, True])
def test_an_edit_of_the_graph_is_what_runs(copied: bool, replaced: bool, images: Tensor) -> None:
    """As in any graph module: edited in place and compiled again, or assigned."""
    _, fast = pair()
    edited = copy.deepcopy(fast) if copied else fast
    with torch.no_grad():
        before = fast(images)
        if replaced:
            graph = copy.deepcopy(edited.graph)
            _swap_query_and_key(graph)
            edited.graph = graph
        else:
            _swap_query_and_key(edited.graph)
            edited.recompile()
        assert not torch.allclose(edited(images), before)
        assert torch.equal(edited.graph_forward(images), edited(images))
        assert torch.equal(copy.deepcopy(edited)(images), edited(images))
        if copied:
            assert torch.equal(fast(images), before)


@pytest.mark.slow
def test_dtypes(images: Tensor) -> None:
    _, fast = pair()
    with torch.no_grad():
        wanted = fast(images)
        assert fast.double()(images.double()).dtype == torch.float64
        torch.testing.assert_close(fast(images.double()), wanted.double(), rtol=1e-4, atol=1e-5)
        assert fast.bfloat16()(images.bfloat16()).isfinite().all()


def test_meta_device() -> None:
    fast = pair()[1].to("meta")
    assert fast(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 10)


def test_autocast(images: Tensor) -> None:
    model, skipping = pair()
    fast = rewritten(model, "1(0%)+3")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fast(images), model(images))
        assert skipping(images).isfinite().all()


def test_every_parameter_that_learns_in_the_model_learns_here(images: Tensor) -> None:
    model, fast = pair()
    model(images).square().sum().backward()
    wanted = {name for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    fast(images).square().sum().backward()
    assert {n for n, p in fast.named_parameters() if p.grad is not None} == wanted
    assert all(p.grad.isfinite().all() for p in fast.parameters() if p.grad is not None)


def test_checkpointing_by_the_caller(images: Tensor) -> None:
    _, fast = pair()
    fast(images).square().sum().backward()
    wanted = {name: p.grad.clone() for name, p in fast.named_parameters() if p.grad is not None}
    fast.zero_grad(set_to_none=True)
    checkpoint(fast, images.clone().requires_grad_(), use_reentrant=False).square().sum().backward()
    for name, parameter in fast.named_parameters():
        if name in wanted:
            torch.testing.assert_close(parameter.grad, wanted[name])


@pytest.mark.parametrize("plan", ["1(50%)+3", "1,3(30%,30%)+4", "1(50%)+fused", "1(50%)"])
def test_compiles_to_one_graph(plan: str, images: Tensor) -> None:
    fast = rewritten(small_vit(), plan)
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), fast(images), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiled_training_step_and_switch(images: Tensor) -> None:
    """One compilation per setting, none per batch, gradients as without compilation."""
    fast = pair()[1].train()
    fast(images).square().sum().backward()
    wanted = {name: p.grad.clone() for name, p in fast.named_parameters() if p.grad is not None}
    fast.zero_grad(set_to_none=True)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fast, fullgraph=True, backend=counter)
    compiled(images).square().sum().backward()
    for name, gradient in wanted.items():
        torch.testing.assert_close(fast.get_parameter(name).grad, gradient, rtol=1e-3, atol=1e-4)
    compiled(images + 1)
    assert counter.frame_count == 1
    skipvit_fx.set_skipping(fast, False)
    compiled(images)
    compiled(images + 1)
    assert counter.frame_count == 2


def test_keyword_input(images: Tensor) -> None:
    _, fast = pair()
    with torch.no_grad():
        assert torch.equal(fast(x=images), fast(images))


def test_another_rewrite_of_the_same_model_is_independent(images: Tensor) -> None:
    model, one = pair()
    two = rewritten(model, "2(30%)+4")
    with torch.no_grad():
        wanted = one(images)
        skipvit_fx.set_skipping(two, False)
        assert torch.equal(one(images), wanted)
        assert torch.equal(two(images), model(images))


def test_a_rewrite_in_inference_mode_can_be_trained(images: Tensor) -> None:
    model = small_vit()
    with torch.inference_mode():
        fast = rewritten(model)
    fast(images).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with torch.no_grad():
        assert torch.equal(fast(images), pair()[1](images))
