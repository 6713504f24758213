"""The look before a rewrite: what is found, and why a place did or did not match."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import skipvit_fx
from skipvit_fx import AttentionReport, TraceError, UnsupportedModelError, find_attention
from support.models import BY_NAME, DEPTH, Family
from support.odd_models import image, mixing

PATCHES = 24


def look(family: Family) -> AttentionReport:
    return find_attention(family.build(), example_inputs=family.input())


@pytest.fixture(scope="module")
def vit() -> AttentionReport:
    return look(BY_NAME["vit"])


@pytest.fixture(scope="module")
def cait() -> AttentionReport:
    return look(BY_NAME["cait"])


class Gated(nn.Module):
    """One more softmax, over the channels, and what is hard to place: unused, borrowed, inside."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(32, 32)
        self.borrowed = nn.Linear(32, 32)
        self.nested = nn.Sequential(nn.Linear(32, 32), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.linear(x, self.borrowed.weight)
        return x + self.nested(x) * x.softmax(-1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gated = Gated()
        self.norm = nn.LayerNorm(32)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + F.scaled_dot_product_attention(y, y, y)
        return x + self.gated(x)


class Small(nn.Module):
    image_size = 32

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 32, 8, 8)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture(scope="module")
def small() -> AttentionReport:
    return find_attention(Small())


class TestFound:
    def test_layers_and_rows(self, vit: AttentionReport) -> None:
        assert [layer.index for layer in vit.layers] == list(range(1, DEPTH + 1))
        assert [site.module_path for site in vit.sites] == [f"blocks.{i}.attn" for i in range(4)]
        assert (vit.prefix_tokens, vit.patches, vit.trailing_tokens) == (1, PATCHES, 0)
        assert vit.class_token is True
        assert vit.refusal is None
        assert vit.obstacles == {}
        site = vit.layers[1].sites[0]
        assert (site.layer, site.kind, site.tokens, site.heads) == (2, "fused", PATCHES + 1, 4)
        assert vit.layers[0].end == vit.layers[1].input

    def test_table(self, vit: AttentionReport) -> None:
        headline, blank, header, first, *_ = str(vit).splitlines()
        assert headline == (
            f"VisionTransformer: {DEPTH} layers, 1 prefix rows, {PATCHES} patches, with a class token "
            "(row 0: read by the head)"
        )
        assert not blank
        assert header.split() == ["layer", "module", "kind", "tokens", "heads", "prefix"]
        assert first.split() == ["1", "blocks.0.attn", "fused", "25", "4", "1"]

    @pytest.mark.slow
    def test_spelled_out(self, cait: AttentionReport) -> None:
        assert {site.kind for layer in cait.layers for site in layer.sites} == {"spelled out"}
        assert cait.class_token is False

    @pytest.mark.slow
    def test_two_sites_in_a_layer_of_parallel_blocks(self) -> None:
        report = look(BY_NAME["parallel-things"])
        assert all(len(layer.sites) == 2 for layer in report.layers)

    def test_grouped_heads_and_registers(self) -> None:
        report = look(BY_NAME["dinov2-reg4"])
        assert report.prefix_tokens == 5

    def test_plain_values(self, vit: AttentionReport) -> None:
        read = json.loads(json.dumps(vit.to_dict()))
        assert read["layers"][0]["sites"][0]["module_path"] == "blocks.0.attn"
        assert read["refusal"] is None

    @pytest.mark.slow
    def test_the_numbers_are_those_that_plans_use(self) -> None:
        family = BY_NAME["parallel-things"]
        model = family.build(depth=2)
        depth = len(find_attention(model, example_inputs=family.input()).layers)
        skipvit_fx.rewrite(model, f"{depth}(50%)+{depth + 1}", example_inputs=family.input())
        with pytest.raises(skipvit_fx.PlanError, match=f"the model has {depth} layers"):
            skipvit_fx.rewrite(model, f"{depth + 1}(50%)", example_inputs=family.input())

    def test_nothing_is_changed(self) -> None:
        model = BY_NAME["vit"].build()
        before = {name: id(module) for name, module in model.named_modules()}
        hooks = [len(module._forward_hooks) for module in model.modules()]
        find_attention(model, example_inputs=BY_NAME["vit"].input())
        assert {name: id(module) for name, module in model.named_modules()} == before
        assert [len(module._forward_hooks) for module in model.modules()] == hooks


class TestExplainMatches:
    def test_attention_module(self, vit: AttentionReport) -> None:
        said = vit.explain("blocks.2.attn")
        assert said.startswith("'blocks.2.attn' holds the attention of layer 3: a fused ")
        assert "over 25 tokens (1 prefix, 24 patches) and 4 heads." in said

    def test_attention_node(self, cait: AttentionReport) -> None:
        node = cait.layers[1].sites[0].node
        assert "holds the attention of layer 2: a softmax" in cait.explain(node)

    @pytest.mark.parametrize("path", ["", "blocks"])
    def test_several_layers(self, vit: AttentionReport, path: str) -> None:
        assert vit.explain(path).endswith(f"holds the attention of layers 1 to {DEPTH}.")

    def test_stream_nodes(self, vit: AttentionReport) -> None:
        layer = vit.layers[1]
        assert "is the residual stream before layer 2." in vit.explain(layer.input)
        assert "after the attention of layer 2, where dropped tokens leave" in vit.explain(
            layer.cut
        )
        assert "after layer 4, the last." in vit.explain(vit.layers[-1].end)


class TestExplainFailures:
    def test_class_attention(self, cait: AttentionReport) -> None:
        said = cait.explain("blocks_token_only.0.attn")
        assert "is not a layer's attention: its queries are not the tokens: class attention" in said
        assert "blocks_token_only.0.attn (fused): its queries" in str(cait)

    def test_pooling(self) -> None:
        assert "attention that pools" in look(BY_NAME["siglip-map"]).explain("attn_pool")

    def test_softmax_over_channels(self, small: AttentionReport) -> None:
        said = small.explain("blocks.1.gated")
        assert "a softmax" in said
        assert "it runs over an axis of length 32, which is not the token axis." in said

    def test_leaf_that_keeps_tokens_apart(self, vit: AttentionReport) -> None:
        said = vit.explain("blocks.0.mlp")
        assert "is called as a whole. It keeps tokens apart" in said

    def test_inside_a_leaf(self, vit: AttentionReport) -> None:
        said = vit.explain("blocks.0.mlp.fc1")
        assert said.startswith(
            "'blocks.0.mlp.fc1' is part of 'blocks.0.mlp', which runs no attention"
        )
        assert "keeps tokens apart" in said

    def test_away_from_the_tokens(self, vit: AttentionReport) -> None:
        for path in ("patch_embed", "head"):
            assert "It does not work on the sequence of tokens." in vit.explain(path)

    def test_never_executed(self, small: AttentionReport) -> None:
        assert small.explain("blocks.0.gated.unused").endswith(
            "is never executed on the example inputs."
        )

    def test_read_but_not_called(self, small: AttentionReport) -> None:
        assert "its parameters are read" in small.explain("blocks.0.gated.borrowed")

    @pytest.mark.slow
    def test_container(self, small: AttentionReport) -> None:
        assert "holds the attention of layers 1 to 2" in small.explain("blocks")
        vit = look(BY_NAME["relpos-mlp"])
        assert "is a container" in vit.explain("blocks.0.attn.rel_pos")

    def test_no_such_place(self, vit: AttentionReport) -> None:
        assert vit.explain("blocks.0.atn") == (
            "'blocks.0.atn' is neither a module of this VisionTransformer nor a node of its graph. "
            "Close to it: blocks.0.attn, blocks.3.attn, blocks.2.attn."
        )
        assert "Close" not in vit.explain("?")

    def test_node_that_is_no_tensor(self, vit: AttentionReport) -> None:
        assert vit.explain("getattr_1").endswith("is not a tensor.")

    @pytest.mark.slow
    def test_leaf_that_mixes_tokens_is_looked_into(self) -> None:
        report = find_attention(mixing("roll", "leaf", layer=2), example_inputs=image())
        (node, reason), *rest = report.obstacles.items()
        assert not rest
        assert reason == "roll runs over the token axis"
        assert f"{node}: {reason}" in str(report)
        said = report.explain("blocks.1.mlp")
        assert "was traced through" in said
        assert f"At node {node!r} it mixes tokens: {reason}." in said
        assert f"It does not keep tokens apart: {reason}" in report.explain(node)

    @pytest.mark.parametrize("name", ["conv1d", "mean-token", "sort", "linear-over-tokens"])
    @pytest.mark.slow
    def test_every_obstacle_has_a_reason(self, name: str) -> None:
        report = find_attention(mixing(name, "leaf", layer=2), example_inputs=image())
        assert len(report.layers) == DEPTH
        assert report.obstacles
        assert all(report.obstacles.values())


class ByBatch(Small):
    """Cannot be captured: a branch on the batch size."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out if x.shape[0] > 2 else -out


class Across(nn.Module):
    """Captured, but refused: attention among the channels, as in XCiT."""

    image_size = 32

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 32, 8, 8)
        self.norm = nn.LayerNorm(32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        for _ in range(2):
            y = self.norm(x).transpose(1, 2)
            x = x + F.scaled_dot_product_attention(y, y, y).transpose(1, 2)
            x = x + self.norm(x)
        return x


class TestRefused:
    def test_without_a_graph(self) -> None:
        report = find_attention(ByBatch(), example_inputs=torch.zeros(2, 3, 32, 32))
        assert isinstance(report.refusal, TraceError)
        assert report.layers == ()
        assert len(report.sites) == 4
        assert report.sites[0].tokens == 16
        said = report.explain("blocks.0")
        assert "could not be captured as a graph" in said
        assert "The model as a whole is refused: " in said
        assert "neither a module" in report.explain("blocks.7")
        assert f"Refused: {report.refusal}" in str(report)

    def test_with_a_graph(self) -> None:
        report = find_attention(Across())
        assert isinstance(report.refusal, UnsupportedModelError)
        assert report.prefix_tokens is None
        assert len(report.sites) == 2
        assert all(site.layer is None and site.reason for site in report.sites)
        assert "is not a layer's attention" in report.explain("")
        assert report.explain("embed").endswith(f"is refused: {report.refusal.reason}.")
        assert json.loads(json.dumps(report.to_dict()))["hint"]

    def test_it_is_the_error_of_rewrite(self) -> None:
        report = find_attention(Across())
        with pytest.raises(UnsupportedModelError) as caught:
            skipvit_fx.rewrite(Across(), "1(50%)+2")
        assert str(caught.value) == str(report.refusal)

    def test_no_attention_at_all(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        report = find_attention(model, example_inputs=torch.zeros(2, 3, 8, 8))
        assert report.sites == ()
        assert report.refusal is not None
        assert "no attention" in report.explain("0")

    def test_nothing_can_be_said_without_a_run(self) -> None:
        with pytest.raises(TraceError, match="does not run on the example inputs"):
            find_attention(Small(), example_inputs=torch.zeros(2, 4, 32, 32))
        with pytest.raises(TraceError, match="names no image size"):
            find_attention(nn.Linear(2, 2))
