"""What is computed on the shared graph is what each plan's own rewrite computes, and costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import skipvit_fx as sv
from skipvit_fx.capture.example import example_of
from skipvit_fx.errors import UnsupportedModelError
from skipvit_fx.options import Options
from skipvit_fx.planner import replay
from skipvit_fx.planner.costs import Costs
from skipvit_fx.planner.replay import Replay
from skipvit_fx.planner.shared_graph import SharedGraph, share_graph
from skipvit_fx.torch_internals import tensor_leaves
from support.models import BY_NAME
from support.tiny import Block, Tiny, lines

PLANS = ("", "1,3(30%,40%)+4+fused", "1-4(3)+merged", "1(20%)+2;3(40%)", "2(50%)+3;4(30%)+5")


def shared(model: nn.Module, example: Any, **options: Any) -> SharedGraph:
    return share_graph(model, *example_of(model, example), Options(sv.Plan(), **options))


def tiny_images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def assert_like_rewrites(
    model: nn.Module, example: Any, plans: tuple[str, ...], **options: Any
) -> None:
    """Outputs and multiply-adds are those of `rewrite`; a plan is refused if `rewrite` refuses it."""
    graph = shared(model, example, **options)
    args, kwargs = example_of(model, example)
    costs, runs = Costs(graph), Replay(graph)
    tried = 0
    with torch.no_grad():
        begun = runs.begin(args, kwargs, 1)
        before = lines(graph.graph)
        for text in plans:
            plan = sv.Plan.parse(text)
            try:
                fast = sv.rewrite(model, plan, example_inputs=example, validate=False, **options)
            except UnsupportedModelError:
                with pytest.raises(UnsupportedModelError), graph.rewritten(plan):
                    pass
                continue
            tried += 1
            with graph.rewritten(plan) as context:
                got = runs.run(begun, plan.stages[0].layer if plan.stages else graph.depth)
                macs = costs.macs(context)
            wanted = fast(*args, **kwargs)
            for ours, theirs in zip(tensor_leaves(got), tensor_leaves(wanted), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
            report = sv.inspect(fast)
            assert macs == report.macs, text
            assert costs.baseline == report.baseline_macs
    assert tried
    assert lines(graph.graph) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["vit", "vit-unfused", "dinov3", "eva", "beit", "relpos-bias", "deit-distilled", "reg4-gap"],
)
def test_like_the_rewrites_of_a_family(name: str) -> None:
    family = BY_NAME[name]
    assert_like_rewrites(family.build(), family.input(2), PLANS)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cait", "parallel-things", "siglip-map", "diff-attention"])
def test_like_the_rewrites_of_an_odd_family(name: str) -> None:
    family = BY_NAME[name]
    assert_like_rewrites(family.build(), family.input(2), PLANS)


@pytest.mark.slow
def test_like_the_rewrites_of_an_exported_model() -> None:
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, image_size=56, patch_size=14
    )
    torch.manual_seed(0)
    model = Dinov2Model(config).eval()
    images = {"pixel_values": torch.randn(2, 3, 56, 56)}
    assert_like_rewrites(model, images, PLANS)


def heard(tokens: Tensor, *, attention: Tensor, keys: Tensor) -> Tensor:
    return tokens.norm(dim=-1) + attention.mean(1) + keys.norm(dim=-1).mean(1)


@pytest.mark.parametrize(
    "options",
    [
        {"score": "received"},
        {"score": "keys"},
        {"score": "mean"},
        {"score": heard},
        {"cut": "block"},
        {"multiple_of": 8},
        {"eliminate_dead_tokens": False},
        {"proportional_attention": False},
    ],
    ids=lambda options: "-".join(options),
)
def test_like_the_rewrites_with_options(options: dict[str, Any]) -> None:
    plans = ("1,2(30%)+3+fused", "1(3)+2+merged;3(40%)")
    assert_like_rewrites(Tiny(sizes="read").eval(), tiny_images(), plans, **options)


@pytest.mark.slow
def test_like_the_rewrites_of_an_export() -> None:
    plans = ("1(50%)", "1,2(30%)+3+fused", "1-3(2)+merged", "3(40%)+4")
    assert_like_rewrites(Tiny().eval(), tiny_images(), plans, prefix_tokens=1, frontend="export")


def test_layer_0_is_a_place_for_a_score_that_needs_no_attention() -> None:
    assert shared(Tiny().eval(), tiny_images()).places["skip"] == (1, 2, 3)
    graph = shared(Tiny().eval(), tiny_images(), score="random")
    assert graph.places == {"skip": (0, 1, 2, 3), "fused": (0, 1, 2, 3), "merged": (1, 2, 3)}


class Mixes(Tiny):
    """Tokens are rolled inside the second block's MLP."""

    def __init__(self) -> None:
        super().__init__()

        class Roll(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x.roll(1, 1)

        self.blocks[1].mlp = nn.Sequential(self.blocks[1].mlp, Roll())


@pytest.mark.slow
def test_a_layer_that_mixes_tokens_is_no_place_and_others_are() -> None:
    graph = shared(Mixes().eval(), tiny_images())
    assert graph.places["skip"] == (1, 3)
    assert list(graph.refused) == [2]
    assert "roll" in graph.refused[2]
    assert_like_rewrites(Mixes().eval(), tiny_images(), ("1(50%)+2",))


def test_the_graph_is_restored_after_a_refusal() -> None:
    graph = shared(Mixes().eval(), tiny_images())
    before = lines(graph.graph)
    for plan in ("1(50%)+3", "9(50%)"):
        with pytest.raises((UnsupportedModelError, sv.PlanError)):
            graph.rewritten(sv.Plan.parse(plan)).__enter__()
        assert lines(graph.graph) == before
    inserted = graph.capture.module.get_submodule("skipvit").named_children()
    assert not any(list(group.children()) for _, group in inserted)


class AddsInPlace(Block):
    """Adds to the layer's input in place."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = self.q(h)[:, None], self.k(h)[:, None], self.v(h)[:, None]
        x = x.add_(F.scaled_dot_product_attention(q, k, v).squeeze(1))
        return x + self.mlp(self.norm2(x))


class InPlace(Tiny):
    """Every layer writes into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([AddsInPlace() for _ in range(3)])


def test_values_that_are_kept_are_not_written_into() -> None:
    model, x = InPlace().eval(), tiny_images()
    graph = shared(model, x)
    runs, plan = Replay(graph), sv.Plan.parse("3(50%)")
    with torch.no_grad():
        begun = runs.begin((x,), {}, 1)
        with graph.rewritten(plan):
            first, second = (runs.run(begun, 3) for _ in range(2))
        fast = sv.rewrite(model, plan, example_inputs=x, validate=False)
        torch.testing.assert_close(first, fast(x), rtol=0, atol=1e-5)
        assert torch.equal(first, second)


def test_layers_before_the_first_stage_are_not_computed_again() -> None:
    model, x = Tiny().eval(), tiny_images()
    graph = shared(model, x)
    calls: list[str] = []
    for i, block in enumerate(graph.capture.module.blocks):  # type: ignore[arg-type]
        block.mlp.register_forward_hook(lambda *_, i=i: calls.append(f"mlp {i + 1}"))
    runs = Replay(graph)
    with torch.no_grad():
        begun = runs.begin((x,), {}, 1)
        assert calls == ["mlp 1", "mlp 2", "mlp 3"]
        for first, then in ((3, ["mlp 3"]), (2, ["mlp 2", "mlp 3"])):
            calls.clear()
            with graph.rewritten(sv.Plan.parse(f"{first}(50%)")):
                runs.run(begun, first)
            assert calls == then


def test_fewer_layers_are_kept_where_all_take_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Tiny().eval(), tiny_images()
    graph = shared(model, x)
    outputs: list[Tensor] = []
    with torch.no_grad():
        one = next(t.numel() for t in tensor_leaves(Replay(graph).begin((x,), {}, 1).kept[1]))
        for limit, layers in ((3, [1, 2, 3]), (2, [1, 3]), (1, [1])):
            monkeypatch.setattr(replay, "MOST_KEPT", limit * 4 * one * 5)
            runs = Replay(graph)
            begun = runs.begin((x,), {}, 5)
            assert list(begun.kept) == layers
            with graph.rewritten(sv.Plan.parse("2(50%)+3")):
                outputs.append(runs.run(begun, 2))
    torch.testing.assert_close(outputs, [outputs[0]] * 3, rtol=0, atol=0)
