"""Whatever one trains a model with works on the rewritten one: bit for bit as on the model while skipping is off."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import VisionTransformer
from timm.utils import ModelEmaV3
from torch import Tensor, fx, nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import skipvit_fx as sv
from skipvit_fx.testing import check_rewrite
from support.models import scramble
from support.once import made_once

PLAN = "1,2(30%,30%)+3"
BATCH = 8


def tiny(**options: Any) -> nn.Module:
    """Three layers, 16 patches; dropout everywhere."""
    torch.manual_seed(0)
    rates = {"drop_path_rate": 0.2, "proj_drop_rate": 0.1, "attn_drop_rate": 0.1}
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
    return VisionTransformer(num_classes=5, weight_init="jax", **(size | rates | options))


def calm(**options: Any) -> nn.Module:
    """Without dropout, and every weight far from its initial value."""
    rates = {"drop_path_rate": 0.0, "proj_drop_rate": 0.0, "attn_drop_rate": 0.0}
    return scramble(tiny(**rates, **options))


@made_once
def rewritten(
    build: Callable[[], nn.Module] = calm, plan: sv.Plan | str = PLAN, **options: Any
) -> Any:
    """A rewrite of a model that nothing else holds."""
    return sv.rewrite(build(), plan, example_inputs=torch.zeros(2, 3, 32, 32), **options)


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(BATCH, 3, 32, 32, generator=generator)
    return images, torch.arange(BATCH) % 5


# -- recipes ------------------------------------------------------------------------------------------------------


def plain(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> nn.Module:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def clipped_and_accumulated(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        for part in (slice(0, 4), slice(4, 8)):
            (F.cross_entropy(model(x[part]), y[part]) / 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


def in_bfloat16(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> nn.Module:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    return model


def in_float16_with_scaled_loss(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> nn.Module:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scaler = torch.amp.GradScaler("cpu")
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return model


def checkpointed(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> nn.Module:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(checkpoint(model, x, use_reentrant=False), y).backward()
        optimizer.step()
    return model


def averaged_by_timm(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> nn.Module:
    average = ModelEmaV3(model, decay=0.7)
    for _ in range(steps):
        plain(model, x, y, 1)
        average.update(model)
    return average.module


def averaged_by_torch(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> nn.Module:
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.7))
    for _ in range(steps):
        plain(model, x, y, 1)
        average.update_parameters(model)
    return average.module


Recipe = Callable[[nn.Module, Tensor, Tensor, int], nn.Module]
RECIPES: list[Recipe] = [
    plain,
    clipped_and_accumulated,
    in_bfloat16,
    in_float16_with_scaled_loss,
    checkpointed,
    averaged_by_timm,
    averaged_by_torch,
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.__name__)
def test_trains_bit_for_bit_like_the_model_while_off(
    recipe: Recipe, data: tuple[Tensor, Tensor]
) -> None:
    model = tiny().train()
    fast = rewritten(tiny).train()
    sv.set_skipping(fast, False)
    torch.manual_seed(2)
    wanted = recipe(model, *data, 3).state_dict()
    torch.manual_seed(2)
    got = recipe(fast, *data, 3).state_dict()
    assert list(got) == list(wanted)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.__name__)
def test_learns_with_skipping_on(recipe: Recipe, data: tuple[Tensor, Tensor]) -> None:
    fast = rewritten(tiny).train()
    before = F.cross_entropy(fast.eval()(data[0]), data[1]).item()
    trained = recipe(fast.train(), *data, 12).eval()
    assert [t.kept.shape[1] for t in sv.trace_tokens(trained, data[0])] == [12, 9]
    assert F.cross_entropy(trained(data[0]), data[1]).item() < 0.8 * before


@pytest.mark.slow
def test_accumulated_gradients_are_those_of_the_whole_batch(data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    fast = rewritten().double()
    F.cross_entropy(fast(x.double()), y).backward()
    wanted = {name: p.grad.clone() for name, p in fast.named_parameters()}
    fast.zero_grad()
    for part in (slice(0, 4), slice(4, 8)):
        (F.cross_entropy(fast(x[part].double()), y[part]) / 2).backward()
    for name, parameter in fast.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-9, atol=1e-12)


def test_an_overflow_is_skipped_by_the_scaler(data: tuple[Tensor, Tensor]) -> None:
    """NaN scores still choose patches, so that the step fails in the loss and nowhere else."""
    fast = rewritten(tiny).train()
    before = copy.deepcopy(fast.state_dict())
    in_float16_with_scaled_loss(fast, data[0] * torch.nan, data[1], 1)
    assert all(torch.equal(before[name], value) for name, value in fast.state_dict().items())


class Watch(TorchDispatchMode):
    """Notes the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("plan", [PLAN, "2(50%)+4+fused", "2(50%)+fused"])
