"""Every rewrite is validated: errors are found and named, correct rewrites pass, and nothing is left behind."""

import dataclasses
import math
import operator
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

import skipvit_fx
from skipvit_fx import ValidationError, api, reference, validation
from skipvit_fx.analysis import soundness, tokens
from skipvit_fx.analysis.axes import axes_of, set_axes, tensors_in
from skipvit_fx.capture import opening
from skipvit_fx.cli.app import app
from skipvit_fx.differences import TOLERANCE, relative_error, short, tolerance
from skipvit_fx.ops.dead_tokens import Narrow
from skipvit_fx.ops.positions import GatherPositions
from skipvit_fx.ops.select import Select
from skipvit_fx.ops.skip import Fuse, Keep, PassAround, PutBack
from skipvit_fx.validation import sets_of_images
from support.models import BY_NAME, scramble
from support.odd_models import (
    DIM,
    MIXERS,
    POSITIONAL,
    Block,
    Mixer,
    MixingAttention,
    MixingMlp,
    Mlp,
    Odd,
    SequenceFirst,
    image,
    mixing,
)
from support.outside import HUGGING_FACE, pixels

EXAMPLE = torch.zeros(2, 3, 32, 40)


def rewrite(model: nn.Module, plan: str, **options: Any) -> Any:
    return skipvit_fx.rewrite(model, plan, **{"example_inputs": EXAMPLE, **options})


def found(fast: nn.Module) -> float:
    """The largest difference that validation found."""
    text = skipvit_fx.inspect(fast).validated
    assert text.startswith("validated: largest difference ")
    assert text.endswith(" over 2 images")
    return float(text.split()[3])


def odd(blocks: list[Any] | None = None, layers: int = 4, **options: Any) -> Odd:
    model = Odd([Block() for _ in range(layers)] if blocks is None else blocks, **options)
    scramble(model)
    return model.eval()


# -- the net alone, with the rules switched off ----------------------------------------------------------------------


BATCH_MIXERS: dict[str, Callable[[Tensor], Tensor]] = {
    "minus-mean": lambda x: x - x.mean(0),
    "plus-first": lambda x: x[0:1] + x,
    "flip": lambda x: x.flip(0),
    "softmax": lambda x: x.softmax(0),
    "softmin": lambda x: F.softmin(x, 0),
    "sort": lambda x: x.sort(0).values,
    "cumsum": lambda x: x.cumsum(0),
    "unbind": lambda x: x.unbind(0)[0] + x,
    "cat": lambda x: torch.cat([x[1:], x[:1]], 0),
    "einsum": lambda x: torch.einsum("bnc,anc->anc", x, x),
    "roll": lambda x: x.roll(1),
    "roll-samples": lambda x: x.roll(1, 0),
    "reshape": lambda x: x.reshape(2, -1).flip(0).reshape(x.shape),
    "layer-norm": lambda x: F.layer_norm(x.transpose(0, 2), (x.shape[0],)).transpose(0, 2),
    "largest": lambda x: x * x.amax(0, keepdim=True),
    "norm": lambda x: x / (1 + x.norm(dim=0, keepdim=True)),
    "outer": lambda x: x + torch.outer(x[0, :, 0], x[0, 0]) * 0.1,
}


