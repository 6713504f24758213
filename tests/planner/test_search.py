"""The search as a user calls it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import skipvit_fx as sv
from skipvit_fx.planner import search as search_module
from support.models import scramble
from support.tiny import Tiny


def model(**options: Any) -> nn.Module:
    return scramble(Tiny(**options)).eval()


def batches(*sizes: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 3, 16, 16, generator=generator) for size in sizes or (12, 12)]


@cache
def found() -> sv.SearchResult:
    """One search that several tests look at."""
    return sv.search(model(), batches(), metric="cosine", trials=24, seed=1)


class TestResult:
    def test_the_front_is_sorted_and_nothing_in_it_is_beaten(self) -> None:
        front, everything = found().front, found().candidates
        assert [one.macs for one in front] == sorted(one.macs for one in front)
        for one in front:
            assert not any(
                (other.macs <= one.macs and other.quality > one.quality)
                or (other.macs < one.macs and other.quality >= one.quality)
                for other in everything
            )
        assert len(everything) == 24
        assert {str(one.plan) for one in everything} >= {"", "1-3(1)+merged"}
        assert [one.method for one in everything if one.method] == ["ToMe"]

    @pytest.mark.slow
    def test_figures_are_those_of_each_plans_rewrite(self) -> None:
        ours = model()
        images = torch.cat(batches())
        whole = sv.search(ours, batches(), trials=0, holdout=0, measure=False)
        with torch.no_grad():
            wanted = ours(images).argmax(1)
            for one in whole.candidates[::4]:
                fast = sv.rewrite(ours, one.plan, example_inputs=images, validate=False)
                agree = (fast(images).argmax(1) == wanted).double().mean().item()
                assert one.quality == pytest.approx(agree)
                assert one.macs == sv.inspect(fast).macs

    def test_the_share_held_out_has_figures_of_its_own(self) -> None:
        assert found().images == found().held_out_images == 12
        assert all(one.held_out is not None for one in found().front)
        assert any(one.held_out != one.quality for one in found().front)
        off = [one for one in found().candidates if one not in found().front]
        assert all(one.held_out is None for one in off)

    def test_best(self) -> None:
        front = found().front
        share = front[-1].macs / found().baseline_macs
        assert found().best(macs=1.0) == front[-1]
        assert found().best(macs=share) == front[-1]
        assert found().best(quality=0.0) == front[0]
        assert found().best(quality=front[-1].quality) == front[-1]
        assert found().best(milliseconds=1e9) == front[-1]
        for limits in ({"macs": 0.01}, {"quality": 1.1}, {"milliseconds": 0.0}):
            with pytest.raises(sv.SearchError, match="no plan of the front") as caught:
                found().best(**limits)
            assert "of the multiply-adds" in caught.value.hint
        with pytest.raises(sv.SearchError, match="nothing to choose"):
            found().best()

    def test_text(self) -> None:
        text = str(found())
        assert repr(found()) == text
        assert "Plans for Tiny" in text
        assert "cosine on 12 images, 12 held out" in text
        assert "with random weights it means nothing" in text
        for one in found().front:
            assert (str(one.plan) or "(every token)") in text
        assert "ToMe" in text or all(one.method != "ToMe" for one in found().front)
        shown = found()._repr_html_()
        assert shown.count("<tr>") == 1 + len(found().front)
        assert all(escape(line) in shown for line in (*text.splitlines()[:2], "±0.0"))
        hostile = replace(found(), model="<b>", doubts="<i>")._repr_html_()
        assert "&lt;b&gt;" in hostile
        assert not re.search("<[bi]>", hostile)

    def test_plain_values(self) -> None:
        said = json.loads(json.dumps(found().to_dict(), allow_nan=False))
        assert [one["plan"] for one in said["front"]] == [str(one.plan) for one in found().front]
        assert said["images"] == 12
        assert len(said["profile"]) == 9

    def test_profile(self) -> None:
        profile = found().profile
        assert profile.layers == (1, 2, 3)
        assert profile.percents == (25, 50, 75)
        assert str(profile.at(2, 50).plan) == "2(50%)+4"
        known = {str(one.plan): one for one in found().candidates}
        for entry in profile.entries:
            same = known[str(entry.plan)]
            assert (entry.macs, entry.quality) == (same.macs, same.quality)
        assert len(str(profile).splitlines()) == 5

    def test_pictures(self) -> None:
        front = found().plot()
        assert len(front.axes) == 2
        labels = {text.get_text() for text in front.axes[0].get_legend().get_texts()}
        assert labels == {"front", "front, held out", "ToMe"}
        assert len(found().profile.plot().axes[0].get_legend().get_texts()) == 3

    @pytest.mark.slow
    def test_a_saved_model_says_how_its_plan_was_found(self, tmp_path: Path) -> None:
        one = next(c for c in found().front if c.plan.spans)
        fast = sv.rewrite(model(), one.plan, example_inputs=batches()[0])
        sv.save(fast, tmp_path / "fast.safetensors", search=found())
        again = sv.load(tmp_path / "fast.safetensors", model())
        said = sv.inspect(again).search
        assert said == found().summary(one.plan)
        assert f"cosine {one.quality:.4f} on 12 images" in str(sv.inspect(again))
        sv.save(again, tmp_path / "again.safetensors")
        assert sv.inspect(sv.load(tmp_path / "again.safetensors", model())).search == said
        assert sv.inspect(fast).search is None
        with pytest.raises(sv.SearchError, match="not one of the 24"):
            found().summary("1(13%)")


def test_the_same_again() -> None:
    ours = sv.search(model(), batches(), metric="cosine", trials=24, seed=1, measure=False)
    assert [(c.plan, c.macs, c.quality) for c in ours.candidates] == [
        (c.plan, c.macs, c.quality) for c in found().candidates
    ]
    assert ours.study == found().study


@pytest.mark.slow
def test_the_model_and_the_generators_are_left_alone() -> None:
    ours = model().train()
    state = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    torch.manual_seed(5)
    before = torch.get_rng_state()
    sv.search(ours, batches(4), trials=0, measure=False, score="random")
    assert torch.equal(torch.get_rng_state(), before)
    assert all(part.training for part in ours.modules())
    assert all(torch.equal(tensor, state[name]) for name, tensor in ours.state_dict().items())
    assert ours.state_dict().keys() == state.keys()


@pytest.mark.slow
def test_another_model_image_or_argument_is_another_study() -> None:
    quick: dict[str, Any] = {"trials": 0, "measure": False}
    names = [
        sv.search(ours, images, **quick, **options).study
        for ours, images, options in (
            (model(), batches(4), {}),
            (scramble(Tiny(), seed=1).eval(), batches(4), {}),
            (model(), batches(4, seed=1), {}),
            (model(), batches(4), {"cut": "block"}),
        )
    ]
    assert len(set(names)) == 4


@pytest.mark.slow
def test_a_budget() -> None:
    result = sv.search(model(), batches(6), trials=18, budget=0.6, measure=False)
    limit = 0.6 * result.baseline_macs
    assert result.front
    assert all(one.macs <= limit for one in result.front)
    assert result.best() == max(result.front, key=lambda one: one.quality)
    always = {str(e.plan) for e in result.profile.entries} | {"", "1-3(1)+merged"}
    proposed = {str(c.plan) for c in result.candidates} - always
    assert proposed
    assert all(c.macs <= limit for c in result.candidates if str(c.plan) in proposed)


@pytest.mark.slow
def test_a_budget_in_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is a count of multiply-adds; the model itself takes 10 ms."""

    def timed(ours: nn.Module, plans: Any, batch: Any, options: Any) -> list[float]:
        fast = [sv.rewrite(ours, plan, example_inputs=batch.args, validate=False) for plan in plans]
        counts = [sv.inspect(one) for one in fast]
        return [10.0, *(10.0 * one.macs / one.baseline_macs + 0.1 for one in counts)]

    monkeypatch.setattr(search_module, "milliseconds", timed)
    result = sv.search(model(), batches(), trials=16, budget="6.5 ms")
    assert result.front
    assert all(one.milliseconds is not None for one in result.front)
    assert max(one.milliseconds or 0 for one in result.front) <= 6.5
    assert result.best(milliseconds=6.5) == result.best()