@pytest.mark.slow
def test_no_gradient_is_added_up_by_index(plan: str, data: tuple[Tensor, Tensor]) -> None:
    fast = rewritten(calm, plan)
    torch.use_deterministic_algorithms(True)
    try:
        loss = F.cross_entropy(fast(data[0]), data[1])
        with Watch() as watch:
            loss.backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert "index_select" in watch.seen
    assert not watch.seen & {"index_add", "index_add_", "scatter_add", "scatter_add_", "index_put_"}


# -- the schedule -------------------------------------------------------------------------------------------------


def logits(fast: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return fast(x)


def test_warm_up_sees_every_token(data: tuple[Tensor, Tensor]) -> None:
    model = calm().eval()
    fast = rewritten()
    skipping = logits(fast, data[0])
    schedule = sv.SkipSchedule(fast, warmup_epochs=2)
    for epoch in (0, 1):
        schedule.step(epoch)
        assert torch.equal(logits(fast, data[0]), logits(model, data[0]))
    for epoch in (2, 50):
        schedule.step(epoch)
        assert torch.equal(logits(fast, data[0]), skipping)
    schedule.step(0)  # back again, as a resumed run may go
    assert torch.equal(logits(fast, data[0]), logits(model, data[0]))


def test_the_papers_warm_up_is_the_default() -> None:
    schedule = sv.SkipSchedule(rewritten())
    assert [schedule.share(epoch) for epoch in (14, 15)] == [0, 1]


@pytest.mark.slow
def test_the_ramp_is_evits_cosine(data: tuple[Tensor, Tensor]) -> None:
    """EViT: the keep rate falls from 1 to that of the plan by half a cosine."""
    x = torch.randn(2, 3, 64, 64)
    fast = sv.rewrite(calm(img_size=64), "2(55%)+4", example_inputs=x)
    schedule = sv.SkipSchedule(fast, 3, ramp_epochs=8)
    kept = []
    for epoch in range(4, 13):
        schedule.step(epoch)
        (trace,) = sv.trace_tokens(fast, x)
        kept.append(trace.kept.shape[1])
    rates = [0.45 + 0.55 * (math.cos(math.pi * min(t / 8, 1)) + 1) / 2 for t in range(1, 10)]
    assert kept == pytest.approx([64 * rate for rate in rates], abs=1.1)
    assert kept == sorted(kept, reverse=True)
    assert kept[-2:] == [29, 29]


def eva(plan: sv.Plan | str) -> Any:
    """Rotary tables that are gathered by position."""
    torch.manual_seed(0)
    name = "eva02_tiny_patch14_224"
    size = {"img_size": 56, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 5}
    return sv.rewrite(scramble(timm.create_model(name, **size)), plan).eval()


def vit(plan: sv.Plan | str) -> Any:
    return rewritten(calm, plan).eval()


@pytest.mark.parametrize(
    ("build", "plan", "size"),
    [(vit, PLAN, 32), (vit, "1,3(40%,40%)+4+fused", 32), (vit, "2,3(60%,9%)", 32), (eva, PLAN, 56)],
)
@pytest.mark.slow
def test_a_ratio_on_the_way_is_that_ratio(build: Any, plan: str, size: int) -> None:
    """Half-way up, the module computes what a rewrite with half the ratios does, to the last bit."""
    whole = sv.Plan.parse(plan)
    x = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))
    fast = build(plan)
    in_full = sv.inspect(fast)
    schedule = sv.SkipSchedule(fast, 1, ramp_epochs=2)
    schedule.step(2)
    assert schedule.share(2) == Fraction(1, 2)
    halves = (
        replace(span, stages=tuple(sv.Stage(s.layer, s.amount / 2) for s in span.stages))
        for span in whole.spans
    )
    wanted = build(sv.Plan(tuple(halves)))
    assert torch.equal(logits(fast, x), logits(wanted, x))
    assert not torch.equal(logits(fast, x), logits(build(plan), x))
    for ours, theirs in zip(sv.trace_tokens(fast, x), sv.trace_tokens(wanted, x), strict=True):
        assert torch.equal(ours.kept, theirs.kept)
    now = sv.inspect(fast)
    assert (now.macs, now.layers, now.plan) == (in_full.macs, in_full.layers, in_full.plan)
    assert torch.equal(logits(copy.deepcopy(fast), x), logits(wanted, x))