def _accept_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rules and checks let everything pass; what they do not know keeps the axes that it came with."""
    monkeypatch.setattr(soundness, "span_refusal", lambda *_: "")
    monkeypatch.setattr(api, "check_shapes", lambda *_: None)
    apply = tokens.AxisMode._apply

    def lenient(self: Any, call: Any, outputs: list[Tensor]) -> None:
        inputs = tensors_in((call.args, call.kwargs))
        known = [(t.shape, axes_of(t)) for t in inputs if axes_of(t) is not None]
        apply(self, call, outputs)
        self.facts.positions.clear()
        if not self.facts.mixing:
            return
        self.facts.mixing, self.facts.pools = "", False
        for tensor in outputs:
            tensor._skipvit_lost = False  # type: ignore[attr-defined]
            axes = next((axes for shape, axes in known if shape == tensor.shape), None)
            set_axes(tensor, axes)

    monkeypatch.setattr(tokens.AxisMode, "_apply", lenient)


def _outcome(model: nn.Module) -> str:
    """``caught``, ``slipped``, or ``refused`` by a pass before the graph could be run."""
    try:
        rewrite(model, "1(50%)+4", prefix_tokens=1)
    except ValidationError:
        return "caught"
    except skipvit_fx.SkipViTError:
        return "refused"
    except RuntimeError as error:
        if "out of bounds" not in str(error):
            raise
        return "caught"  # what was inserted does not run on what it gets
    return "slipped"


@pytest.mark.slow
@pytest.mark.parametrize("place", ["leaf", "traced"])
def test_validation_alone_catches_what_mixes(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    _accept_everything(monkeypatch)
    for name, mix in BATCH_MIXERS.items():
        mixer: Mixer = lambda mix=mix: mix  # noqa: E731
        monkeypatch.setitem(MIXERS, f"batch-{name}", mixer)
    outcomes = {name: _outcome(mixing(name, place, layer=2)) for name in MIXERS}
    slipped = [n for n, o in outcomes.items() if o == "slipped" and n not in POSITIONAL]
    caught = [n for n, o in outcomes.items() if o == "caught"]
    refused = [n for n, o in outcomes.items() if o == "refused"]
    assert len(refused) <= 0.15 * len(outcomes), f"hardly tested: {refused}"
    assert len(caught) >= 0.95 * (len(caught) + len(slipped)), f"slipped through: {slipped}"


@pytest.mark.parametrize("name", ["minus-mean", "roll"])
@pytest.mark.slow
def test_validation_alone_catches_some_in_short(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A few of these for every day."""
    _accept_everything(monkeypatch)
    blocks = [Block(mlp=MixingMlp(BATCH_MIXERS[name])) if i == 1 else Block() for i in range(3)]
    with pytest.raises(ValidationError) as caught:
        rewrite(odd(blocks), "1(50%)+3", prefix_tokens=1)
    assert caught.value.layer == 2
    assert caught.value.modules == ("blocks.1.mlp",)
    assert caught.value.difference > 0.01
    blocks = [Block(MixingAttention(BATCH_MIXERS[name])) if i == 1 else Block() for i in range(3)]
    with pytest.raises(ValidationError) as caught:
        rewrite(odd(blocks), "1(50%)+3", prefix_tokens=1)
    assert caught.value.layer == 2
    assert "blocks.1.attn.to_q" in caught.value.modules


