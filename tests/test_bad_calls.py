"""Bad calls, of everything that is public: what is said, and that nothing is left half done.

Each case is a call and what its error must say: what is wrong (with the value), and what to do about it.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import warnings
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import skipvit_fx as sv
from skipvit_fx.cli.app import app
from skipvit_fx.errors import (
    ExportError,
    NotRewrittenError,
    PlanError,
    SavedModelError,
    SkipViTError,
    TraceError,
    UnsupportedModelError,
)
from skipvit_fx.ops.switch import Switchable
from skipvit_fx.plan import Plan, Span, Stage
from support.commands import share_rewrites
from support.models import PlainMLP, scramble

pytestmark = pytest.mark.every_case

PLAN = "1(50%)+3"
Call = Callable[["World"], Any]
Bad = tuple[str, Call, type[Exception], tuple[str, ...]]


def vit() -> nn.Module:
    """Three layers, 16 patches."""
    options: dict[str, Any] = {
        "img_size": 32,
        "patch_size": 8,
        "depth": 3,
        "embed_dim": 24,
        "num_heads": 2,
    }
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", num_classes=5, **options)
    return scramble(model).eval()


class World:
    """What the calls are made on: made once, and found unchanged after every call."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = vit()
        self.fast = sv.rewrite(self.model, PLAN)
        self.x = torch.randn(2, 3, 32, 32)
        self.saved = folder / "saved.safetensors"
        sv.save(self.fast, self.saved)
        (folder / "text.txt").write_text("no model")
        (folder / "empty").write_bytes(b"")
        (folder / "half").write_bytes(self.saved.read_bytes()[:2000])
        safetensors.torch.save_file({"a": torch.zeros(1)}, folder / "weights")
        weights = safetensors.torch.load_file(self.saved)
        for name, header in (
            ("damaged", "{"),
            ("lacking", "{}"),
            ("newer", json.dumps({"format": 99})),
        ):
            safetensors.torch.save_file(weights, folder / name, metadata={"skipvit": header})
        (folder / "model.onnx").write_bytes(b"\x00\x01 no protobuf")
        (folder / "closed").mkdir()
        self.before = self.state()

    def changes(self) -> list[str]:
        """What has changed."""
        now = self.state()
        names = [*self.before, *(name for name in now if name not in self.before)]
        return [name for name in names if now.get(name) != self.before.get(name)]

    def restore(self) -> None:
        """Put files and switches back."""
        for name in self.changes():
            if name.startswith(str(self.folder)):
                Path(name).unlink()
        for module in self.fast.modules():
            if isinstance(module, Switchable):
                module.enabled, module.train_only = True, False

    def path(self, name: str) -> str:
        """A file in the folder."""
        return str(self.folder / name)

    def state(self) -> dict[str, Any]:
        """All that a call could leave changed, by name: files, weights, modes, hooks, switches."""
        found: dict[str, Any] = {str(p): p.stat().st_size for p in self.folder.rglob("*")}
        for owner, of in (("model", self.model), ("fast", self.fast)):
            for name, m in of.named_modules():
                hooks = len(m._forward_hooks), len(m._forward_pre_hooks)
                switches = getattr(m, "enabled", None), getattr(m, "train_only", None)
                found[f"{owner}: {name}"] = (type(m), m.training, hooks, switches)
        for name, value in self.model.state_dict().items():
            found[f"weights: {name}"] = float(value.double().sum())
        return found | {"gradients": torch.is_grad_enabled()}


@pytest.fixture(scope="module")
def shared_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("bad"))


@pytest.fixture
def world(shared_world: World) -> Iterator[World]:
    yield shared_world
    shared_world.restore()  # so that one failure is not that of all tests after it


def rewriting(**options: Any) -> Call:
    return lambda w: sv.rewrite(w.model, PLAN, **options)


def on(make: Callable[[], Any], **options: Any) -> Call:
    """A rewrite of another model."""
    return lambda w: sv.rewrite(make(), PLAN, **{"example_inputs": w.x, **options})


def example(make: Callable[[World], Any]) -> Call:
    return lambda w: sv.rewrite(w.model, PLAN, example_inputs=make(w))


def parsed(text: Any) -> Call:
    return lambda w: Plan.parse(text)


# -- plans ----------------------------------------------------------------------------------------------------------