def test_a_schedule_goes_on_where_it_was(tmp_path: Path, data: tuple[Tensor, Tensor]) -> None:
    fast, again = rewritten(), rewritten()
    schedule = sv.SkipSchedule(fast, 2, ramp_epochs=4)
    schedule.step(4)
    torch.save(schedule.state_dict(), tmp_path / "state.pt")
    resumed = sv.SkipSchedule(again, 7)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert json.loads(json.dumps(resumed.state_dict())) == schedule.state_dict()
    assert torch.equal(logits(again, data[0]), logits(fast, data[0]))
    resumed.step(5)
    schedule.step(5)
    assert torch.equal(logits(again, data[0]), logits(fast, data[0]))


@pytest.mark.slow
def test_one_compilation_a_change(data: tuple[Tensor, Tensor]) -> None:
    fast = rewritten(partial(calm, depth=2), "1(50%)+2").train()
    schedule = sv.SkipSchedule(fast, 2, ramp_epochs=3)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(fast, fullgraph=True, backend=counter)
    frames = []
    for epoch in (0, 1, 2, 3, 3, 4, 5, 6, 0, 5):
        schedule.step(epoch)
        eager = F.cross_entropy(fast(data[0]), data[1])
        loss = F.cross_entropy(compiled(data[0]), data[1])
        loss.backward()
        compiled(data[0] + 1)
        torch.testing.assert_close(loss, eager)
        frames.append(counter.frame_count)
    assert frames == [1, 1, 1, 2, 2, 3, 4, 4, 4, 4]


@pytest.mark.parametrize("wrap", [nn.Sequential, torch.compile, AveragedModel])
def test_a_schedule_reaches_into_what_wraps_the_model(wrap: Any) -> None:
    wrapped = wrap(rewritten())
    sv.SkipSchedule(wrapped, 1)
    fast = next(m for m in wrapped.modules() if isinstance(m, fx.GraphModule))
    assert not sv.inspect(fast).skipping


@pytest.mark.parametrize("value", [-1, 1.0, True, "3", None])
def test_numbers_of_epochs_are_checked(value: Any) -> None:
    fast = rewritten()
    for call in (
        lambda: sv.SkipSchedule(fast, value),
        lambda: sv.SkipSchedule(fast, ramp_epochs=value),
        lambda: sv.SkipSchedule(fast).step(value),
        lambda: sv.SkipSchedule(fast).load_state_dict(
            {"epoch": value, "warmup_epochs": 1, "ramp_epochs": 0}
        ),
    ):
        with pytest.raises(sv.PlanError, match="is not a number of epochs") as caught:
            call()
        assert caught.value.hint


def test_what_is_no_state_or_no_rewritten_model_is_refused() -> None:
    with pytest.raises(sv.PlanError, match="epoch, warmup_epochs, ramp_epochs, got lr"):
        sv.SkipSchedule(rewritten()).load_state_dict({"lr": 1})
    with pytest.raises(sv.NotRewrittenError):
        sv.SkipSchedule(tiny())


# -- train_only ---------------------------------------------------------------------------------------------------


def by_schedule() -> Any:
    fast = rewritten()
    sv.SkipSchedule(fast, 0, train_only=True)
    return fast


def saved_and_loaded(folder: Path) -> Any:
    sv.save(rewritten(train_only=True), folder / "fast.safetensors")
    return sv.load(folder / "fast.safetensors", calm())


