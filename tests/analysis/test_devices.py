"""The analysis says the same of a model on an accelerator, where other operators run. Fake tensors need no device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

import skipvit_fx as sv
from skipvit_fx.analysis import tokens
from skipvit_fx.analysis.apart import why_not_apart
from skipvit_fx.analysis.axes import axes_of, tensors_in
from skipvit_fx.capture.fakes import TracelessFakeMode
from skipvit_fx.errors import UnsupportedModelError
from skipvit_fx.reports.attention import find_layers
from support.models import FAMILIES, Family
from support.odd_models import MIXERS, Block, MixingMlp, Odd, image

CHOSEN = ("vit-layerscale-qknorm", "dinov2-reg4-swiglu", "beit", "eva02", "cait")


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let everything that is made fake lie on a GPU; a list of the operators that ran on one."""
    ran: list[str] = []
    made = TracelessFakeMode.from_tensor
    inputs = tokens.fake_inputs
    dispatched = tokens.AxisMode.__torch_dispatch__

    def moved(mode: TracelessFakeMode, leaf: Any) -> Any:
        if not isinstance(leaf, FakeTensor) or leaf.is_cuda:
            return leaf
        with mode:
            return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="cuda")

    def from_tensor(self: TracelessFakeMode, tensor: Tensor, **how: Any) -> Any:
        return moved(self, made(self, tensor, **how))

    def fake_inputs(mode: TracelessFakeMode, example: Any, **how: Any) -> Any:
        return pytree.tree_map(lambda leaf: moved(mode, leaf), inputs(mode, example, **how))

    def dispatch(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = dispatched(self, func, types, args, kwargs)
        ran.extend(str(func) for t in tensors_in(out) if t.is_cuda)
        return out

    monkeypatch.setattr(TracelessFakeMode, "from_tensor", from_tensor)
    monkeypatch.setattr(tokens, "fake_inputs", fake_inputs)
    monkeypatch.setattr(tokens.AxisMode, "__torch_dispatch__", dispatch)
    return ran


def findings(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """What the analysis says of every node."""
    layers = find_layers(model, (x,), {})
    found: dict[str, Any] = {}
    for node in layers.capture.module.graph.nodes:
        facts = layers.analysis[node]
        axes = [axes_of(t) for t in tensors_in(facts.value)]
        reason = why_not_apart(layers.analysis, node) if _calls(node) else ""
        found[node.name] = (axes, facts.mixing, reason, len(facts.positions), facts.softmax_over)
    return found


def _calls(node: fx.Node) -> bool:
    return node.op.startswith("call")


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name in CHOSEN], ids=str)
def test_same_findings(family: Family, training: bool, request: pytest.FixtureRequest) -> None:
    model = family.build(rate=0.1).train(training)
    x = family.input(2)
    on_cpu = findings(model, x)
    ran = request.getfixturevalue("on_cuda")
    assert findings(model, x) == on_cpu
    assert ran
    if training:
        assert any("native_dropout" in name for name in ran), "what a GPU runs for dropout"


@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize("name", ["roll", "cumsum", "mean-token", "token-softmax", "conv1d"])
@pytest.mark.slow
def test_same_refusals(name: str) -> None:
    model = Odd([Block(mlp=MixingMlp(MIXERS[name]())), *(Block() for _ in range(3))])
    with pytest.raises(UnsupportedModelError):
        sv.rewrite(model, "1(50%)+4", example_inputs=(image(),))


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
@pytest.mark.slow
def test_a_default_device_concerns_the_author_alone(frontend: Any) -> None:
    """What is drawn to try a rewrite is made on the CPU, and moved to where the model is."""
    model, x = Odd([Block() for _ in range(3)]).eval(), image()
    with torch.device("meta"):
        fast = sv.rewrite(model, "1(50%)+3", example_inputs=(x,), frontend=frontend)
        assert "largest difference" in str(sv.inspect(fast))
        assert str(sv.measure_latency(model, fast, x, rounds=1))
        fast.blocks[1].mlp = nn.Sequential(fast.blocks[1].mlp, nn.Linear(32, 32, device="cpu"))
        assert fast(x).isfinite().all()