def test_what_the_stream_hides_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A branch that is next to nothing, as in a fresh model with LayerScale, mixes samples."""
    _accept_everything(monkeypatch)
    model = odd(
        [Block(mlp=MixingMlp(lambda x: x - x.mean(0))) if i == 1 else Block() for i in range(3)]
    )
    with torch.no_grad():
        model.blocks[1].mlp.fc2.weight *= 1e-7
        model.blocks[1].mlp.fc2.bias.zero_()
    with pytest.raises(ValidationError, match=r"they first differ in layer 2, at blocks\.1\.mlp"):
        rewrite(model, "1(50%)+3", prefix_tokens=1)


# -- passes that are broken on purpose --------------------------------------------------------------------------------


def _other_rows(self: Any, stream: Tensor, kept: Tensor) -> Tensor:
    """As many patches as are kept, beginning with those that are not."""
    patches = self.patch_count(stream)
    flags = torch.zeros(kept.shape[0], patches).scatter(1, kept, 1.0)
    return _keep(self, stream, flags.argsort(dim=1, stable=True)[:, : kept.shape[1]].sort(1).values)


def _off_by_one(self: Any, stream: Tensor, kept: Tensor) -> Tensor:
    return _keep(self, stream, (kept + 1) % self.patch_count(stream))


def _reversed(self: Any, *args: Tensor) -> Tensor:
    out = _put_back(self, *args)
    end = out.shape[1] - self.suffix
    return torch.cat([out[:, : self.prefix], out[:, self.prefix : end].flip(1), out[:, end:]], 1)


def _first_positions(self: Any, operand: Tensor, positions: Tensor | None) -> Tensor:
    first = None if positions is None else torch.arange(positions.shape[1]).expand_as(positions)
    return _gather(self, operand, first)


def _unweighted(self: Any, kept: Tensor, around: Tensor, gone: Tensor, *scores: Tensor) -> Tensor:
    return _fuse(self, kept, around, gone, *map(torch.ones_like, scores))


def _last_rows(self: Any, x: Tensor) -> Tensor:
    return x.narrow(self.dim, x.shape[self.dim] - self.rows, self.rows)


def _worst(self: Any, *scores: Tensor) -> Any:
    return _select(self, *(-score for score in scores))


_keep, _put_back, _gather, _fuse = (
    Keep.on_tokens,
    PutBack.on_tokens,
    GatherPositions.forward,
    Fuse.on_tokens,
)
_around, _select = PassAround.on_tokens, Select.forward

BREAKS: dict[str, tuple[type, str, Any, str, str, int]] = {
    "keep-off-by-one": (Keep, "on_tokens", _off_by_one, "vit", "2(50%)+4", 2),
    "dropped-rows-kept": (Keep, "on_tokens", _other_rows, "vit", "3(50%)+4", 3),
    "kept-rows-around": (
        PassAround,
        "on_tokens",
        lambda self, stream, gone: _around(self, stream, (gone + 1) % self.patch_count(stream)),
        "vit",
        "2(50%)+4",
        4,
    ),
    "put-back-in-reverse": (PutBack, "on_tokens", _reversed, "vit", "1(50%)+3", 3),
    "put-back-in-reverse-at-the-end": (
        PutBack,
        "on_tokens",
        _reversed,
        "siglip-map",
        "1(50%)+5",
        5,
    ),
    "first-positions": (GatherPositions, "forward", _first_positions, "rope-axial", "2(50%)+4", 3),
    "first-biases": (GatherPositions, "forward", _first_positions, "relpos-bias", "1(50%)+4", 2),
    "fused-without-weights": (Fuse, "on_tokens", _unweighted, "vit", "2(50%)+4+fused", 2),
    "last-rows-read": (Narrow, "forward", _last_rows, "vit", "1(50%)+3", 4),
    "worst-kept": (Select, "forward", _worst, "vit", "3(50%)+4", 3),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_pass_is_found_in_its_layer(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    owner, method, broken, family, plan, layer = BREAKS[name]
    model, x = BY_NAME[family].build(), BY_NAME[family].input()
    monkeypatch.setattr(owner, method, broken)
    with pytest.raises(ValidationError) as caught:
        rewrite(model, plan, example_inputs=torch.zeros_like(x))
    assert caught.value.layer == layer
    assert caught.value.hint
    assert f"layer {layer}" in str(caught.value) or layer == 5
    assert rewrite(model, plan, example_inputs=x, validate=False)


PLANS: dict[str, tuple[str, dict[str, Any]]] = {
    "returns": ("2(50%)+4", {}),
    "never-returns": ("1,3(30%,40%)", {}),
    "stages": ("1,3(30%,40%)+4", {}),
    "before-the-norm": ("2(50%)+5", {}),
    "block": ("1,2(30%,40%)+4", {"cut": "block"}),
    "block-never-returns": ("2,4(30%,40%)", {"cut": "block"}),
    "block-at-once": ("2(50%)+3", {"cut": "block"}),
    "fused": ("1,2,3(50%,50%,50%)+4+fused", {}),
    "fused-never-returns": ("1,2,3(50%,50%,50%)+fused", {}),
    "aligned": ("2(50%)+4", {"multiple_of": 4}),
    "random": ("2(50%)+4", {"score": "random"}),
    "function": ("1,2(50%,50%)+4", {"score": lambda patches: patches.square().sum(-1)}),
    "train-only": ("2(50%)+4", {"train_only": True}),
    "all-rows": ("2(50%)+4", {"eliminate_dead_tokens": False}),
}


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.slow
def test_every_kind_of_plan(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """It passes as it is, and does not where the wrong rows are kept."""
    plan, options = PLANS[name]
    model = odd()
    fast = rewrite(model, plan, **options)
    assert 0 <= found(fast) < 1e-5
    monkeypatch.setattr(Keep, "on_tokens", _off_by_one)
    with pytest.raises(ValidationError):
        rewrite(model, plan, **options)


NEED_POSITIONS = {"rope-mixed", "relpos-mlp", "beit"}


@pytest.mark.parametrize("plan", ["", "2(0%)+4", "2(0%)"])
@pytest.mark.slow
def test_a_plan_that_drops_nothing(plan: str) -> None:
    assert found(rewrite(odd(), plan)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize(
    "family",
    ["dinov2-reg4", "cait", "siglip-map", "naflex-map", "rope-mixed", "relpos-mlp", "beit"],
)
def test_every_kind_of_plan_on_other_families(family: str, name: str) -> None:
    plan, options = PLANS[name]
    model, x = BY_NAME[family].build(), BY_NAME[family].input()
    if "fused" in name and family in NEED_POSITIONS:
        with pytest.raises(skipvit_fx.UnsupportedModelError, match="fused token has no position"):
            rewrite(model, plan, example_inputs=torch.zeros_like(x), **options)
        return
    fast = rewrite(model, plan, example_inputs=torch.zeros_like(x), **options)
    assert found(fast) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["returns", "never-returns"])
def test_sizes_written_out_by_an_export(name: str) -> None:
    plan, options = PLANS[name]
    model, example = HUGGING_FACE[0].build(), {"pixel_values": torch.zeros(2, 3, 64, 64)}
    assert found(rewrite(model, plan, example_inputs=example, frontend="export", **options)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["1,3(30%,40%)+4", "1,3(30%,40%)"])
@pytest.mark.parametrize("encoder", HUGGING_FACE[1:], ids=str)
def test_exported_encoders(encoder: Any, plan: str) -> None:
    example = {"pixel_values": torch.zeros_like(pixels(2))}
    fast = rewrite(encoder.build(), plan, example_inputs=example, frontend="export")
    assert found(fast) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("head", ["grid", "tokens"])
def test_sequence_first_and_dense_outputs(monkeypatch: pytest.MonkeyPatch, head: str) -> None:
    blocks = [Block(SequenceFirst()) for _ in range(3)]
    model = odd(blocks, sequence_first=True) if head == "tokens" else odd(layers=3, head="grid")
    assert found(rewrite(model, "1,2(30%,40%)+3")) < 1e-5
    monkeypatch.setattr(PutBack, "on_tokens", _reversed)
    with pytest.raises(ValidationError) as caught:
        rewrite(model, "1,2(30%,40%)+3")
    assert caught.value.layer == 3


class Taps(nn.Module):
    """Also returns the states after the second and the third layer."""

    def __init__(self) -> None:
        super().__init__()
        self.model = BY_NAME["vit"].build()

    def forward(self, x: Tensor) -> Any:
        return self.model.forward_intermediates(x, indices=[1, 2])


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["1(40%)+4", "1,2(40%,30%)+4+fused"])
def test_filled_taps(monkeypatch: pytest.MonkeyPatch, plan: str) -> None:
    model, example = Taps().eval(), torch.zeros(2, 3, 64, 96)
    assert found(rewrite(model, plan, example_inputs=example, fill_taps=True)) < 1e-5
    monkeypatch.setattr(PutBack, "on_tokens", _reversed)
    with pytest.raises(ValidationError):
        rewrite(model, plan, example_inputs=example, fill_taps=True)


# -- the capture ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_wrong_capture_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph subtracts where the author adds."""
    capture = opening.capture

    def wrong(*args: Any, **options: Any) -> Any:
        captured = capture(*args, **options)
        graph = captured.module.graph
        sums = [n for n in graph.nodes if n.target is operator.add and "blocks" in str(n.args)]
        sums[4].target = operator.sub  # behind the attention of layer 3
        return captured

    monkeypatch.setattr(opening, "capture", wrong)
    with pytest.raises(ValidationError, match="the captured graph does not compute") as caught:
        rewrite(odd(), "1(50%)+4")
    assert caught.value.layer == 3
    assert caught.value.modules == ("blocks.2", "blocks.2.norm2")


