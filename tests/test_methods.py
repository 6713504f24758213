"""The published methods are plans that a model of 12 layers and 196 patches takes."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import skipvit_fx as sv

DOCS = Path(__file__).resolve().parents[1] / "docs"

PATCHES = 196

LEFT: dict[str, dict[int, int]] = {
    "skipvit": {6: 107},
    "evit": {4: 58, 7: 41, 10: 29},
    "tome": dict.fromkeys(range(1, 13), 8),
    "tomesd": dict.fromkeys(range(1, 12), 58),
    "idlevit": dict.fromkeys((4, 5, 6), 58)
    | dict.fromkeys((7, 8, 9), 99)
    | dict.fromkeys((10, 11), 128),
    "patchdropout": {0: 98},
    "random-ltd": dict.fromkeys((1, 3, 5, 7, 9), 98),
    "dynamicvit": {3: 58, 6: 41, 9: 29},
    "visionzip": {11: 142},
}
"""How many patches leave at each layer."""

each = pytest.mark.parametrize("name", sv.METHODS)


def vit() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=56, patch_size=4, embed_dim=24, num_heads=3
    )
    return model.eval()


@pytest.mark.every_case
@each
def test_a_method_is_well_formed(name: str) -> None:
    method = sv.METHODS[name]
    plan = sv.Plan.parse(method.plan)
    assert str(plan) == method.plan
    plan.check(12)
    assert name == method.name.lower()
    assert re.fullmatch(r"\d{4}\.\d{5}", method.arxiv)
    assert method.url.endswith(method.arxiv)
    for text in (method.paper, method.equal, method.differs):
        assert text == text.strip()
        assert "  " not in text
    assert method.equal.endswith(".")
    assert method.differs.endswith(".")
    known = inspect.signature(sv.rewrite).parameters
    assert set(method.options) <= set(known) - {"model", "plan"}
    assert pickle.loads(pickle.dumps(method)) == copy.deepcopy(method) == method
    assert hash(method) == hash(copy.deepcopy(method))


@pytest.mark.slow
@each
def test_a_model_takes_it(name: str) -> None:
    method, model = sv.METHODS[name], vit()
    fast = sv.rewrite(model, method.plan, **method.options)
    report = sv.inspect(fast)
    assert report.validated
    assert report.patches == PATCHES
    assert report.plan == method.plan
    assert report.macs < report.baseline_macs
    x = torch.randn(2, 3, 56, 56)
    in_training = method.options.get("train_only", False)
    with torch.no_grad():
        assert torch.equal(fast(x), model(x)) is in_training
    dropped = {0: report.embedding.dropped} | {at.index: at.dropped for at in report.layers}
    assert {layer: count for layer, count in dropped.items() if count} == LEFT[name]


def test_they_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        sv.METHODS["evit"] = sv.METHODS["tome"]  # type: ignore[index]
    with pytest.raises(AttributeError):
        sv.METHODS["evit"].plan = "6(55%)"  # type: ignore[misc]


@pytest.mark.every_case
@each
def test_the_page_says_the_same(name: str) -> None:
    method = sv.METHODS[name]
    page = (DOCS / "methods.md").read_text(encoding="utf-8")
    said = f"- **Equal**: {method.equal}\n- **Different**: {method.differs}\n"
    assert said in page, "run benchmarks/methods.py --results docs/results/methods.json --page ..."
    assert f"\n{method.plan}\n" in page
    assert f"[{method.arxiv}]({method.url})" in page


@pytest.mark.slow
def test_random_ltd_skips_whole_layers() -> None:
    """Every second one, each for other tokens."""
    method = sv.METHODS["random-ltd"]
    fast = sv.rewrite(vit(), method.plan, **method.options).train()
    x = torch.randn(2, 3, 56, 56)
    report = sv.inspect(fast)
    seen = [(layer.attention_tokens, layer.ffn_tokens) for layer in report.layers]
    assert seen == [(197, 197), (99, 99)] * 5 + [(197, 197), (197, 1)]
    kept = torch.cat([stage.kept for stage in sv.trace_tokens(fast, x)])
    assert len(kept.unique(dim=0)) == len(kept) == 2 * 5


@pytest.mark.slow
def test_idle_tokens_may_take_part_again() -> None:
    method = sv.METHODS["idlevit"]
    fast = sv.rewrite(vit(), method.plan, **method.options)
    stages = sv.trace_tokens(fast, torch.randn(1, 3, 56, 56))
    assert [stage.kept.shape[1] for stage in stages] == [138] * 3 + [97] * 3 + [68] * 2
    again = set(stages[0].dropped[0].tolist()) & set(stages[1].kept[0].tolist())
    assert again