# fmt: off
NOTATION: list[tuple[Any, tuple[str, ...]]] = [
    (None, ("a plan's notation must be a string", "6(55%)+11")),
    (6, ("a plan's notation must be a string", "6")),
    (b"6(55%)", ("a plan's notation must be a string",)),
    (["6(55%)"], ("a plan's notation must be a string",)),
    ("6", ("expected '('", "character 2", "write it like")),
    ("6(55%", ("expected ')'", "character 6", "write it like")),
    ("6)55%(", ("expected '('", "character 2", "write it like")),
    ("6(55%)+11)", ("semicolon or the end", "character 10", "write it like")),
    ("((6(55%)", ("expected a layer number", "character 1", "write it like")),
    ("6(0.55)", ("0.55 is neither a percentage nor a number", "percent sign")),
    ("6()", ("expected an amount", "character 3")),
    ("6(%)", ("expected an amount", "character 3")),
    ("6(-5%)", ("-5%", "less than 1")),
    ("6(100%)", ("outside [0, 1)", "less than 1")),
    ("6(1e3%)", ("expected ')'", "character 4")),
    ("6(nan%)", ("expected an amount", "character 3")),
    ("6(inf%)", ("expected an amount", "character 3")),
    ("6(1/0%)", ("1/0%", "less than 1")),
    ("6(\uff15\uff15%)", ("expected an amount", "character 3")),
    ("6(55%%)", ("expected ')'", "character 6")),
    ("(55%)", ("expected a layer number", "character 1")),
    ("x(55%)", ("expected a layer number", "character 1")),
    ("\uff16(55%)", ("expected a layer number", "character 1")),
    ("²(55%)", ("expected a layer number", "character 1")),
    ("1_0(55%)", ("expected '('", "character 2")),
    ("6.0(55%)", ("expected '('", "character 2")),
    ("99999999999999999999(5%)", ("expected '('", "character 10")),
    ("-6(55%)", ("expected a layer number", "character 1")),
    ("4,,7(5%,5%,5%)", ("expected a layer number", "character 3")),
    ("4,7(5%,5%,5%)", ("3 amounts for 2 layers", "one for each")),
    ("5-3(5%)", ("the range ends before it begins", "lower layer first")),
    ("4(5%);6(5%)", ("never returns", "join the two")),
    ("4(5%)+7;6(5%)", ("before those of 4(5%)+7 return", "begin at layer 7 or later")),
    ("7,4(5%,5%)", ("layer 4 comes after layer 7", "ascending order")),
    ("4,4(5%,5%)", ("layer 4 is repeated", "once")),
    ("6(55%)+6", ("return at layer 6", "return at layer 7 or later")),
    ("6(55%)+", ("expected fused", "+LAYER")),
    ("6(55%)+x", ("expected fused", "+LAYER")),
    ("6(55%)11", ("character 7", "write it like")),
    ("6(55%)+fused+11", ("character 13", "write it like")),
    ("6(55%)+8+11", ("expected fused", "+LAYER")),
    ("6(55%)+melted", ("expected fused", "+LAYER")),
]
# fmt: on

# fmt: off
STAGES: list[Bad] = [
    ("stage-text", lambda w: Stage("6", 0.5), PlanError, ("layer '6' is not an integer", "1, 2, 3")),
    ("stage-bool", lambda w: Stage(True, 0.5), PlanError, ("layer True is not an integer",)),
    ("stage-float", lambda w: Stage(6.0, 0.5), PlanError, ("layer 6.0 is not an integer",)),
    ("stage-below", lambda w: Stage(-1, 0.5), PlanError, ("layer -1 is out of range", "count from 1")),
    ("ratio-none", lambda w: Stage(6, None), PlanError, ("amount None", "less than 1")),
    ("ratio-nan", lambda w: Stage(6, float("nan")), PlanError, ("nan", "less than 1")),
    ("ratio-inf", lambda w: Stage(6, float("inf")), PlanError, ("inf", "less than 1")),
    ("ratio-one", lambda w: Stage(6, 1.0), PlanError, ("outside [0, 1)", "less than 1")),
    ("ratio-over", lambda w: Stage(6, Fraction(7, 3)), PlanError, ("7/3", "less than 1")),
    ("ratio-bool", lambda w: Stage(6, True), PlanError, ("amount True", "less than 1")),
    ("ratio-list", lambda w: Stage(6, [0.5]), PlanError, ("amount [0.5]", "less than 1")),
    ("ratio-tensor", lambda w: Stage(6, torch.tensor(0.5)), PlanError, ("amount", "less than 1")),
    ("ratio-complex", lambda w: Stage(6, 0.5j), PlanError, ("amount", "less than 1")),
    ("span-list", lambda w: Span([Stage(6, 0.5)]), PlanError, ("stages of a span", "Plan.parse")),
    ("span-numbers", lambda w: Span((6, 7)), PlanError, ("tuple of one or more Stage",)),
    ("span-empty", lambda w: Span(()), PlanError, ("tuple of one or more Stage",)),
    ("span-fused", lambda w: Span((Stage(6, 0.5),), None, 1), PlanError, ("fused must be True or False",)),
    ("span-back", lambda w: Span((Stage(6, 0.5),), "7"), PlanError, ("return layer '7' is not an integer",)),
    ("plan-stages", lambda w: Plan((Stage(6, 0.5),)), PlanError, ("spans of a plan", "Span((Stage")),
]
# fmt: on

# -- rewrite --------------------------------------------------------------------------------------------------------


