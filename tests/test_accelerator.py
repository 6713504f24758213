"""On an accelerator, what a CPU cannot show: its kernels, its precisions, its graphs, and that nothing waits for it."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import skipvit_fx as sv
from support.checks import TOLERANCE, assert_exact, rewrite
from support.models import BY_NAME, FAMILIES, Family, layout_of, names
from support.reference import ReferenceResult, masked_reference, relative_error
from support.token_merging import assert_same_merges, merging_reference

if not torch.accelerator.is_available():
    pytest.skip("no accelerator here", allow_module_level=True)

pytestmark = pytest.mark.every_case

TWO = {"stages": [(1, "0.3"), (3, "0.4")], "return_layer": 4}
PLAN = "1,3(30%,40%)+4"
MERGED = "1-3(3)+5+merged"
SOME = ["vit", "dinov2-reg4", "siglip-map", "beit", "rope-axial"]


def device() -> torch.device:
    found = torch.accelerator.current_accelerator()
    assert found is not None
    return found


def built(name: str, **options: Any) -> tuple[Any, Tensor]:
    family = BY_NAME[name]
    return family.build(**options).to(device()), family.input().to(device())


def score_of(model: nn.Module) -> str:
    return "mean" if layout_of(model).cls is None else "cls"


@pytest.mark.parametrize("family", FAMILIES, ids=names(FAMILIES))
def test_every_family_is_exact(family: Family) -> None:
    model, x = built(family.name)
    fast = rewrite(model, TWO, x, score=score_of(model))
    assert_exact(fast, model, x, layout_of(model), TWO)
    with sv.skipping(fast, False), torch.no_grad():
        assert torch.equal(fast.graph_forward(x), model(x))


@pytest.mark.parametrize("name", SOME)
def test_moved_there_after_the_rewrite(name: str) -> None:
    family = BY_NAME[name]
    model, x = family.build(), family.input()
    fast = rewrite(model, TWO, x, score=score_of(model)).to(device())
    assert_exact(fast, model.to(device()), x.to(device()), layout_of(model), TWO)


def without_ties(family: Family, model: nn.Module) -> tuple[Tensor, ReferenceResult]:
    """Images whose merges no rounding decides, and what the reference makes of them."""
    for seed in range(1, 50):
        x = family.input(batch=3, seed=seed).to(device())
        result = merging_reference(
            model, x, layout_of(model), stages=[(1, 3), (2, 3), (3, 3)], return_layer=5
        )
        if all(stage.margin > 1e-5 for stage in result.stages):
            return x, result
    raise AssertionError("the reference is at a tie for every seed")


@pytest.mark.parametrize("name", [*SOME, "vit-unfused", "eva-gqa", "cait", "relpos-shared"])
def test_merging_is_exact(name: str) -> None:
    model, _ = built(name)
    x, wanted = without_ties(BY_NAME[name], model)
    fast = sv.rewrite(model, MERGED, example_inputs=x)
    with torch.no_grad():
        assert relative_error(fast(x), wanted.output) < TOLERANCE
        assert_same_merges(sv.trace_tokens(fast, x), wanted.stages)
        with sv.skipping(fast, False):
            assert torch.equal(fast.graph_forward(x), model(x))
    model.zero_grad()
    fast(x).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in fast.parameters() if p.grad is not None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SOME)
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """Validated in that precision, bit for bit the model where nothing is skipped, and close to float32 where it is."""
    model, x = built(name, rate=0.1)
    with torch.no_grad():
        exact = masked_reference(model, x, layout_of(model), **TWO).output
    model, x = model.to(dtype), x.to(dtype)
    fast = rewrite(model, TWO, x, score=score_of(model))
    with torch.no_grad():
        assert relative_error(fast(x).float(), exact) < 0.1
        with sv.skipping(fast, False):
            assert torch.equal(fast.graph_forward(x), model(x))
            results = []
            for train in (model.train(), fast.train().graph_forward):
                torch.manual_seed(3)
                results.append(train(x))
            assert torch.equal(*results)


@pytest.mark.parametrize("name", SOME)
def test_gradients(name: str) -> None:
    model, x = built(name)
    fast = rewrite(model, TWO, x, score=score_of(model))
    grads = []
    for run in (
        lambda: masked_reference(model, x, layout_of(model), **TWO).output,
        lambda: fast(x),
    ):
        model.zero_grad()
        run().square().sum().backward()
        grads.append(
            {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
        )
    wanted, got = grads
    assert wanted.keys() == got.keys()
    scale = max(float(grad.abs().max()) for grad in wanted.values())
    for key, grad in wanted.items():
        assert float((got[key] - grad).abs().max()) < TOLERANCE * scale, key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_training_in_mixed_precision_learns(dtype: torch.dtype) -> None:
    model, x = built("vit")
    fast = rewrite(model, PLAN, x).train()
    optimizer = torch.optim.AdamW(fast.parameters(), lr=1e-3, fused=True)
    scaler = torch.amp.GradScaler(device().type, enabled=dtype is torch.float16)
    labels = torch.arange(x.shape[0], device=device())
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast(device().type, dtype=dtype):
            loss = F.cross_entropy(fast(x), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


@contextmanager
def nothing_waits() -> Iterator[None]:
    """An operator that makes the CPU wait for the accelerator is an error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # once per process: a prototype
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


