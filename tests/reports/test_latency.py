"""Predicted and measured times: the arithmetic, and what is in the table. No clock is believed here."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import timm
import torch
from torch import nn
from typer.testing import CliRunner

import skipvit_fx
from skipvit_fx.cli.app import app
from skipvit_fx.errors import NotRewrittenError, SkipViTError
from skipvit_fx.ops.switch import Switchable
from skipvit_fx.reports import latency
from skipvit_fx.reports.latency import measure_latency
from skipvit_fx.reports.latency_model import LatencyModel
from skipvit_fx.reports.latency_report import LatencyReport, LayerLatency
from skipvit_fx.reports.macs import count_macs
from support.commands import share_rewrites

PLAN = "1(50%)+3"
SMALL = ["vit_tiny_patch16_224", PLAN, "--img-size", "64", "--depth", "3"]


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3)


@pytest.fixture(scope="module")
def fast(vit: nn.Module) -> Any:
    return skipvit_fx.rewrite(vit, PLAN)


# -- bytes ---------------------------------------------------------------------------------------------------------


def test_bytes_on_paper(vit: nn.Module, fast: Any) -> None:
    count = count_macs(fast, (torch.empty(2, 3, 64, 64, device="meta"),), skipping=False)
    tokens, width, float32 = 17, 192, 4
    stream, vector = tokens * width * float32, width * float32
    assert count.bytes["blocks_0_norm1"] == 2 * stream + 2 * vector + 2 * tokens * float32
    assert count.bytes["add_1"] == 3 * stream  # a residual: two read, one written
    assert count.bytes["blocks_0_mlp"] == 2 * 4 * stream  # GELU alone: products are not in it
    assert count.bytes["blocks_0_attn_qkv"] == 0
    assert count.bytes["reshape"] == 0  # a view
    assert count.nodes["blocks_0_norm1"] == 0


@pytest.mark.slow
def test_fewer_tokens_move_fewer_bytes(fast: Any) -> None:
    report = skipvit_fx.inspect(fast)
    first, second, _ = report.layers
    kept, full = 1 + 8, 17
    moved = second.bytes / second.baseline_bytes
    assert moved == pytest.approx(kept / full, rel=0.02)  # the weights of norms stay whole
    assert first.baseline_bytes == second.baseline_bytes
    assert report.to_dict()["layers"][1]["bytes"] == second.bytes


# -- the model -----------------------------------------------------------------------------------------------------


def test_the_constants_are_found() -> None:
    macs, bytes_ = [4e9, 0.0, 1e9, 2e8], [0.0, 3e7, 1e6, 5e7]
    law = LatencyModel(2e-11, 1e-10)
    seconds = [law.seconds(m, b) for m, b in zip(macs, bytes_, strict=True)]
    assert seconds[2] == pytest.approx(0.0201)
    found = LatencyModel.fitted(macs, bytes_, seconds)
    assert found.seconds_per_mac == pytest.approx(2e-11)
    assert found.seconds_per_byte == pytest.approx(1e-10)


def test_no_constant_is_negative() -> None:
    # more bytes, less time: plain least squares would make the second constant negative
    found = LatencyModel.fitted([1e9, 2e9, 3e9], [3e6, 2e6, 0.0], [0.9, 2.0, 3.3])
    assert found.seconds_per_byte == 0
    assert found.seconds_per_mac == pytest.approx((0.9 + 4.0 + 9.9) / 14e9)
    only_bytes = LatencyModel.fitted([0.0, 0.0], [1e6, 2e6], [1.0, 2.0])
    assert only_bytes.seconds_per_mac == 0
    assert only_bytes.seconds_per_byte == pytest.approx(1e-6)


def report() -> LatencyReport:
    layers = (
        LayerLatency("embedding", 10, 10, 5, 5, 1.0, 1.0, 1.0, 1.0),
        LayerLatency("1", 60, 100, 5, 10, 6.0, 10.0, 5.0, 11.0),
        LayerLatency("2", 40, 100, 4, 10, 4.0, 10.0, 5.0, 9.0),
        LayerLatency("head", 10, 10, 0, 0, 1.0, 1.0, 1.0, 1.0),
    )
    law = LatencyModel(1e-11, 0.0)
    return LatencyReport("ViT", PLAN, "cpu", 4, law, layers, (1.0, 2.0, 2.0), (2.0, 3.0, 5.0))


def test_what_a_report_derives() -> None:
    made = report()
    assert made.speedups == (2.0, 1.5, 2.5)
    assert made.speedup == 2.0
    assert made.mac_limit == 220 / 120
    assert made.predicted_speedup == 22 / 12
    assert made.errors == pytest.approx((0.2, 0.2))


def test_the_table() -> None:
    lines = str(report()).splitlines()
    assert lines[0].startswith(
        "ViT with plan 1(50%)+3 on cpu, batch 4; medians of 3 alternating rounds"
    )
    assert lines[3].split() == [
        *("layer", "before", "after"),
        *("predicted", "measured", "predicted", "measured"),
    ]
    by_name = {line.split()[0]: line.split()[1:] for line in lines[4:9]}
    assert by_name["1"][2:] == ["10000.00", "11000.00", "6000.00", "5000.00"]
    assert by_name["total"][2:] == ["22000.00", "22000.00", "12000.00", "12000.00"]
    text = "\n".join(lines)
    assert "2.000 measured (1.500 to 2.500), 1.833 predicted, 1.833 by multiply-adds" in text
    assert "100.0 GMAC/s in matrix products, too many GB/s to tell elsewhere" in text
    assert "off by 20% in the median, 20% at most" in text


# -- measuring, with a clock that ticks once a look ------------------------------------------------------------------


@pytest.mark.slow
def test_what_is_measured(vit: nn.Module, fast: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr(latency, "perf_counter", lambda: float(next(clock)))
    fast.train()
    made = measure_latency(vit, fast, (torch.randn(2, 3, 64, 64),), rounds=3)
    assert fast.training
    assert all(module.enabled for module in fast.modules() if isinstance(module, Switchable))

    inspected = skipvit_fx.inspect(fast)
    assert [layer.name for layer in made.layers] == ["embedding", "1", "2", "3", "head"]
    for layer, wanted in zip(made.layers[1:-1], inspected.layers, strict=True):
        assert (layer.macs, layer.baseline_macs) == (wanted.macs, wanted.baseline_macs)
        assert (layer.bytes, layer.baseline_bytes) == (wanted.bytes, wanted.baseline_bytes)
        law, batch = made.law, 2
        assert layer.predicted == law.seconds(batch * layer.macs, batch * layer.bytes)
    assert made.mac_limit == inspected.baseline_macs / inspected.macs
    # a tick a node and a tick a call
    assert sum(layer.measured for layer in made.layers) == len(fast.graph.nodes)
    assert sum(layer.baseline_measured for layer in made.layers) == len(fast.graph.nodes)
    assert made.seconds == made.baseline_seconds == (1.0, 1.0, 1.0)
    assert made.device == "cpu"
    assert made.batch == 2


@pytest.mark.slow
def test_each_time_is_that_of_its_model(
    vit: nn.Module, fast: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node takes as many seconds as it has tokens: all 17 in the original, 9 where half of the patches left."""

    class Counting(latency._NodeTimer):
        def run_node(self, n: Any) -> Any:
            value = super().run_node(n)
            is_norm = n.name == "blocks_1_norm1"
            self.seconds[n.name][-1] = float(value.shape[1]) if is_norm else 0.0
            return value

    monkeypatch.setattr(latency, "_NodeTimer", Counting)
    for model in (fast, skipvit_fx.rewrite(vit, PLAN, train_only=True)):
        made = measure_latency(vit, model, (torch.randn(1, 3, 64, 64),), rounds=1)
        assert [layer.baseline_measured for layer in made.layers] == [0, 0, 17, 0, 0]
        assert [layer.measured for layer in made.layers] == [0, 0, 9, 0, 0]