class OneAtATime(Odd):
    """Cannot take one image alone."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] == 1:
            raise ValueError("one image is not enough")
        return super().forward(x)


@pytest.mark.slow
def test_an_author_who_fails_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = scramble(OneAtATime([Block(), Block()])).eval()
    with pytest.raises(ValidationError, match="one image is not enough") as caught:
        rewrite(model, "1(50%)+2")
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.slow
def test_a_leaf_that_fails_is_quoted() -> None:
    class Strict(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            if not is_fake(x) and bool((x.abs() > 1e-3).any()):
                raise ValueError("too large")
            return super().forward(x)

    model = odd([Block(mlp=Strict()) for _ in range(2)])
    with pytest.raises(ValidationError, match="too large") as caught:
        rewrite(model, "1(50%)+2")
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.slow
def test_a_mistake_of_our_own_is_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise KeyError("ours")

    for owner, name in (
        (validation, "_place"),
        (validation, "sets_of_images"),
        (reference, "_rows"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, broken)
            with pytest.raises(KeyError, match="ours"):
                rewrite(odd(layers=2), "1(50%)+2")


# -- nothing is left behind -------------------------------------------------------------------------------------------


class Busy(nn.Module):
    """Writes into itself, and draws, whenever it runs, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.norm = nn.BatchNorm2d(DIM)
        self.calls = 0
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.count += 1
        if not is_fake(x):
            self.last = x
        drawn = float(torch.rand(())) if not is_fake(x) else 0.0
        y: Tensor = self.norm(x) + drawn + random.random() + float(np.random.rand())
        return y