@pytest.mark.slow
def test_ctrl_c_returns_the_front_so_far() -> None:
    seen: list[sv.Progress] = []

    def stop(progress: sv.Progress) -> None:
        seen.append(progress)
        if len(seen) == 14:
            raise KeyboardInterrupt

    result = sv.search(model(), batches(), trials=200, progress=stop, measure=False)
    assert result.interrupted
    assert "Interrupted" in str(result)
    assert len(result.candidates) == 14
    assert [one.evaluated for one in seen] == list(range(1, 15))
    assert [c.plan for c in seen[-1].front] == [c.plan for c in result.front]
    assert all(one.held_out is not None for one in result.front)


class Features(Tiny):
    """Returns all tokens."""

    def forward(self, x: Tensor) -> Any:
        return self.norm(self.tokens(x))


def test_dense_features_return() -> None:
    ours = scramble(Features()).eval()
    result = sv.search(ours, batches(4), metric="cosine", trials=16, holdout=0, measure=False)
    assert all(c.plan.spans[-1].return_layer for c in result.candidates if c.plan.spans)
    assert all(c.quality < 1 for c in result.candidates if c.plan.spans)
    assert next(c for c in result.candidates if not c.plan.spans).quality == pytest.approx(1.0)
    assert all(one.held_out is None for one in result.front)
    ((plan, why),) = result.left_out.items()
    assert plan == "1-3(1)+merged"
    assert why == "an output has shape [4, 14, 8], that of the model [4, 17, 8]"
    assert f"Left out: {plan}: {why}" in str(result)
    assert result.to_dict()["left_out"] == result.left_out
    assert not found().left_out
    with pytest.raises(sv.SearchError, match="class scores"):
        sv.search(ours, batches(4), trials=0)