def test_bad_input(vit: nn.Module, fast: Any) -> None:
    images = torch.randn(1, 3, 64, 64)
    with pytest.raises(SkipViTError, match="0 rounds of 1 images"):
        measure_latency(vit, fast, (images,), rounds=0)
    with pytest.raises(SkipViTError, match="rounds of 0 images"):
        measure_latency(vit, fast, (images[:0],))
    with pytest.raises(NotRewrittenError):
        measure_latency(vit, vit, (images,))


# -- the command ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_bench_json(monkeypatch: pytest.MonkeyPatch) -> None:
    share_rewrites(monkeypatch)
    result = CliRunner().invoke(app, ["bench", *SMALL, "--batch", "1", "--rounds", "1", "--json"])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["plan"] == PLAN
    assert [layer["name"] for layer in said["layers"]] == ["embedding", "1", "2", "3", "head"]
    assert len(said["seconds"]) == len(said["baseline_seconds"]) == 1
    assert said["mac_limit"] > 1
    assert {"hardware", "versions", "law", "speedup", "predicted_speedup"} <= set(said)
    assert "random weights" in result.stderr


def test_bench_table(monkeypatch: pytest.MonkeyPatch) -> None:
    share_rewrites(monkeypatch)
    result = CliRunner().invoke(app, ["bench", *SMALL, "--batch", "1", "--rounds", "1"])
    assert result.exit_code == 0, result.output
    assert "by multiply-adds alone" in result.stdout
    assert f"torch {torch.__version__}" in result.stdout


@pytest.mark.parametrize("device", ["npu", "abacus"])
def test_bench_on_a_device_that_is_not_there(device: str) -> None:
    result = CliRunner().invoke(app, ["bench", *SMALL, "--device", device])
    assert result.exit_code == 2
    assert "skipvit doctor" in result.stderr
    assert "Traceback" not in result.stderr