def busy() -> Odd:
    """A model whose embedding is."""
    model = Odd([Block(), Block()])
    model.embed = nn.Sequential(model.embed, Busy())  # type: ignore[assignment]
    scramble(model)
    return model


def _state(model: nn.Module) -> dict[str, Any]:
    """All that may not change: tensors by value, everything else as it is."""
    state: dict[str, Any] = {}
    for path, module in model.named_modules():
        state[f"{path}.training"] = module.training
        state[f"{path}.hooks"] = len(module._forward_hooks) + len(module._forward_pre_hooks)
        if isinstance(module, Busy):
            state[f"{path}.attributes"] = (module.calls, module.last)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        state[name] = (tensor.detach().clone(), tensor.requires_grad, tensor.grad)
    return state


def _assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for name, value in before.items():
        if isinstance(value, tuple) and isinstance(value[0], Tensor):
            assert torch.equal(value[0], after[name][0]), name
            assert value[1] == after[name][1], name
            assert value[2] is after[name][2], name
        else:
            assert value == after[name], name


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_nothing_is_left_behind(training: bool) -> None:
    model = busy().train(training)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    seen: list[int] = []
    model.blocks[0].mlp.register_forward_hook(lambda *_: seen.append(1) and None)
    before = _state(model)
    states = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())
    off = rewrite(model, "1(50%)+2", validate=False)
    without = _state(off)
    seen.clear()
    fast = rewrite(model, "1(50%)+2")
    assert len(seen) >= 4, "hooks run, since they may be part of what a module computes"
    now = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())
    assert torch.equal(states[0], now[0])
    assert states[1:] == now[1:]
    assert found(fast) < 1e-5
    _assert_same(before, _state(model))
    _assert_same(without, _state(fast))
    assert fast.training is training
    assert all(p is q for p, q in zip(model.parameters(), fast.parameters(), strict=True))
    assert all(b is c for b, c in zip(model.buffers(), fast.buffers(), strict=True))


@pytest.mark.slow
def test_under_autocast_and_inference_mode() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert found(rewrite(odd(layers=2), "1(50%)+2")) < 1e-5
    with torch.inference_mode():
        assert found(rewrite(odd(layers=2), "1(50%)+2")) < 1e-5
    assert torch.is_grad_enabled()