class Sized(nn.Module):
    """Takes an image and a size."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = vit()

    def forward(self, image: Tensor, size: int) -> Tensor:
        return self.vit(image) * size


def _frozen_fields() -> nn.Module:
    model = vit()
    model.skipvit = nn.Identity()
    return model


def _without_parameters() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.ReLU())


def _scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.jit, deprecated
        module: nn.Module = torch.jit.trace(PlainMLP(), torch.zeros(1, 3, 32, 32))
    return module


def _hooked() -> nn.Module:
    model = vit()
    model.blocks[0].register_forward_hook(print)
    return model


def _patched() -> nn.Module:
    model = vit()
    model.forward = lambda image: image
    return model


def _raising() -> nn.Module:
    class Raises(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("the author's own bug")

    return Raises()


# fmt: off
REWRITES: list[Bad] = [
    ("plan-none", lambda w: sv.rewrite(w.model, None), PlanError, ("plan", "None", "6(55%)+11")),
    ("plan-number", lambda w: sv.rewrite(w.model, 6), PlanError, ("plan", "6", "6(55%)+11")),
    ("plan-stage", lambda w: sv.rewrite(w.model, Stage(1, 0.5)), PlanError, ("plan", "Stage", "6(55%)+11")),
    ("too-deep", lambda w: sv.rewrite(w.model, "4(50%)"),
     PlanError, ("layer 4 is out of range: the model has 3", "1 to 3")),
    ("back-too-deep", lambda w: sv.rewrite(w.model, "1(50%)+5"), PlanError, ("return layer 5", "layer 4")),
    ("huge-layer", lambda w: sv.rewrite(w.model, "999999999(50%)"), PlanError, ("layer 999999999", "1 to 3")),
    ("missing-plan", lambda w: sv.rewrite(w.model), TypeError, ("plan",)),
    ("unknown-option", rewriting(speed=9), TypeError, ("speed",)),
    ("frontend-unknown", rewriting(frontend="dynamo"), PlanError, ("frontend", "'dynamo'", "'symbolic'")),
    ("frontend-none", rewriting(frontend=None), PlanError, ("frontend", "None", "'symbolic'")),
    ("frontend-list", rewriting(frontend=["auto"]), PlanError, ("frontend", "['auto']", "'symbolic'")),
    ("cut-unknown", rewriting(cut="mlp"), PlanError, ("cut", "'mlp'", "'block'")),
    ("cut-number", rewriting(cut=1), PlanError, ("cut", "1", "'block'")),
    ("cut-case", rewriting(cut="Attention"), PlanError, ("cut", "'Attention'", "'attention'")),
    ("score-unknown", rewriting(score="best"), PlanError, ("score", "'best'", "'mean'")),
    ("score-none", rewriting(score=None), PlanError, ("score", "None", "'mean'")),
    ("score-list", rewriting(score=["mean"]), PlanError, ("score", "'mean'", "register_score")),
    ("score-asks", rewriting(score=lambda tokens, heads: tokens),
     PlanError, ("asks for 'heads'", "keys, queries, values, attention")),
    ("score-number", rewriting(score=0.5), PlanError, ("score", "0.5", "'mean'")),
    ("score-tensor", rewriting(score=torch.zeros(16)), PlanError, ("score", "'mean'")),
    ("multiple-zero", rewriting(multiple_of=0), PlanError, ("multiple_of", "0", "1")),
    ("multiple-negative", rewriting(multiple_of=-8), PlanError, ("multiple_of", "-8")),
    ("multiple-bool", rewriting(multiple_of=True), PlanError, ("multiple_of", "True")),
    ("multiple-float", rewriting(multiple_of=8.0), PlanError, ("multiple_of", "8.0")),
    ("multiple-text", rewriting(multiple_of="8"), PlanError, ("multiple_of", "'8'")),
    ("multiple-none", rewriting(multiple_of=None), PlanError, ("multiple_of", "None")),
    ("prefix-negative", rewriting(prefix_tokens=-1), PlanError, ("prefix_tokens", "-1", "0 or more")),
    ("prefix-bool", rewriting(prefix_tokens=True), PlanError, ("prefix_tokens", "True")),
    ("prefix-text", rewriting(prefix_tokens="1"), PlanError, ("prefix_tokens", "'1'")),
    ("prefix-float", rewriting(prefix_tokens=1.0), PlanError, ("prefix_tokens", "1.0")),
    ("prefix-all", rewriting(prefix_tokens=17),
     UnsupportedModelError, ("prefix_tokens=17 leaves no patch", "class")),
    ("prefix-huge", rewriting(prefix_tokens=10**9), UnsupportedModelError, ("leaves no patch",)),
    ("fill-taps-text", rewriting(fill_taps="no"), PlanError, ("fill_taps", "'no'", "True or False")),
    ("fill-taps-none", rewriting(fill_taps=None), PlanError, ("fill_taps", "None")),
    ("eliminate-number", rewriting(eliminate_dead_tokens=2), PlanError, ("eliminate_dead_tokens", "2")),
    ("train-only-text", rewriting(train_only="False"), PlanError, ("train_only", "'False'")),
    ("score-shape", lambda w: sv.rewrite(w.model, PLAN, score=lambda t: t)(w.x),
     ValueError, ("score function", "shape")),
    ("model-none", lambda w: sv.rewrite(None, PLAN), TypeError, ("NoneType", "torch.nn.Module")),
    ("model-text", lambda w: sv.rewrite("vit_tiny", PLAN), TypeError, ("str", "torch.nn.Module")),
    ("model-class", lambda w: sv.rewrite(nn.Identity, PLAN),
     TypeError, ("class Identity", "torch.nn.Module")),
    ("model-function", lambda w: sv.rewrite(torch.relu, PLAN), TypeError, ("builtin", "torch.nn.Module")),
    ("model-state", lambda w: sv.rewrite(w.model.state_dict(), PLAN), TypeError, ("Dict", "torch.nn.Module")),
    ("model-twice", lambda w: sv.rewrite(w.fast, PLAN),
     UnsupportedModelError, ("already rewritten", "original")),
    ("model-inside", lambda w: sv.rewrite(nn.Sequential(w.fast), PLAN, example_inputs=w.x),
     UnsupportedModelError, ("already rewritten",)),
    ("no-attention", on(PlainMLP), UnsupportedModelError, ("no attention", "find_attention")),
    ("no-parameters", on(_without_parameters), UnsupportedModelError, ("no attention", "find_attention")),
    ("no-module-inside", on(nn.Identity), UnsupportedModelError, ("no attention", "find_attention")),
    ("empty-sequential", on(nn.Sequential), UnsupportedModelError, ("no attention", "find_attention")),
    ("no-forward", on(nn.Module), TraceError, ("forward",)),
    ("scripted", on(_scripted), TraceError, ("TorchScript", "as its author wrote it")),
    ("compiled", on(lambda: torch.compile(vit())), TraceError, ("compile", "what rewrite returns")),
    ("hooked", on(_hooked), TraceError, ("hook", "blocks.0")),
    ("patched", on(_patched), TraceError, ("forward",)),
    ("taken-name", on(_frozen_fields), TraceError, ("skipvit", "child")),
    ("raises", on(_raising), TraceError, ("author's own bug", "example_inputs")),
    ("no-size", lambda w: sv.rewrite(PlainMLP(), PLAN),
     TraceError, ("names no image size", "example_inputs=")),
    ("half-call", lambda w: sv.rewrite(Sized(), PLAN, example_inputs=w.x),
     TraceError, ("size", "example_inputs")),
]
# fmt: on

# fmt: off
EXAMPLES: list[Bad] = [
    ("example-number", example(lambda w: 32), TypeError, ("example_inputs", "int", "tensor, a tuple")),
    ("example-text", example(lambda w: "image.png"), TypeError, ("example_inputs", "str", "tensor, a tuple")),
    ("example-module", example(lambda w: w.model), TypeError, ("example_inputs", "tensor, a tuple")),
    ("example-numpy", example(lambda w: w.x.numpy()),
     TypeError, ("example_inputs", "ndarray", "tensor, a tuple")),
    ("example-set", example(lambda w: {1, 2}), TypeError, ("example_inputs", "set", "tensor, a tuple")),
    ("example-size", example(lambda w: w.x.shape[2:]),
     TypeError, ("example_inputs holds no tensor", "batch of images")),
    ("example-empty", example(lambda w: ()),
     TypeError, ("example_inputs holds no tensor", "batch of images")),
    ("example-empty-dict", example(lambda w: {}),
     TypeError, ("example_inputs holds no tensor", "batch of images")),
    ("example-many", example(lambda w: (w.x, w.x, w.x, w.x)),
     TraceError, ("example inputs", "example_inputs")),
    ("example-keys", example(lambda w: {"pixels": w.x}), TraceError, ("pixels", "example_inputs")),
    ("example-no-names", example(lambda w: {1: w.x}), TypeError, ("example_inputs", "1", "names")),
    ("example-none-inside", example(lambda w: (None,)),
     TypeError, ("example_inputs holds no tensor", "(None,)")),
    ("example-three-axes", example(lambda w: w.x[0]), TraceError, ("example inputs", "example_inputs")),
    ("example-channels", example(lambda w: w.x[:, :2]), TraceError, ("example inputs", "example_inputs")),
    ("example-larger", example(lambda w: torch.zeros(2, 3, 64, 64)),
     TraceError, ("example inputs", "example_inputs")),
    ("example-no-images", example(lambda w: w.x[:0]),
     TraceError, ("example_inputs holds no image", "(0, 3, 32, 32)", "at least one")),
    ("example-integers", example(lambda w: w.x.long()), TraceError, ("example inputs", "example_inputs")),
    ("example-half", example(lambda w: w.x.half()), TraceError, ("example inputs", "example_inputs")),
    ("example-double", example(lambda w: w.x.double()), TraceError, ("example inputs", "example_inputs")),
    ("example-device", example(lambda w: w.x.to("meta")), TraceError, ("example inputs", "example_inputs")),
    ("example-sparse", example(lambda w: w.x.to_sparse()), TraceError, ("example inputs", "example_inputs")),
]
# fmt: on

# -- the other calls ------------------------------------------------------------------------------------------------

# fmt: off
OTHERS: list[Bad] = [
    ("set-skipping-model", lambda w: sv.set_skipping(w.model, False),
     NotRewrittenError, ("VisionTransformer", "rewrite")),
    ("set-skipping-none", lambda w: sv.set_skipping(None, False), NotRewrittenError, ("NoneType", "rewrite")),
    ("set-skipping-text", lambda w: sv.set_skipping(w.fast, "off"),
     PlanError, ("on", "'off'", "True or False")),
    ("set-skipping-number", lambda w: sv.set_skipping(w.fast, 2), PlanError, ("on", "2", "True or False")),
    ("set-skipping-half", lambda w: sv.set_skipping(w.fast), TypeError, ("on",)),
    ("trace-model", lambda w: sv.trace_tokens(w.model, w.x), NotRewrittenError, ("not made by", "rewrite")),
    ("trace-none", lambda w: sv.trace_tokens(None, w.x), NotRewrittenError, ("NoneType", "rewrite")),
    ("trace-wrapped", lambda w: sv.trace_tokens(nn.Sequential(w.fast), w.x),
     NotRewrittenError, ("Sequential", "unwrap")),
    ("trace-nothing", lambda w: sv.trace_tokens(w.fast), TypeError, ("x",)),
    ("inspect-model", lambda w: sv.inspect(w.model), NotRewrittenError, ("not made by", "rewrite")),
    ("inspect-none", lambda w: sv.inspect(None), NotRewrittenError, ("NoneType", "rewrite")),
    ("inspect-plan", lambda w: sv.inspect(Plan.parse(PLAN)), NotRewrittenError, ("Plan", "rewrite")),
    ("find-none", lambda w: sv.find_attention(None), TypeError, ("NoneType", "torch.nn.Module")),
    ("find-class", lambda w: sv.find_attention(nn.Identity),
     TypeError, ("class Identity", "torch.nn.Module")),
    ("find-no-size", lambda w: sv.find_attention(PlainMLP()),
     TraceError, ("names no image size", "example_inputs")),
    ("find-shape", lambda w: sv.find_attention(w.model, example_inputs=w.x[0]),
     TraceError, ("example inputs", "example_inputs")),
    ("find-kind", lambda w: sv.find_attention(w.model, example_inputs=3),
     TypeError, ("example_inputs", "int")),
    ("latency-model", lambda w: sv.measure_latency(w.model, w.model, (w.x,)),
     NotRewrittenError, ("not made by", "rewrite")),
    ("latency-none", lambda w: sv.measure_latency(None, w.fast, (w.x,)),
     TypeError, ("NoneType", "torch.nn.Module")),
    ("latency-empty", lambda w: sv.measure_latency(w.model, w.fast, ()),
     SkipViTError, ("0 images", "batch of images")),
    ("latency-rounds", lambda w: sv.measure_latency(w.model, w.fast, (w.x,), rounds=0),
     SkipViTError, ("0 rounds", "at least one")),
    ("latency-text", lambda w: sv.measure_latency(w.model, w.fast, (w.x,), rounds="3"),
     SkipViTError, ("'3' rounds", "at least one")),
    ("latency-text-inputs", lambda w: sv.measure_latency(w.model, w.fast, "x"), TypeError, ("example_inputs", "str")),
    ("latency-none-images", lambda w: sv.measure_latency(w.model, w.fast, (w.x[:0],)),
     SkipViTError, ("0 images",)),
    ("report-model", lambda w: sv.report(w.model, w.x, w.folder / "r.html"),
     NotRewrittenError, ("not made by", "rewrite")),
    ("report-nowhere", lambda w: sv.report(w.fast, w.x, w.folder / "no" / "r.html"),
     sv.ReportError, ("does not exist", "create it")),
    ("report-rounds", lambda w: sv.report(w.fast, w.x, w.folder / "r.html", rounds="3"),
     sv.ReportError, ("'3' rounds", "0 or more")),
    ("report-number", lambda w: sv.report(w.fast, 3, w.folder / "r.html"), TypeError, ("example_inputs", "int")),
    ("report-size", lambda w: sv.report(w.fast, w.x[..., :16], w.folder / "r.html"),
     sv.ReportError, ("another size or kind", "example_inputs")),
    ("schedule-model", lambda w: sv.SkipSchedule(w.model),
     NotRewrittenError, ("VisionTransformer", "rewrite")),
    ("schedule-none", lambda w: sv.SkipSchedule(None), NotRewrittenError, ("NoneType", "rewrite")),
    ("schedule-negative", lambda w: sv.SkipSchedule(w.fast, -1),
     PlanError, ("warmup_epochs", "-1", "at least 0")),
    ("schedule-float", lambda w: sv.SkipSchedule(w.fast, 1.5), PlanError, ("warmup_epochs", "1.5")),
    ("schedule-ramp", lambda w: sv.SkipSchedule(w.fast, 1, ramp_epochs="3"),
     PlanError, ("ramp_epochs", "'3'")),
    ("schedule-train-only", lambda w: sv.SkipSchedule(w.fast, 1, train_only="no"),
     PlanError, ("train_only", "'no'")),
    ("save-model", lambda w: sv.save(w.model, w.path("out")), NotRewrittenError, ("not made by", "rewrite")),
    ("save-folder", lambda w: sv.save(w.fast, w.folder), SavedModelError, ("cannot write", "file")),
    ("save-nowhere", lambda w: sv.save(w.fast, w.path("none/out")),
     SavedModelError, ("cannot write", "directory that exists")),
    ("save-empty", lambda w: sv.save(w.fast, ""), SavedModelError, ("cannot write", "name of a file")),
    ("save-number", lambda w: sv.save(w.fast, 7), TypeError, ("int",)),
    ("save-null", lambda w: sv.save(w.fast, w.path("a\0b")),
     SavedModelError, ("cannot write", "name of a file")),
    ("save-long", lambda w: sv.save(w.fast, w.path("a" * 300)),
     SavedModelError, ("cannot write", "name of a file")),
    ("save-function", lambda w: sv.save(sv.rewrite(w.model, PLAN, score=_norm), w.path("out")),
     SavedModelError, ("score is a function", "state_dict")),
    ("load-missing", lambda w: sv.load(w.path("none"), vit()),
     SavedModelError, ("cannot read", "skipvit_fx.save")),
    ("load-folder", lambda w: sv.load(w.folder, vit()), SavedModelError, ("cannot read", "skipvit_fx.save")),
    ("load-text", lambda w: sv.load(w.path("text.txt"), vit()),
     SavedModelError, ("cannot read", "skipvit_fx.save")),
    ("load-empty", lambda w: sv.load(w.path("empty"), vit()),
     SavedModelError, ("cannot read", "skipvit_fx.save")),
    ("load-half", lambda w: sv.load(w.path("half"), vit()),
     SavedModelError, ("cannot read", "skipvit_fx.save")),
    ("load-weights", lambda w: sv.load(w.path("weights"), vit()),
     SavedModelError, ("holds weights but no plan", "rewrite")),
    ("load-damaged", lambda w: sv.load(w.path("damaged"), vit()),
     SavedModelError, ("damaged", "save the model again")),
    ("load-lacking", lambda w: sv.load(w.path("lacking"), vit()),
     SavedModelError, ("damaged", "save the model again")),
    ("load-newer", lambda w: sv.load(w.path("newer"), vit()), SavedModelError, ("format 99", "version")),
    ("load-other", lambda w: sv.load(w.saved, PlainMLP()),
     SavedModelError, ("not the one that was saved", "build it")),
    ("load-twice", lambda w: sv.load(w.saved, w.fast),
     UnsupportedModelError, ("already rewritten", "original")),
    ("load-meta", lambda w: sv.load(w.saved, vit().to("meta")), SavedModelError, ("meta device", "to_empty")),
    ("load-none", lambda w: sv.load(w.saved, None), TypeError, ("NoneType", "torch.nn.Module")),
    ("load-swapped", lambda w: sv.load(w.model, w.saved), TypeError, ("torch.nn.Module",)),
    ("onnx-target", lambda w: sv.export_onnx(w.fast, w.path("o"), target="tensorrt"),
     ExportError, ("'tensorrt'", "ascend")),
    ("onnx-opset", lambda w: sv.export_onnx(w.fast, w.path("o"), opset=99), ExportError, ("99", "18")),
    ("onnx-opset-text", lambda w: sv.export_onnx(w.fast, w.path("o"), opset="13"),
     ExportError, ("'13'", "18")),
    ("onnx-batch", lambda w: sv.export_onnx(w.fast, w.path("o"), batch=0),
     ExportError, ("batch of 0", "1 or more")),
    ("onnx-batch-text", lambda w: sv.export_onnx(w.fast, w.path("o"), batch="two"),
     ExportError, ("'two'", "dynamic")),
    ("onnx-batch-float", lambda w: sv.export_onnx(w.fast, w.path("o"), batch=1.5),
     ExportError, ("1.5", "1 or more")),
    ("onnx-dynamic", lambda w: sv.export_onnx(w.fast, w.path("o"), target="ascend", batch="dynamic"),
     ExportError, ("'dynamic'", "number")),
    ("onnx-folder", lambda w: sv.export_onnx(w.fast, w.path("none/o")),
     ExportError, ("does not exist", "create it")),
    ("onnx-is-folder", lambda w: sv.export_onnx(w.fast, w.folder),
     ExportError, ("is a folder", "file in it")),
    ("onnx-none", lambda w: sv.export_onnx(None, w.path("o")), TypeError, ("NoneType", "torch.nn.Module")),
    ("onnx-example", lambda w: sv.export_onnx(w.fast, w.path("o"), example_inputs=3),
     TypeError, ("example_inputs", "int")),
    ("onnx-example-shape", lambda w: sv.export_onnx(w.fast, w.path("o"), example_inputs=w.x[0]),
     ExportError, ("example inputs", "example_inputs")),
    ("onnx-example-batch", lambda w: sv.export_onnx(w.fast, w.path("o"), example_inputs=w.x, batch=3),
     ExportError, ("batch=3", "batch of 2", "leave one")),
    ("onnx-no-tensor", lambda w: sv.export_onnx(w.fast, w.path("o"), example_inputs=()),
     ExportError, ("no image", "example_inputs")),
    ("onnx-kept", lambda w: sv.export_onnx(w.model, w.path("o"), expose_kept=True),
     ExportError, ("only a rewritten model", "expose_kept")),
    ("onnx-random", lambda w: sv.export_onnx(_at_random(), w.path("o")),
     ExportError, ("random score", "score='auto'")),
    ("onnx-off", lambda w: sv.export_onnx(_switched_off(w), w.path("o")),
     ExportError, ("switched off", "set_skipping")),
    ("onnx-cann", lambda w: sv.export_onnx(w.fast, w.path("o"), target="ascend", cann="one"),
     ExportError, ("'one'",)),
    ("onnx-soc", lambda w: sv.export_onnx(w.fast, w.path("o"), target="ascend", soc="H100"),
     ExportError, ("'H100'", "Ascend")),
    ("atc-missing", lambda w: sv.atc_check(w.path("none.onnx")), ExportError, ("cannot be read",)),
    ("atc-folder", lambda w: sv.atc_check(w.folder), ExportError, ("cannot be read",)),
    ("atc-text", lambda w: sv.atc_check(w.path("text.txt")),
     ExportError, ("not an ONNX model", "export or download")),
    ("atc-corrupt", lambda w: sv.atc_check(w.path("model.onnx")),
     ExportError, ("not an ONNX model", "export or download")),
    ("atc-empty", lambda w: sv.atc_check(w.path("empty")),
     ExportError, ("does not hold an ONNX model", "export it again")),
    ("atc-cann", lambda w: sv.atc_check(w.path("model.onnx"), cann="next"), ExportError, ("'next'",)),
]
# fmt: on


def _norm(tokens: Tensor) -> Tensor:
    return tokens.norm(dim=-1)


@functools.cache
def _at_random() -> nn.Module:
    return sv.rewrite(vit(), PLAN, score="random")


def _switched_off(w: World) -> nn.Module:
    fast = copy.deepcopy(w.fast)
    sv.set_skipping(fast, False)
    return fast


API = [
    *((f"notation-{text!r}", parsed(text), PlanError, words) for text, words in NOTATION),
    *STAGES,
    *REWRITES,
    *EXAMPLES,
    *OTHERS,
]


def complaint(error: BaseException) -> str:
    """Why an error does not help; empty if it does."""
    text = str(error)
    if isinstance(error, SkipViTError) and not error.hint:
        return "it has no hint"
    for machinery in ("Traceback", "object has no attribute", "_skipvit", "FakeTensor", "<lambda>"):
        if machinery in text:
            return f"it speaks of {machinery!r}"
    return "" if text else "it says nothing"


@pytest.mark.parametrize(
    ("call", "kind", "words"), [bad[1:] for bad in API], ids=[bad[0] for bad in API]
)
def test_bad_call(world: World, call: Call, kind: type[Exception], words: tuple[str, ...]) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - its type is compared below
        call(world)
    assert isinstance(caught.value, kind), repr(caught.value)
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, str(caught.value)
    assert not complaint(caught.value), str(caught.value)
    assert not world.changes()


# -- the command line -----------------------------------------------------------------------------------------------

VIT = "vit_tiny_patch16_224"
SMALL = ("--img-size", "32", "--depth", "2")
PICTURE = str(Path(__file__).parents[1] / "examples" / "images" / "chelsea.png")
BAD_INPUT, REFUSED = 2, 1
Line = tuple[str, tuple[str, ...], int, tuple[str, ...]]
"""Name, arguments (``FOLDER/`` stands for the folder), exit status, and words."""

# fmt: off
LINES: list[Line] = [
    ("command", ("rewritte", VIT), BAD_INPUT, ("rewritte",)),
    ("option", ("rewrite", VIT, PLAN, "--sped", "3"), BAD_INPUT, ("--sped",)),
    ("no-model", ("rewrite",), BAD_INPUT, ("Missing argument 'model'",)),
    ("three-arguments", ("rewrite", VIT, PLAN, "more"), BAD_INPUT, ("more",)),
    ("unknown-model", ("sites", "vit_tny_patch16_224"),
     BAD_INPUT, ("no model 'vit_tny_patch16_224'", "close to it")),
    ("empty-model", ("sites", ""), BAD_INPUT, ("cannot read the model ''", "timm:NAME")),
    ("only-source", ("sites", "timm:"), BAD_INPUT, ("cannot read the model 'timm:'", "timm:NAME")),
    ("unknown-source", ("sites", "keras:vit"), BAD_INPUT, ("cannot read the model 'keras:vit'", "timm:NAME")),
    ("nonsense-model", ("sites", "qqqqqqqqqq"), BAD_INPUT, ("no model 'qqqqqqqqqq'", "hint: ")),
    ("unknown-tag", ("sites", f"{VIT}.no_such_tag", "--pretrained"), BAD_INPUT, ("no_such_tag", "hint: ")),
    ("torchvision-size", ("sites", "torchvision:vit_b_16", "--img-size", "33"),
     BAD_INPUT, ("cannot be built", "leave the option out")),
    ("torchvision-model", ("sites", "torchvision:vit_q"), BAD_INPUT, ("no model 'vit_q'", "hint: ")),
    ("hf-model", ("sites", "hf:vitt"), BAD_INPUT, ("no model 'vitt'", "close to it: vit")),
    ("hf-not-a-model", ("sites", "hf:AutoTokenizer"), BAD_INPUT, ("no model 'AutoTokenizer'", "hint: ")),
    ("open-clip-model", ("sites", "open_clip:ViT"), BAD_INPUT, ("no model 'ViT'", "hint: ")),
    ("own-model-half", ("sites", "module:models"), BAD_INPUT, ("cannot read 'module:models'", "factory")),
    ("own-model-missing", ("sites", "module:no.such:make"), BAD_INPUT, ("cannot be imported", "PYTHONPATH")),
    ("own-factory-missing", ("sites", "module:support.models:no_such"),
     BAD_INPUT, ("cannot be imported", "PYTHONPATH")),
    ("own-factory-number", ("sites", "module:support.models:DEPTH"),
     BAD_INPUT, ("module:support.models:DEPTH", "hint: ")),
    ("own-factory-text", ("sites", "module:support.models:names"),
     BAD_INPUT, ("module:support.models:names", "hint: ")),
    ("img-size-text", ("sites", VIT, "--img-size", "many"), BAD_INPUT, ("--img-size", "integer")),
    ("img-size-zero", ("sites", VIT, "--img-size", "0"),
     BAD_INPUT, ("--img-size", "greater than or equal to 1")),
    ("img-size-negative", ("sites", VIT, "--img-size", "-32"),
     BAD_INPUT, ("--img-size", "greater than or equal to 1")),
    ("depth-zero", ("sites", VIT, "--depth", "0"), BAD_INPUT, ("--depth", "greater than or equal to 1")),
    ("depth-negative", ("sites", VIT, "--depth", "-1"), BAD_INPUT, ("--depth", "greater than or equal to 1")),
    ("depth-unknown", ("sites", "resnet18", "--depth", "3"), BAD_INPUT, ("depth", "leave the option out")),
    ("img-size-unknown", ("sites", "resnet18", "--img-size", "32"),
     BAD_INPUT, ("img_size", "leave the option out")),
    ("prefix-negative", ("sites", VIT, *SMALL, "--prefix-tokens", "-1"),
     BAD_INPUT, ("--prefix-tokens", "greater than or equal to 0")),
    ("prefix-text", ("sites", VIT, *SMALL, "--prefix-tokens", "one"),
     BAD_INPUT, ("--prefix-tokens", "integer")),
    ("no-plan", ("rewrite", VIT), BAD_INPUT, ("PLAN",)),
    ("plan-nonsense", ("rewrite", VIT, "drop some"),
     BAD_INPUT, ("expected a layer number", "6(55%)+11")),
    ("plan-no-percent", ("rewrite", VIT, "1(0.3)+3"), BAD_INPUT, ("0.3 is neither a percentage nor",)),
    ("plan-backwards", ("rewrite", VIT, "3(30%)+1"), BAD_INPUT, ("return at layer 1", "or later")),
    ("plan-too-deep", ("rewrite", VIT, "9(30%)", *SMALL), BAD_INPUT, ("layer 9 is out of range", "1 to 2")),
    ("diff-too-deep", ("rewrite", VIT, "9(30%)", *SMALL, "--diff"), BAD_INPUT, ("layer 9 is out of range", "1 to 2")),
    ("cut", ("rewrite", VIT, PLAN, *SMALL, "--cut", "here"), BAD_INPUT, ("--cut 'here'", "attention, block")),
    ("score", ("rewrite", VIT, PLAN, *SMALL, "--score", "best"), BAD_INPUT, ("--score 'best'", "mean")),
    ("refused", ("rewrite", "resnet18", PLAN), REFUSED, ("no attention", "hint: ")),
    ("refused-sites", ("rewrite", "mixer_s32_224", PLAN), REFUSED, ("error: ", "hint: ")),
    ("refused-json", ("rewrite", "resnet18", PLAN, "--json"), REFUSED, ("error: ", "hint: ")),
    ("save-nowhere", ("rewrite", VIT, "1(50%)", *SMALL, "--save", "FOLDER/none/out"),
     REFUSED, ("cannot write", "directory")),
    ("save-folder", ("rewrite", VIT, "1(50%)", *SMALL, "--save", "FOLDER/closed"),
     REFUSED, ("cannot write", "file")),
    ("trace-missing", ("trace", VIT, "FOLDER/none.png", "1(50%)", *SMALL),
     BAD_INPUT, ("not a readable image", "PNG")),
    ("trace-text", ("trace", VIT, "FOLDER/text.txt", "1(50%)", *SMALL),
     BAD_INPUT, ("not a readable image", "PNG")),
    ("trace-folder", ("trace", VIT, "FOLDER/", "1(50%)", *SMALL), BAD_INPUT, ("not a readable image", "PNG")),
    ("trace-no-image", ("trace", VIT), BAD_INPUT, ("Missing argument 'image'",)),
    ("trace-no-plan", ("trace", VIT, PICTURE), BAD_INPUT, ("PLAN",)),
    ("trace-empty-plan", ("trace", VIT, PICTURE, "", *SMALL), BAD_INPUT, ("drops nothing", "hint: ")),
    ("trace-format", ("trace", VIT, PICTURE, "1(50%)", *SMALL, "--out", "FOLDER/kept.xyz"),
     BAD_INPUT, ("cannot write", ".png")),
    ("trace-out-nowhere", ("trace", VIT, PICTURE, "1(50%)", *SMALL, "--out", "FOLDER/none/k.png"),
     BAD_INPUT, ("cannot write",)),
    ("bench-device", ("bench", VIT, PLAN, "--device", "gpu9"),
     BAD_INPUT, ("'gpu9' cannot be used", "cpu always works")),
    ("bench-meta", ("bench", VIT, PLAN, "--device", "meta"),
     BAD_INPUT, ("'meta' cannot be used", "cpu always works")),
    ("bench-batch", ("bench", VIT, PLAN, "--batch", "0"),
     BAD_INPUT, ("--batch", "greater than or equal to 1")),
    ("bench-rounds", ("bench", VIT, PLAN, "--rounds", "-1"),
     BAD_INPUT, ("--rounds", "greater than or equal to 1")),
    ("bench-npu", ("bench", VIT, PLAN, "--device", "npu"), BAD_INPUT, ("torch-npu", "doctor")),
    ("export-target", ("export", VIT, PLAN, "--target", "tensorrt"),
     BAD_INPUT, ("--target", "tensorrt", "ascend")),
    ("export-opset", ("export", VIT, "1(50%)", *SMALL, "--opset", "99", "-o", "FOLDER/m"),
     BAD_INPUT, ("99", "18")),
    ("export-batch", ("export", VIT, "1(50%)", *SMALL, "--batch", "two", "-o", "FOLDER/m"),
     BAD_INPUT, ("--batch 'two'", "dynamic")),
    ("export-batch-unicode", ("export", VIT, "1(50%)", *SMALL, "--batch", "\uff12", "-o", "FOLDER/m"),
     BAD_INPUT, ("--batch '\uff12'", "dynamic")),
    ("export-batch-zero", ("export", VIT, "1(50%)", *SMALL, "--batch", "0", "-o", "FOLDER/m"),
     BAD_INPUT, ("batch of 0",)),
    ("export-ascend-dynamic",
     ("export", VIT, "1(50%)", *SMALL, "--target", "ascend", "--batch", "dynamic", "-o", "FOLDER/m"),
     BAD_INPUT, ("dynamic", "number")),
    ("export-nowhere", ("export", VIT, "1(50%)", *SMALL, "-o", "FOLDER/none/m"),
     BAD_INPUT, ("does not exist", "create it")),
    ("export-soc", ("export", VIT, "1(50%)", *SMALL, "--target", "ascend", "--soc", "H100", "-o", "FOLDER/m"),
     BAD_INPUT, ("'H100'",)),
    ("atc-missing", ("atc-check", "FOLDER/none.onnx"), BAD_INPUT, ("cannot be read", "hint: ")),
    ("atc-corrupt", ("atc-check", "FOLDER/model.onnx"), BAD_INPUT, ("not an ONNX model", "hint: ")),
    ("atc-fail-on", ("atc-check", "FOLDER/model.onnx", "--fail-on", "all"), BAD_INPUT, ("--fail-on", "all")),
]
# fmt: on


@pytest.mark.parametrize(
    ("arguments", "status", "words"), [line[1:] for line in LINES], ids=[line[0] for line in LINES]
)
def test_bad_line(
    world: World,
    arguments: tuple[str, ...],
    status: int,
    words: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    share_rewrites(monkeypatch)
    given = [argument.replace("FOLDER/", f"{world.folder}{os.sep}") for argument in arguments]
    result = CliRunner(env={"COLUMNS": "300", "NO_COLOR": "1"}).invoke(app, given)
    assert result.exit_code == status, (result.exit_code, result.exception, result.output)
    assert isinstance(result.exception, SystemExit), "an exception that is shown with its traceback"
    assert result.stdout == "" or "--save" in arguments
    assert "Traceback" not in result.stderr
    missing = [word for word in words if word not in result.stderr]
    assert not missing, result.stderr
    assert not world.changes()


# -- the tests themselves -------------------------------------------------------------------------------------------


def test_there_are_two_hundred() -> None:
    names = [case[0] for case in (*API, *LINES)]
    assert len(names) >= 200
    assert len({bad[0] for bad in API}) == len(API)


def test_a_leftover_is_seen(world: World) -> None:
    leftover = world.folder / "leftover"
    leftover.write_text("half")
    assert world.changes() == [str(leftover)]
    leftover.unlink()
    hook = world.model.register_forward_hook(copy.copy)
    assert len(world.changes()) == 1
    hook.remove()
    assert not world.changes()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PlanError("wrong"), "no hint"),
        (TypeError("'NoneType' object has no attribute 'graph'"), "object has no attribute"),
        (ValueError(""), "nothing"),
        (PlanError("wrong", hint="right"), ""),
    ],
)
def test_an_unhelpful_error_is_seen(error: Exception, said: str) -> None:
    assert said in complaint(error) if said else not complaint(error)
