"""The tracers of `torch.fx` and of torchvision take a rewritten model, and call what was inserted as it is."""

from __future__ import annotations

import copy
import pickle
from fractions import Fraction
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torchvision.models.feature_extraction import create_feature_extractor

import skipvit_fx as sv
from skipvit_fx.ops.select import Select
from support.rewrites import assert_close, gradients, rewritten

pytestmark = pytest.mark.every_case


def inserted(graph: fx.Graph) -> list[str]:
    """Calls of inserted modules, in order."""
    calls = (str(node.target) for node in graph.nodes if node.op == "call_module")
    return [path for path in calls if path.startswith("skipvit.")]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["vit", "fused", "beit", "torchvision", "tied"])
@pytest.mark.client("torch.fx", "symbolic_trace")
def test_traced(case: str) -> None:
    _, fast, x, output = rewritten(case)
    traced = fx.symbolic_trace(fast)
    with torch.no_grad():
        assert_close(traced(x), output)
    assert inserted(traced.graph) == inserted(fast.graph)


@pytest.mark.parametrize("case", ["vit", "fused"])
@pytest.mark.client("torch.fx", "a trace is trained")
def test_a_trace_trains(case: str) -> None:
    _, fast, x, _ = rewritten(case)
    traced = fx.symbolic_trace(fast.train())
    wanted = gradients(fast, fast(x).square().mean())
    assert_close(gradients(traced, traced(x).square().mean()), wanted)


def test_the_ratio_stays_a_setting() -> None:
    _, fast, x, output = rewritten("vit")
    traced = fx.symbolic_trace(fast)
    for module in traced.modules():
        if isinstance(module, Select):
            module.current = Fraction(0)
    with torch.no_grad():
        assert not torch.allclose(traced(x), output)
        assert_close(traced(x), fast(x))


@pytest.mark.slow
def test_what_was_checked_is_checked() -> None:
    _, fast, x, _ = rewritten("torchvision")
    traced = fx.symbolic_trace(fast)
    with pytest.raises(sv.GuardError):
        traced(x[..., :48])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_trace_is_copied(copied: Any) -> None:
    _, fast, x, output = rewritten("fused")
    with torch.no_grad():
        assert_close(copied(fx.symbolic_trace(fast))(x), output)


def test_a_part_of_another_model() -> None:
    _, fast, x, output = rewritten("vit")
    whole = nn.Sequential(nn.Identity(), fast, nn.Softmax(-1)).eval()
    with torch.no_grad():
        assert_close(fx.symbolic_trace(whole)(x), output.softmax(-1))


def note(seen: dict[str, Tensor], name: str, module: nn.Module, args: Any, out: Tensor) -> None:
    seen[name] = out


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.client("torchvision", "create_feature_extractor")
def test_features(training: bool) -> None:
    """By the names of modules, as on the model."""
    _, fast, x, _ = rewritten("vit")
    names = ["blocks.1.mlp", "blocks.2.mlp", "head"]
    extractor = create_feature_extractor(fast, return_nodes=names).train(training)
    with torch.no_grad():
        got = extractor(x)
    seen: dict[str, Tensor] = {}
    for name in names:
        hook = partial(note, seen, name)
        fast.get_submodule(name).register_forward_hook(hook)
    with torch.no_grad():
        fast.train(training)(x)
    assert_close(got, seen)
    assert seen["blocks.1.mlp"].shape[1] == seen["blocks.2.mlp"].shape[1] == 1 + 24 - 13
