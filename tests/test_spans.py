"""Plans of several spans, numbers of tokens, and drops in front of the first layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import skipvit_fx as sv
from skipvit_fx.errors import PlanError, UnsupportedModelError
from support.checks import TOLERANCE, assert_matches, assert_same_bits
from support.models import BY_NAME, layout_of
from support.odd_models import GOOD, Example, image
from support.reference import masked_reference, relative_error

Reference = dict[str, Any]

PLANS: dict[str, Reference] = {
    "1(30%)+2;2(30%)+3;3(30%)+4": {
        "stages": [(1, "0.3"), (2, "0.3"), (3, "0.3")],
        "return_layer": (2, 3, 4),
    },
    "1(7)+2;2,3(4,30%)+5": {"stages": [(1, 7), (2, 4), (3, "0.3")], "return_layer": (2, 5)},
    "1,2(30%,3)+3;4(50%)": {"stages": [(1, "0.3"), (2, 3), (4, "0.5")], "return_layer": (3,)},
    "1-4(3)": {"stages": [(layer, 3) for layer in (1, 2, 3, 4)]},
}
BLOCK: Reference = {"stages": [(1, 5), (3, "0.3")], "return_layer": (3, 5), "cut": "block"}
NAMES = [
    "vit",
    "vit-unfused",
    "dinov2-reg4",
    "siglip-map",
    "beit",
    "eva02",
    "dinov3-token",
    "rope-axial",
    "relpos-shared",
    "cait",
    "naflex-gap",
]


def score_of(model: nn.Module) -> str:
    return "mean" if layout_of(model).cls is None else "cls"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("plan", PLANS)
def test_exact(plan: str, name: str) -> None:
    family = BY_NAME[name]
    model, x = family.build(rate=0.1), family.input()
    fast = sv.rewrite(model, plan, example_inputs=family.input(batch=2), score=score_of(model))
    with torch.no_grad():
        assert_matches(fast, x, masked_reference(model, x, layout_of(model), **PLANS[plan]))
        with sv.skipping(fast, False):
            assert torch.equal(fast.graph_forward(x), model(x))


@pytest.mark.parametrize("name", ["vit", "beit", "cait"])
@pytest.mark.slow
def test_exact_if_whole_layers_are_cut(name: str) -> None:
    family = BY_NAME[name]
    model, x = family.build(), family.input()
    fast = sv.rewrite(
        model, "1(5)+3;3(30%)+5", example_inputs=x, score=score_of(model), cut="block"
    )
    with torch.no_grad():
        assert_matches(fast, x, masked_reference(model, x, layout_of(model), **BLOCK))


@pytest.mark.parametrize(
    "example", [e for e in GOOD if e.name not in ("grid-output", "flatten-head")], ids=str
)
def test_exact_in_any_spelling(example: Example) -> None:
    plan = "1,2(30%,3)+3;4(50%)"
    model, x = example.build(), image(batch=3)
    fast = sv.rewrite(model, plan, example_inputs=image(), score="cls")
    with torch.no_grad():
        assert_matches(fast, x, masked_reference(model, x, model.layout(), **PLANS[plan]))


@pytest.mark.parametrize("name", ["vit", "rope-axial"])
@pytest.mark.slow
def test_gradients(name: str) -> None:
    plan = "1(7)+2;2,3(4,30%)+5"
    family = BY_NAME[name]
    model, x = family.build(), family.input()
    fast = sv.rewrite(model, plan, example_inputs=x, score=score_of(model))
    grads = []
    for run in (
        lambda: masked_reference(model, x, layout_of(model), **PLANS[plan]).output,
        lambda: fast(x),
    ):
        model.zero_grad()
        run().square().sum().backward()
        grads.append(
            {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
        )
    scale = max(float(grad.abs().max()) for grad in grads[0].values())
    assert grads[0].keys() == grads[1].keys()
    for key, grad in grads[0].items():
        assert float((grads[1][key] - grad).abs().max()) < TOLERANCE * scale, key


@pytest.mark.slow
def test_each_span_may_have_fused_tokens() -> None:
    """The fused token of one span is gone in the next, which is exact as it would be alone after the first."""
    family = BY_NAME["vit"]
    model, x = family.build(), family.input()
    whole = sv.rewrite(model, "1,2(4,5)+3+fused;3(50%)+4", example_inputs=x)
    first, second, third = sv.trace_tokens(whole, x)
    assert [stage.kept.shape[1] for stage in (first, second, third)] == [20, 16, 12]
    assert third.fused_kept is None
    assert second.fused_kept is not None
    patches = torch.arange(24).expand(3, -1)
    assert torch.equal(torch.cat([third.kept, third.dropped], 1).sort(1).values, patches)
    states: dict[str, Tensor] = {}
    for text in ("1,2(4,5)+3+fused;3(50%)+4", "1,2(4,5)+3+fused"):
        fast = sv.rewrite(model, text, example_inputs=x)
        at = fast.get_submodule("skipvit.stage_1.put_back")
        at.register_forward_hook(lambda _, given, out, text=text: states.update({text: out}))
        with torch.no_grad():
            fast(x)
    assert torch.equal(*states.values())


@pytest.mark.slow
def test_a_number_of_tokens_never_takes_the_last() -> None:
    family = BY_NAME["vit"]
    model, x = family.build(), family.input()
    fast = sv.rewrite(model, "1,2(20,20)+4", example_inputs=x)
    assert [stage.kept.shape[1] for stage in sv.trace_tokens(fast, x)] == [4, 1]


@pytest.mark.slow
def test_a_schedule_raises_numbers_too() -> None:
    family = BY_NAME["vit"]
    model, x = family.build(), family.input()
    fast = sv.rewrite(model, "1(9)+2;2(50%)", example_inputs=x)
    schedule = sv.SkipSchedule(fast, 1, ramp_epochs=2)
    counts = []
    for epoch in (1, 2, 3):
        schedule.step(epoch)
        counts.append([] if epoch == 1 else [s.dropped.shape[1] for s in sv.trace_tokens(fast, x)])
    assert counts == [[], [4, 6], [9, 12]]


@pytest.mark.parametrize("plan", ["1(9)+2;2(50%)", "0(8)+2;2,3(4,30%)+4"])
@pytest.mark.slow
def test_reports_and_files_follow(plan: str, tmp_path: Path) -> None:
    family = BY_NAME["vit"]
    model, x = family.build(), family.input()
    score = "random" if plan.startswith("0") else "auto"
    fast = sv.rewrite(model, plan, example_inputs=x, score=score)
    report = sv.inspect(fast)
    assert report.plan == str(sv.Plan.parse(plan))
    at = {"embedding": report.embedding, **{str(layer.index): layer for layer in report.layers}}
    moves = {name: (r.returned, r.dropped) for name, r in at.items() if r.returned or r.dropped}
    wanted = {
        "1(9)+2;2(50%)": {"1": (0, 9), "2": (9, 12)},
        "0(8)+2;2,3(4,30%)+4": {"embedding": (0, 8), "2": (8, 4), "3": (0, 6), "4": (10, 0)},
    }[plan]
    assert moves == wanted
    sv.save(fast, tmp_path / "fast.safetensors")
    again = sv.load(tmp_path / "fast.safetensors", family.build(seed=1))
    results = []
    for module in (fast, again):
        torch.manual_seed(0)
        with torch.no_grad():
            results.append(module(x))
    assert_same_bits(*results)


@pytest.mark.slow
def test_the_file_for_onnx_names_the_patches_that_each_span_kept(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    family = BY_NAME["vit"]
    model, x = family.build(), family.input()
    fast = sv.rewrite(model, "1,2(30%,3)+3+fused;3,4(5,50%)", example_inputs=x)
    sv.export_onnx(fast, tmp_path / "fast.onnx", example_inputs=x, expose_kept=True)
    session = onnxruntime.InferenceSession(tmp_path / "fast.onnx")
    out, *kept = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        assert relative_error(torch.from_numpy(out), fast(x)) < TOLERANCE
    traces = sv.trace_tokens(fast, x)
    assert len(kept) == len(traces) == 4
    for i in (0, 2, 3):  # after a fused token may be one more
        assert torch.equal(torch.from_numpy(kept[i]).long(), traces[i].kept)


# -- in front of the first layer --------------------------------------------------------------------------------------


class Keep(nn.Module):
    """In the place of timm's own patch dropout: keeps the given patches."""

    def __init__(self, kept: Tensor, prefix: int, with_indices: bool) -> None:
        super().__init__()
        self.kept, self.prefix, self.with_indices = kept, prefix, with_indices

    def forward(self, x: Tensor) -> Any:
        rows = (self.kept + self.prefix).unsqueeze(-1).expand(-1, -1, x.shape[-1])
        x = torch.cat([x[:, : self.prefix], x.gather(1, rows)], 1)
        return (x, self.kept) if self.with_indices else x