@pytest.mark.slow
def test_what_is_drawn_under_a_drop_cannot_agree() -> None:
    class Noisy(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.rand_like(x)

    model = odd([Block(), Block(mlp=Noisy()), Block()])
    with pytest.raises(ValidationError, match="draws random numbers in eval mode") as caught:
        rewrite(model, "1(50%)+3")
    assert caught.value.layer == 2
    assert found(rewrite(model, "3(50%)+4")) < 1e-5


# -- costs ------------------------------------------------------------------------------------------------------------


def _counted(monkeypatch: pytest.MonkeyPatch, model: nn.Module, plan: str) -> tuple[int, list[int]]:
    """Operations of a validation, and the samples of each call of the first layer's MLP."""
    flops, samples = [], []
    validate = api.validate_rewrite

    def counted(*args: Any) -> str:
        samples.clear()
        with FlopCounterMode(display=False) as counter:
            text = validate(*args)
        flops.append(counter.get_total_flops())
        return text

    model.blocks[0].mlp.register_forward_hook(lambda m, given, out: samples.append(out.shape[0]))  # type: ignore[index, union-attr]
    monkeypatch.setattr(api, "validate_rewrite", counted)
    rewrite(model, plan)
    return flops[-1], samples


@pytest.mark.parametrize("plan", ["1(50%)+4", "2(50%)", ""])
@pytest.mark.slow
def test_it_costs_three_forward_passes_at_most(monkeypatch: pytest.MonkeyPatch, plan: str) -> None:
    model = odd()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image(2))
    flops, samples = _counted(monkeypatch, model, plan)
    assert 0 < flops <= 3 * counter.get_total_flops()
    assert samples == [1, 1, 2, 2]


# -- where it is not done, and what is said --------------------------------------------------------------------------


@pytest.mark.slow
def test_it_is_said_whether_it_was_done(tmp_path: Path) -> None:
    model = odd(layers=2)
    fast, unchecked = rewrite(model, "1(50%)+2"), rewrite(model, "1(50%)+2", validate=False)
    assert skipvit_fx.inspect(fast).validated in str(skipvit_fx.inspect(fast))
    assert "e-0" not in skipvit_fx.inspect(fast).validated
    report = skipvit_fx.inspect(unchecked)
    assert report.validated == report.to_dict()["validated"] == "not validated (validate=False)"
    assert report.validated in str(report)
    skipvit_fx.save(fast, tmp_path / "fast.safetensors")
    again = skipvit_fx.load(tmp_path / "fast.safetensors", odd(layers=2))
    assert found(again) < 1e-5
    again = skipvit_fx.load(tmp_path / "fast.safetensors", odd(layers=2), validate=False)
    assert skipvit_fx.inspect(again).validated == "not validated (validate=False)"


@pytest.mark.slow
def test_the_command_line_leaves_it_out_on_request() -> None:
    command = ["rewrite", "vit_tiny_patch16_224", "1(50%)", "--img-size", "32", "--depth", "1"]
    for option, said in (
        ([], "validated: largest"),
        (["--no-validate"], "not validated (validate"),
    ):
        result = CliRunner().invoke(app, [*command, *option])
        assert result.exit_code == 0, result.output
        assert said in result.output


@pytest.mark.slow
def test_nothing_is_run_on_the_meta_device() -> None:
    model = odd(layers=2).to("meta")
    fast = rewrite(model, "1(50%)+2", example_inputs=EXAMPLE.to("meta"))
    assert skipvit_fx.inspect(fast).validated == "not validated (meta device)"


def test_an_error_is_a_sentence_to_a_person(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Keep, "on_tokens", _off_by_one)
    with pytest.raises(ValidationError) as caught:
        rewrite(odd(layers=3), "2(50%)+3")
    error = caught.value
    assert isinstance(error, skipvit_fx.SkipViTError)
    assert "with the same tokens masked" in str(error)
    assert "they first differ in layer 2, at blocks.1.norm2" in str(error)
    assert short(error.difference) in str(error)
    assert error.difference > 1e-2
    assert error.modules == ("blocks.1.norm2",)
    assert "validate=False" in error.hint


# -- images, tolerances, differences --------------------------------------------------------------------------------


