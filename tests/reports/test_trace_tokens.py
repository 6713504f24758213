"""Which patches each stage keeps, named by their place in the image."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import skipvit_fx
from skipvit_fx.graph.traced_through import StayAway
from support.models import BY_NAME, TORCHVISION, layout_of
from support.once import made_once
from support.reference import assert_same_tokens, masked_reference, physical_reference

PATCHES = 24


@made_once
def rewritten(plan: str, name: str = "vit", seed: int = 0) -> tuple[nn.Module, Any, Tensor]:
    family = BY_NAME[name]
    model, x = family.build(seed=seed), family.input()
    return model, skipvit_fx.rewrite(model, plan, example_inputs=x[:2]), x


def assert_partition(kept: Tensor, dropped: Tensor, whole: Tensor) -> None:
    """Both ascending, and together ``whole``."""
    for part in (kept, dropped):
        assert part.dtype == torch.int64
        assert bool((part.diff(dim=1) > 0).all())
    assert torch.equal(torch.cat([kept, dropped], 1).sort(1).values, whole)


def test_one_stage() -> None:
    _, fast, x = rewritten("2(55%)+4")
    (stage,) = skipvit_fx.trace_tokens(fast, x)
    assert stage.layer == 2
    assert stage.kept.shape == (3, 11)  # ceil(0.45 * 24)
    assert stage.dropped.shape == (3, 13)
    assert stage.scores.shape == (3, PATCHES)
    assert stage.fused_kept is None
    assert_partition(stage.kept, stage.dropped, torch.arange(PATCHES).expand(3, -1))
    least_kept = stage.scores.gather(1, stage.kept).min(1).values
    assert bool((least_kept > stage.scores.gather(1, stage.dropped).max(1).values).all())
    assert len(set(map(tuple, stage.kept.tolist()))) > 1, "samples that choose alike test little"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "siglip-map", "parallel-things", "rope-axial"])
def test_later_stages_name_original_positions(name: str) -> None:
    model, fast, x = rewritten("1,2,3(30%,40%,50%)+4", name)
    traces = skipvit_fx.trace_tokens(fast, x)
    whole = torch.arange(traces[0].scores.shape[1]).expand(len(x), -1)
    for trace in traces:
        assert_partition(trace.kept, trace.dropped, whole)
        assert trace.scores.shape == whole.shape
        whole = trace.kept
    stages = [(1, "0.3"), (2, "0.4"), (3, "0.5")]
    layout = layout_of(model)
    with torch.no_grad():
        wanted = masked_reference(model, x, layout, stages=stages, return_layer=4)
    assert_same_tokens(traces, wanted.stages)


@pytest.mark.parametrize("plan", ["", "2(0%)+4", "1,3(0%,50%)+4"])
@pytest.mark.slow
def test_stages_that_drop_nothing(plan: str) -> None:
    _, fast, x = rewritten(plan)
    traces = skipvit_fx.trace_tokens(fast, x)
    assert [t.layer for t in traces] == [s.layer for s in skipvit_fx.Plan.parse(plan).stages]
    for trace in traces[:1]:
        assert torch.equal(trace.kept, torch.arange(PATCHES).expand(3, -1))
        assert trace.dropped.shape == (3, 0)
        assert trace.dropped.dtype == torch.int64
        assert trace.scores.shape == (3, PATCHES)
    for trace in traces[1:]:
        assert_partition(trace.kept, trace.dropped, torch.arange(PATCHES).expand(3, -1))
        assert trace.kept.shape == (3, 12)


FUSED = [(1, "0.5"), (2, "0.5"), (3, "0.5")]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.slow
def test_fused_tokens_are_no_patches(seed: int) -> None:
    """Against the reference, which names fused tokens PATCHES, PATCHES + 1, ... after the patches."""
    model, fast, _ = rewritten("1,2,3(50%,50%,50%)+4+fused", seed=seed)
    x = BY_NAME["vit"].input(batch=8)
    traces = skipvit_fx.trace_tokens(fast, x)
    with torch.no_grad():
        wanted = physical_reference(model, x, stages=FUSED, return_layer=4, fused=True).stages
    names = torch.arange(PATCHES).expand(8, -1)
    for earlier, (trace, theirs) in enumerate(zip(traces, wanted, strict=True)):
        assert theirs.margin > 1e-6
        assert trace.fused_kept is not None
        assert trace.fused_kept.shape == (8, earlier)
        for b in range(8):
            for part in ("kept", "dropped"):
                patches = [i for i in getattr(theirs, part)[b].sort().values if i < PATCHES]
                row = getattr(trace, part)[b].tolist()
                assert row == [*patches, *[-1] * (len(row) - len(patches))]
            still = [PATCHES + i in theirs.kept[b] for i in range(earlier)]
            assert trace.fused_kept[b].tolist() == still
            scores = theirs.scores[b][names[b] < PATCHES]
            row = trace.scores[b]
            torch.testing.assert_close(row[: len(scores)], scores)
            assert bool(row[len(scores) :].isnan().all())
        for part in (trace.kept, trace.dropped):
            assert part.shape[1] == int((part >= 0).sum(1).max()), "no wider than needed"
        one_more = torch.full((8, 1), PATCHES + earlier)
        names = torch.cat([theirs.kept.sort(1).values, one_more], 1)


@pytest.mark.slow
def test_some_fused_tokens_are_dropped_and_some_not() -> None:
    """The test above would prove little if all samples did the same."""
    seen = set()
    for seed in range(3):
        _, fast, _ = rewritten("1,2,3(50%,50%,50%)+4+fused", seed=seed)
        for trace in skipvit_fx.trace_tokens(fast, BY_NAME["vit"].input(batch=8)):
            assert trace.fused_kept is not None
            seen |= set(trace.fused_kept.flatten().tolist())
    assert seen == {True, False}


@pytest.mark.slow
def test_a_fused_plan_that_drops_nothing_fuses_nothing() -> None:
    _, fast, x = rewritten("1,2(0%,50%)+4+fused")
    first, second = skipvit_fx.trace_tokens(fast, x)
    assert first.fused_kept is not None
    assert second.fused_kept is not None
    assert first.fused_kept.shape == second.fused_kept.shape == (3, 0)
    assert_partition(second.kept, second.dropped, torch.arange(PATCHES).expand(3, -1))


def test_by_keyword_and_in_train_mode() -> None:
    _, fast, x = rewritten("2(55%)+4")
    (wanted,) = skipvit_fx.trace_tokens(fast, x)
    fast.train()
    (got,) = skipvit_fx.trace_tokens(fast, x=x)
    assert fast.training
    assert torch.equal(got.kept, wanted.kept)
    assert not got.scores.requires_grad


@pytest.mark.slow
def test_parallel_attentions_share_one_score() -> None:
    _, fast, x = rewritten("2(50%)+4", "parallel-things")
    (stage,) = skipvit_fx.trace_tokens(fast, x)
    part = fast.get_submodule("skipvit.stage_1")
    scores = []
    for name, child in part.named_children():
        if name.startswith("score"):
            child.register_forward_hook(lambda _m, _a, out: scores.append(out))
    fast(x)
    assert len(scores) == 2
    torch.testing.assert_close(stage.scores, (scores[0] + scores[1]) / 2)


def hooks(module: nn.Module) -> int:
    """Hooks, except those that keep others from calling modules that were traced through."""
    found = [
        h
        for m in module.modules()
        for h in [*m._forward_hooks.values(), *m._forward_pre_hooks.values()]
    ]
    return sum(not isinstance(hook, StayAway) for hook in found)


@pytest.mark.slow
def test_no_hook_stays() -> None:
    _, fast, x = rewritten("1,3(30%,40%)+4")
    skipvit_fx.trace_tokens(fast, x)
    assert hooks(fast) == 0
    with pytest.raises(skipvit_fx.TraceError, match="does not run on the example inputs"):
        skipvit_fx.trace_tokens(fast, x[:, :1])
    assert hooks(fast) == 0


def test_switched_off_is_an_error_and_not_an_empty_answer() -> None:
    _, fast, x = rewritten("2(55%)+4")
    skipvit_fx.set_skipping(fast, False)
    with pytest.raises(skipvit_fx.SkipViTError, match="switched off") as caught:
        skipvit_fx.trace_tokens(fast, x)
    assert "set_skipping(fast, True)" in caught.value.hint
    assert hooks(fast) == 0
    skipvit_fx.set_skipping(fast, True)
    assert len(skipvit_fx.trace_tokens(fast, x)) == 1


def test_a_plain_model_is_refused() -> None:
    with pytest.raises(skipvit_fx.NotRewrittenError) as caught:
        skipvit_fx.trace_tokens(TORCHVISION.build(), TORCHVISION.input())
    assert caught.value.hint