def switched() -> Any:
    fast = rewritten(train_only=True)
    sv.set_skipping(fast, False)
    sv.set_skipping(fast, True)
    sv.SkipSchedule(fast, 1).step(1)
    return fast


@pytest.mark.parametrize("how", ["rewrite", "schedule", "saved", "copied", "switched"])
@pytest.mark.slow
def test_the_full_sequence_in_eval_mode(
    how: str, tmp_path: Path, data: tuple[Tensor, Tensor]
) -> None:
    model = calm().eval()
    fast = {
        "rewrite": lambda: rewritten(train_only=True),
        "schedule": lambda: by_schedule(),
        "saved": lambda: saved_and_loaded(tmp_path),
        "copied": lambda: copy.deepcopy(rewritten(train_only=True)),
        "switched": lambda: switched(),
    }[how]()
    always = rewritten()
    assert torch.equal(logits(fast.eval(), data[0]), logits(model, data[0]))
    assert torch.equal(logits(fast.train(), data[0]), logits(always.train(), data[0]))
    assert not torch.equal(logits(fast, data[0]), logits(model, data[0]))


def test_train_only_can_be_taken_back(data: tuple[Tensor, Tensor]) -> None:
    fast = rewritten(train_only=True).eval()
    sv.SkipSchedule(fast, 0, train_only=False)
    assert torch.equal(logits(fast, data[0]), logits(rewritten().eval(), data[0]))


@pytest.mark.slow
def test_what_needs_skipping_says_that_it_is_off(
    tmp_path: Path, data: tuple[Tensor, Tensor]
) -> None:
    fast = rewritten(train_only=True).eval()
    assert sv.inspect(fast).macs == sv.inspect(rewritten()).macs
    assert "off at the moment" in str(sv.inspect(fast))
    with pytest.raises(sv.SkipViTError, match="switched off"):
        sv.trace_tokens(fast, data[0])
    assert len(sv.trace_tokens(fast.train(), data[0])) == 2
    with pytest.raises(sv.ExportError, match="original model"):
        sv.export_onnx(fast, tmp_path / "fast.onnx")


# -- multiple_of --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plan", "multiple", "lengths"),
    [
        ("2(50%)+4", 1, [9]),
        ("2(50%)+4", 4, [12]),
        ("2(50%)+4", 3, [9]),
        ("2(50%)+4", 16, [16]),
        ("2(50%)+4", 17, [17]),
        ("2(50%)+4", 32, [17]),
        ("2(50%)+4+fused", 4, [12]),
        ("2(50%)+4+fused", 5, [10]),
        ("1,3(30%,30%)+4", 8, [16, 16]),
        ("1,3(30%,30%)+4", 4, [16, 12]),
    ],
)
def test_the_shortened_sequence_is_aligned(plan: str, multiple: int, lengths: list[int]) -> None:
    fast = rewritten(calm, plan, multiple_of=multiple, eliminate_dead_tokens=False)
    report = sv.inspect(fast)
    stages = [stage.layer for stage in sv.Plan.parse(plan).stages]
    assert [report.layers[layer - 1].ffn_tokens for layer in stages] == lengths
    if "fused" not in plan:
        assert check_rewrite(calm().eval(), fast.eval(), torch.randn(2, 3, 32, 32)).exact


@pytest.mark.slow
def test_alignment_is_a_smaller_ratio(tmp_path: Path, data: tuple[Tensor, Tensor]) -> None:
    """9 tokens become 12: of 16 patches 5 leave instead of 8."""
    fast = rewritten(calm, "2(50%)+4", multiple_of=4).eval()
    wanted = rewritten(calm, "2(31.25%)+4").eval()
    assert torch.equal(logits(fast, data[0]), logits(wanted, data[0]))
    sv.save(fast, tmp_path / "fast.safetensors")
    again = sv.load(tmp_path / "fast.safetensors", calm()).eval()
    assert torch.equal(logits(again, data[0]), logits(wanted, data[0]))


@pytest.mark.parametrize("value", [0, -8, 2.0, True, "8"])
def test_a_multiple_is_a_number_of_tokens(value: Any) -> None:
    with pytest.raises(sv.PlanError, match="multiple_of") as caught:
        rewritten(multiple_of=value)
    assert caught.value.hint