def test_images_are_random_unless_the_example_holds_two() -> None:
    (both,), (first,), (many,) = (
        images[0] for images in sets_of_images((torch.zeros(3, 2, 4, 4),), {})
    )
    assert torch.equal(many, both[[0, 1, 0]])
    assert both.shape == (2, 2, 4, 4)
    assert both.std() > 0.5
    assert not torch.equal(both[0], both[1])
    assert torch.equal(first, both[:1])
    own = torch.stack([image(1)[0], image(1)[0], image(1, seed=2)[0]])
    (both,), _ = sets_of_images((own,), {})[0]
    assert torch.equal(both, own[[0, 2]])
    (both,), _ = sets_of_images((own[:1],), {})[0]
    assert torch.equal(both[0], own[0])
    assert torch.equal(both[1].flatten(), own[0].flatten().flip(0))
    (again,), _ = sets_of_images((torch.zeros(3, 2, 4, 4),), {})[0]
    assert torch.equal(again, sets_of_images((torch.zeros(3, 2, 4, 4),), {})[0][0][0])


def test_what_is_no_picture_keeps_its_values() -> None:
    masks, scale = torch.tensor([[1, 0], [0, 1], [1, 1]]), torch.ones(3, 7)
    table, sizes = torch.zeros(5, 2), [3, 4]
    example = (torch.zeros(3, 2, 4, 4), masks), {"scale": scale, "table": table, "sizes": sizes}
    (args, kwargs), (alone, _), _ = sets_of_images(*example)
    assert torch.equal(args[1], masks[:2])
    assert torch.equal(alone[1], masks[:1])
    assert torch.equal(kwargs["scale"], scale[:2])
    assert torch.equal(kwargs["table"], table)
    assert kwargs["sizes"] == sizes


def test_tolerances() -> None:
    single, half = torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16)
    assert tolerance([single, single.double()]) == TOLERANCE
    assert 0.05 < tolerance([single, half]) < 0.2
    assert 1e-3 < tolerance([half.half()]) < 0.05
    allowed = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [backend.fp32_precision for backend in allowed]
    try:
        allowed[0].fp32_precision = "tf32"
        assert 1e-3 < tolerance([single]) < 0.05
        allowed[1].fp32_precision = "bf16"
        assert 0.05 < tolerance([single]) < 0.2
    finally:
        for backend, precision in zip(allowed, before, strict=True):
            backend.fp32_precision = precision
    assert tolerance([single]) == TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    model, example = odd(layers=3).to(dtype), EXAMPLE.to(dtype)
    assert found(rewrite(model, "1,2(30%,40%)+3", example_inputs=example)) < 0.05
    monkeypatch.setattr(Keep, "on_tokens", _off_by_one)
    with pytest.raises(ValidationError):
        rewrite(model, "1,2(30%,40%)+3", example_inputs=example)


@pytest.mark.slow
def test_infinite_values_at_the_same_places_are_equal() -> None:
    class Logarithm(Odd):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu().log()

    model = scramble(Logarithm([Block(), Block()])).eval()
    assert found(rewrite(model, "1(50%)+2")) < 1e-4


@dataclasses.dataclass
class Result:
    """What some models return."""

    value: Tensor
    name: str


def test_differences() -> None:
    one = torch.ones(3)
    odd_ones = torch.tensor([1.0, math.inf, math.nan])
    assert relative_error(odd_ones, torch.tensor([1.5, math.nan, math.inf])) == pytest.approx(1 / 3)
    assert math.isnan(relative_error(odd_ones, one))
    assert math.isnan(relative_error(one, odd_ones))
    assert relative_error(odd_ones[1:], odd_ones[1:]) == 0
    assert relative_error(torch.tensor([1, 2]), torch.tensor([1, 4])) == 0.5
    assert relative_error(torch.tensor([True]), torch.tensor([False])) > 1
    assert relative_error(Result(one, "a"), Result(one * 2, "a")) == 0.5
    for got, wanted in ((Result(one, "a"), Result(one, "b")), (1, 2), (None, 3.0)):
        with pytest.raises(ValueError, match=r"expected .*, got"):
            relative_error(got, wanted)


def test_the_old_name_is_gone() -> None:
    with pytest.raises(TypeError, match="verify"):
        rewrite(odd(), "1(50%)+4", verify=True)
    assert not hasattr(api, "_verify")