only_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")


@only_cuda
@pytest.mark.parametrize("plan", [PLAN, PLAN + "+fused", "2(55%)", MERGED])
@pytest.mark.parametrize("name", ["vit", "dinov2-reg4", "siglip-map"])
def test_nothing_waits_for_the_accelerator(name: str, plan: str) -> None:
    if name == "siglip-map" and plan.endswith("fused"):
        plan = PLAN
    model, x = built(name, rate=0.1)
    fast = rewrite(model, plan, x).train()
    fast(x).square().mean().backward()
    with nothing_waits():
        fast(x).square().mean().backward()
        fast.eval()
        with torch.no_grad():
            out = fast(x)
    assert out.isfinite().all()


@only_cuda
@pytest.mark.parametrize(
    ("plan", "score"), [(PLAN, "cls"), (PLAN, "mean"), (PLAN, "random"), (MERGED, "auto")]
)
def test_recorded_once_as_a_cuda_graph(plan: str, score: str) -> None:
    """The replay chooses tokens anew for every image."""
    model, x = built("vit")
    fast = rewrite(model, plan, x, score=score)
    still = x.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(3):
            fast(still)
    torch.cuda.current_stream().wait_stream(stream)
    recorded = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(recorded):
        out = fast(still)
    results = []
    for images in (x, x.flip(0), x.flip(-1)):
        still.copy_(images)
        recorded.replay()
        results.append(out.clone())
        if score != "random":
            with torch.no_grad():
                assert relative_error(out, fast(images)) < 1e-5
    assert not torch.allclose(results[0], results[2])


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("plan", [PLAN, "2(55%)+fused", MERGED])
def test_compiled(plan: str, mode: str) -> None:
    model, x = built("vit")
    fast = rewrite(model, plan, x)
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, mode=mode)
    with torch.no_grad():
        for images in (x, x.flip(0), x.flip(-1)):
            assert relative_error(compiled(images).clone(), fast(images)) < TOLERANCE
    fast.train()
    grads = []
    for run in (fast, compiled):
        fast.zero_grad()
        run(x).square().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in fast.parameters() if p.grad is not None]))
    assert relative_error(grads[1], grads[0]) < 10 * TOLERANCE


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
def test_a_rewrite_leaves_nothing_there(frontend: Any) -> None:
    """Neither memory nor a draw from the accelerator's generator."""
    model, x = built("vit", rate=0.1)
    rewrite(model, PLAN, x, frontend=frontend)  # what libraries allocate once
    gc.collect()
    memory, state = torch.accelerator.memory_allocated(), torch.get_device_module().get_rng_state()
    fast = rewrite(model, PLAN, x, frontend=frontend)
    assert torch.equal(torch.get_device_module().get_rng_state(), state)
    del fast
    gc.collect()
    assert torch.accelerator.memory_allocated() == memory


def test_a_random_choice_follows_the_seed() -> None:
    model, x = built("vit")
    fast = rewrite(model, PLAN, x, score="random")

    def chosen(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return [stage.kept for stage in sv.trace_tokens(fast, x)]

    first, again, other = chosen(0), chosen(0), chosen(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_images_are_made_where_the_model_is() -> None:
    model, x = built("vit")
    for fast in (sv.rewrite(model, PLAN), under_default_device(model)):
        with torch.no_grad():
            assert torch.equal(fast(x), rewrite(model, PLAN, x)(x))


def under_default_device(model: nn.Module) -> Any:
    with device():
        return sv.rewrite(model, PLAN)


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_file_is_read_on_another_device(tmp_path: Path, channels_last: bool) -> None:
    model, x = built("vit")
    fast = rewrite(model, PLAN, x)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    with torch.no_grad():
        wanted = fast(x)
    sv.save(fast, tmp_path / "fast.safetensors")
    there = sv.load(tmp_path / "fast.safetensors", BY_NAME["vit"].build(seed=1))
    with torch.no_grad():
        assert relative_error(there(x.cpu()), wanted.cpu()) < TOLERANCE
        assert torch.equal(there.to(device())(x), wanted)


def test_latency() -> None:
    model, x = built("vit")
    report = sv.measure_latency(model, rewrite(model, PLAN, x), x, rounds=3)
    assert all(layer.measured > 0 for layer in report.layers)