@pytest.mark.slow
def test_labels_and_functions() -> None:
    ours, images = model(), batches(8)[0]
    with torch.no_grad():
        labels = ours(images).argmax(1)
    labels[:2] = (labels[:2] + 1) % 5

    def right(outputs: Tensor, batch: Any) -> Tensor:
        return (outputs.argmax(1) == batch[1]).float()

    options: dict[str, Any] = {"trials": 0, "holdout": 0, "measure": False}
    by_name = sv.search(ours, [(images, labels)], metric="accuracy", **options)
    by_function = sv.search(ours, [(images, labels)], metric=right, labelled=True, **options)
    assert [c.quality for c in by_name.candidates] == [c.quality for c in by_function.candidates]
    assert next(c for c in by_name.candidates if not c.plan.spans).quality == 0.75
    assert by_function.metric == "right"


def test_batches_of_two_kinds_are_refused() -> None:
    images = [*batches(4), torch.randn(4, 3, 16, 20)]
    with pytest.raises(sv.SearchError, match="batch 2 is a call of another kind"):
        sv.search(model(), images, trials=0)


@pytest.mark.every_case
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"metric": "accurate"}, "metric must be one of 'agreement', 'cosine', 'accuracy'"),
        ({"budget": 0}, "budget must be a share"),
        ({"budget": 1.5}, "budget must be a share"),
        ({"budget": "12s"}, "budget must be a share"),
        ({"budget": "-1ms"}, "budget must be a share"),
        ({"budget": "9ms", "measure": False}, "needs measured times"),
        ({"stages": 0}, "stages must be an integer of 1 or more, got 0"),
        ({"stages": True}, "stages must be an integer"),
        ({"trials": -1}, "trials must be an integer of 0 or more"),
        ({"holdout": 1.0}, r"holdout must be a share in \[0, 1\)"),
        ({"seed": -1}, "seed must be an integer"),
    ],
)
def test_arguments_that_are_none(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(sv.SearchError, match=words) as caught:
        sv.search(model(), batches(2), **arguments)
    assert caught.value.hint


@pytest.mark.every_case
@pytest.mark.parametrize("name", ["plan", "train_only", "cuts"])
def test_options_that_are_none(name: str) -> None:
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        sv.search(model(), batches(2), **{name: "x"})


def test_options_are_checked() -> None:
    with pytest.raises(sv.PlanError, match="cut must be one of"):
        sv.search(model(), batches(2), cut="middle")
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        sv.search(Tiny, batches(2))  # type: ignore[arg-type]