def by_size(patches: Tensor) -> Tensor:
    return patches.square().sum(-1)


@pytest.mark.parametrize(
    "name", ["vit", "dinov2-reg4", "eva02", "dinov3", "rope-axial", "rope-mixed"]
)
def test_in_front_of_the_first_layer(name: str) -> None:
    """As timm drops patches in training, with the rows of its tables of positions."""
    family = BY_NAME[name]
    model, x = family.build(), family.input()
    fast = sv.rewrite(model, "0(40%)", example_inputs=x, score=by_size)
    (stage,) = sv.trace_tokens(fast, x)
    assert stage.layer == 0
    assert stage.dropped.shape[1] == int(0.4 * stage.scores.shape[1])
    assert len(set(map(tuple, stage.kept.tolist()))) > 1
    model.patch_drop = Keep(stage.kept, model.num_prefix_tokens, type(model).__name__ == "Eva")
    with torch.no_grad():
        assert relative_error(fast(x), model(x)) < TOLERANCE


def test_it_returns_as_it_was() -> None:
    family = BY_NAME["vit"]
    model, x = family.build(), family.input()
    fast = sv.rewrite(model, "0(50%)+2", example_inputs=x, score=by_size, train_only=True)
    with torch.no_grad():
        assert torch.equal(fast(x), model(x)), "in training only"
    fast.train()
    (stage,) = sv.trace_tokens(fast, x)
    seen: list[Tensor] = []
    fast.get_submodule("skipvit.stage_1.keep").register_forward_hook(
        lambda _, given, out: seen.append(given[0])
    )
    fast.get_submodule("skipvit.stage_1.put_back").register_forward_hook(
        lambda _, given, out: seen.append(out)
    )
    fast(x)
    before, after = seen
    rows = (stage.dropped + 1).unsqueeze(-1).expand(-1, -1, before.shape[-1])
    assert torch.equal(before.gather(1, rows), after.gather(1, rows))


@pytest.mark.parametrize("score", ["auto", "cls", "mean"])
def test_no_attention_scores_there(score: Any) -> None:
    model = BY_NAME["vit"].build()
    with pytest.raises(UnsupportedModelError, match="none has run in front of layer 1") as error:
        sv.rewrite(model, "0(50%)+2", score=score)
    assert "score='random'" in error.value.hint


def test_a_span_that_is_too_deep() -> None:
    with pytest.raises(PlanError, match="layer 5 is out of range: the model has 4 layers"):
        sv.rewrite(BY_NAME["vit"].build(), "1(3)+2;5(3)")
