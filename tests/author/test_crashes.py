"""Exceptions of the author's code become refusals that name the line; our own are crashes."""

from __future__ import annotations

import itertools
import logging
import logging.handlers
import random
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from transformers import (
    Qwen2VLConfig,
    Qwen2VLModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

import skipvit_fx
from skipvit_fx.analysis import layers, leaves
from skipvit_fx.analysis.tokens import AxisMode, TokenAnalysis
from skipvit_fx.author import attributes
from skipvit_fx.author.code import AuthorError, author_code
from skipvit_fx.capture import exported, fakes, modes, mutations, symbolic, watch
from skipvit_fx.errors import SkipViTError, TraceError, UnsupportedModelError
from skipvit_fx.graph import inputs
from skipvit_fx.graph.nodes import callee
from skipvit_fx.ops.skip import Keep
from skipvit_fx.reports import macs
from support.checks import rewrite
from support.models import scramble
from support.odd_models import DIM, Block, Odd, image

PLAN = "1(40%)+2"
FRONTENDS = ["symbolic", "export"]
KINDS = [AssertionError, AttributeError, KeyError, NotImplementedError, RuntimeError, TypeError]


def odd(make: Callable[[], nn.Module] = Block, kind: type[Odd] = Odd) -> Odd:
    return scramble(kind([make() for _ in range(2)])).eval()


# -- ours -------------------------------------------------------------------------------------------------------------


class Branches(Block):
    """Asks proxies for values, iterates them and writes them over."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        b, n, _ = list(y.shape)
        if n > 3:
            y = y + torch.zeros(b, n, 1)
        return y


def ours(kind: type[Exception], how: str) -> Callable[..., Any]:
    """A function of this package that has a bug."""
    lines = {
        "raises": "raise kind('ours')",
        "calls torch": "torch.nn.functional.pad(torch.ones(2), (1, 1), mode='ours')",
    }
    module = {"__name__": "skipvit_fx.capture.somewhere", "kind": kind, "torch": torch}
    exec(f"def buggy(*args, **kwargs):\n    {lines[how]}", module)
    function: Callable[..., Any] = module["buggy"]
    return function


def test_a_method_that_a_graph_calls_fails_in_the_authors_place() -> None:
    graph = fx.Graph()
    node = graph.call_method("view", (graph.placeholder("x"), 7))
    with pytest.raises(AuthorError, match="RuntimeError: shape"), author_code():
        callee(node, lambda _: nn.Identity())(torch.ones(3), 7)


PLACES: dict[str, tuple[Any, str, list[str]]] = {
    "a branch": (symbolic.SymbolicTracer, "concrete", ["symbolic"]),
    "an iteration": (symbolic.SymbolicTracer, "iter", ["symbolic"]),
    "an argument": (symbolic.SymbolicTracer, "create_arg", ["symbolic"]),
    "a call": (symbolic.SymbolicTracer, "call_module", ["symbolic"]),
    "a node": (symbolic.SymbolicTracer, "create_node", ["symbolic"]),
    "an attribute": (symbolic.SymbolicTracer, "getattr", ["symbolic"]),
    "a value": (symbolic.SymbolicTracer, "_run", ["symbolic"]),
    "a proxy": (symbolic, "_WitnessedProxy", ["symbolic"]),
    "a placeholder": (symbolic, "parts_of", ["symbolic"]),
    "writes": (symbolic, "refuse_lost_writes", ["symbolic"]),
    "a leaf": (exported, "_LeafCall", ["export"]),
    "a translation": (exported._Translation, "_place_call", ["export"]),
    "a translated leaf": (exported._Translation, "_place_leaf", ["export"]),
    "fakes": (fakes.TracelessFakeMode, "twin", FRONTENDS),
    "inputs": (inputs.Inputs, "taken", FRONTENDS),
    "watching": (watch._Watch, "__torch_dispatch__", FRONTENDS),
    "an operator": (mutations.WatchWrites, "__torch_dispatch__", FRONTENDS),
    "memory": (attributes, "_leaves", FRONTENDS),
    "both modes": (modes._Union, "take_in", FRONTENDS),
    "axes": (AxisMode, "_apply", FRONTENDS),
    "counting": (leaves._Counts, "__torch_dispatch__", ["symbolic"]),
    "facts": (TokenAnalysis, "execute", ["symbolic"]),
    "layers": (layers, "_attended", ["symbolic"]),
    "dropping": (Keep, "forward", ["symbolic"]),
}


@pytest.mark.parametrize(
    ("place", "frontend"),
    [(place, frontend) for place, (_, _, frontends) in PLACES.items() for frontend in frontends],
)
def test_a_bug_of_ours_is_a_crash(
    place: str, frontend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name, _ = PLACES[place]
    kind = KINDS[list(PLACES).index(place) % len(KINDS)]
    for how in ("raises", "calls torch"):
        monkeypatch.setattr(owner, name, ours(kind, how))
        wanted = kind if how == "raises" else NotImplementedError
        with pytest.raises(wanted, match="ours") as caught:
            rewrite(odd(Branches), PLAN, frontend="auto" if frontend == "symbolic" else frontend)
        assert not isinstance(caught.value, SkipViTError)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_bug(kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symbolic.SymbolicTracer, "concrete", ours(kind, "raises"))
    with pytest.raises(kind, match="ours"):
        rewrite(odd(Branches), PLAN)


@pytest.mark.parametrize("place", ["__torch_dispatch__"])
def test_a_bug_in_counting(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = rewrite(odd(), PLAN)
    monkeypatch.setattr(macs._Traffic, place, ours(KeyError, "raises"))
    with pytest.raises(KeyError, match="ours"):
        skipvit_fx.inspect(fast)


# -- the author's -----------------------------------------------------------------------------------------------------


def raises(kind: type[Exception]) -> None:
    raise kind("theirs")


def misuses_torch(x: Any) -> Any:
    return x.reshape(2, 7, 3)


def misses(x: Any) -> Any:
    return x.no_such_thing


def adds(x: Any) -> Any:
    return x + torch.ones(2, 3, 5, 7)


def is_lost(x: Any) -> Any:
    return {"a": 1}["b"]


FAULTS: dict[str, tuple[Callable[[Any], Any], str]] = {
    **{kind.__name__: (lambda x, kind=kind: raises(kind), kind.__name__) for kind in KINDS},
    "a shape": (misuses_torch, "RuntimeError"),
    "an operator": (adds, "RuntimeError"),
    "an attribute": (misses, "AttributeError"),
    "a key": (is_lost, "KeyError"),
    "a warning": (lambda x: warnings.warn("theirs", stacklevel=1), "UserWarning"),
}


def faulty(fault: Callable[[Any], Any], *, leaf: bool, when: Callable[[Any], bool]) -> Odd:
    class Faulty(nn.Linear if leaf else Block):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Any:
            if when(x):
                fault(x)
            return super().forward(x)

    return odd((lambda: Block(mlp=Faulty(DIM, DIM))) if leaf else Faulty)


def always(x: Any) -> bool:
    return True


@pytest.mark.parametrize("leaf", [False, True], ids=["around", "leaf"])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_never_runs(fault: str, leaf: bool) -> None:
    run, name = FAULTS[fault]
    model = faulty(run, leaf=leaf, when=always)
    looks = (
        lambda m: rewrite(m, PLAN),
        lambda m: skipvit_fx.find_attention(m, example_inputs=image()),
    )
    for call in looks:
        with pytest.raises(
            TraceError, match=f"does not run on the example inputs: {name}: .*"
        ) as e:
            call(model)
        assert f"({__file__}:{run.__code__.co_firstlineno + (run.__name__ != '<lambda>')})" in str(
            e.value
        ) or f"({raises.__code__.co_filename}:{raises.__code__.co_firstlineno + 1})" in str(e.value)
        assert e.value.hint


def is_proxy(x: Any) -> bool:
    return isinstance(x, fx.Proxy)


@pytest.mark.parametrize(
    "fault", [f for f in FAULTS if f not in ("a shape", "an operator", "an attribute")]
)
@pytest.mark.slow
def test_what_proxies_cannot_do_the_export_can(fault: str) -> None:
    run, name = FAULTS[fault]
    model = faulty(run, leaf=False, when=is_proxy)
    with pytest.raises(TraceError, match=rf"cannot be followed in eval mode: {name}: .*\.py:\d+\)"):
        rewrite(model, PLAN, frontend="symbolic")
    inspection = skipvit_fx.inspect(rewrite(model, PLAN))
    assert inspection.frontend == "export"
    assert f"eval mode: {name}" in inspection.frontend_reason


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize(
    "kind", [KeyboardInterrupt, SystemExit, MemoryError, torch.OutOfMemoryError]
)
def test_what_is_nobodys_fault(kind: type[BaseException], frontend: str) -> None:
    calls = itertools.count()
    model = faulty(lambda x: raises(kind), leaf=False, when=lambda x: next(calls) > 1)  # type: ignore[arg-type]
    with pytest.raises(kind, match="theirs"):
        rewrite(model, PLAN, frontend=frontend)


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.slow
def test_an_author_may_handle_what_he_raises(frontend: str) -> None:
    class Handles(Block):
        def forward(self, x: Tensor) -> Tensor:
            for fault, _ in FAULTS.values():
                try:
                    fault(x)
                except (ArithmeticError, AssertionError, AttributeError, LookupError, Warning):
                    pass
                except (NotImplementedError, RuntimeError, TypeError):
                    x = x + 0.0
            return super().forward(x)

    fast = rewrite(odd(Handles), PLAN, frontend=frontend)
    assert skipvit_fx.inspect(fast).validated.startswith("validated: ")


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(5, 8), nn.Softmax(-1)),
        nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 2),
        nn.TransformerEncoderLayer(8, 2, 8, batch_first=True),
        nn.Linear(5, 8),
    ],
    ids=lambda model: type(model).__name__,
)
def test_models_of_torch_alone(model: nn.Module) -> None:
    with pytest.raises(TraceError, match=f"^{type(model).__name__} does not run on the example"):
        rewrite(model.eval(), PLAN, torch.ones(2, 3, 7))


# -- copies -----------------------------------------------------------------------------------------------------------


class NoCopy:
    def __deepcopy__(self, memo: Any) -> Any:
        raise ValueError("there is only one of me")


THINGS: dict[str, Callable[[], Any]] = {
    "a lock": threading.Lock,
    "a generator": lambda: (i for i in range(3)),
    "an object": NoCopy,
    "in a list": lambda: [1, {"x": NoCopy()}],
}


@pytest.mark.parametrize("place", ["", "blocks", "blocks.1", "blocks.0.mlp.fc1"])
@pytest.mark.parametrize("thing", THINGS)
def test_what_cannot_be_copied(thing: str, place: str) -> None:
    model = odd()
    model.get_submodule(place).state = THINGS[thing]()
    path = f"{place}.state".removeprefix(".")
    with pytest.raises(TraceError, match=rf"cannot be copied: .*\(attribute '{path}'\)") as caught:
        rewrite(model, PLAN)
    assert "example" not in str(caught.value)
    assert "__deepcopy__" in caught.value.hint


# -- quiet ------------------------------------------------------------------------------------------------------------


class ReadsInTraining(Block):
    """What it computes depends on values, in train mode only: the call that notes modules passes."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        return y * 2 if self.training and bool(y.sum() > 0) else y


def wav2vec2() -> tuple[nn.Module, Any]:
    config = Wav2Vec2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        conv_dim=(16, 16),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        mask_time_prob=0.0,
    )
    return Wav2Vec2Model(config).eval(), {"input_values": torch.randn(2, 800)}


def qwen2_vl() -> tuple[nn.Module, Any]:
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}
    vision = {"embed_dim": 32, "hidden_size": 32, "depth": 2, "num_heads": 2, "patch_size": 4}
    config = Qwen2VLConfig(text_config=text | {"num_key_value_heads": 2}, vision_config=vision)
    images = torch.randn(16, 3 * 2 * 4 * 4), torch.tensor([[1, 4, 4]])
    return Qwen2VLModel(config).eval().visual, images


@pytest.mark.parametrize("frontend", ["auto", "export"])
@pytest.mark.parametrize(
    "make",
    [lambda: (odd(ReadsInTraining), image()), wav2vec2, qwen2_vl],
    ids=["odd", "wav", "qwen"],
)
def test_a_refusal_prints_nothing(
    make: Callable[[], Any], frontend: str, capfd: pytest.CaptureFixture[str]
) -> None:
    model, example = make()
    capfd.readouterr()
    with pytest.raises(SkipViTError):
        rewrite(model, PLAN, example, frontend=frontend)
    assert capfd.readouterr() == ("", "")
    heard = logging.handlers.BufferingHandler(10)
    logging.getLogger("torch").addHandler(heard)
    logging.getLogger("torch").warning("again")
    logging.getLogger("torch").removeHandler(heard)
    assert [record.getMessage() for record in heard.buffer] == ["again"]


# -- front ends -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_both_reasons_are_told() -> None:
    with pytest.raises(TraceError) as caught:
        rewrite(odd(ReadsInTraining), PLAN)
    with pytest.raises(TraceError) as symbolic_:
        rewrite(odd(ReadsInTraining), PLAN, frontend="symbolic")
    with pytest.raises(TraceError) as export:
        rewrite(odd(ReadsInTraining), PLAN, frontend="export")
    first, second = symbolic_.value.message, export.value.message
    assert first != second
    assert caught.value.message == f"{first}\n  torch.export was refused, too: {second}"
    assert caught.value.hint == symbolic_.value.hint


@pytest.mark.slow
def test_both_reasons_for_a_closed_module() -> None:
    class Reads(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).flip(1) * random.random()

    with pytest.raises(UnsupportedModelError, match="may mix tokens") as caught:
        rewrite(odd(lambda: Block(mlp=Reads(DIM, DIM))), PLAN)
    assert "torch.export was refused, too" in str(caught.value)
    assert caught.value.module_path.endswith("mlp")


@pytest.mark.parametrize(
    ("frontend", "used", "reason"),
    [
        ("auto", "symbolic", "it is tried first"),
        ("symbolic", "symbolic", "it was asked for"),
        ("export", "export", "it was asked for"),
    ],
)
@pytest.mark.slow
def test_the_front_end_is_told(frontend: str, used: str, reason: str) -> None:
    inspection = skipvit_fx.inspect(rewrite(odd(), PLAN, frontend=frontend))
    assert (inspection.frontend, inspection.frontend_reason) == (used, reason)
    assert f"captured by the front end {used!r}: {reason}" in str(inspection)
    plain = inspection.to_dict()
    assert (plain["frontend"], plain["frontend_reason"]) == (used, reason)


@pytest.mark.slow
def test_why_a_model_was_exported_is_told() -> None:
    class NeedsTensor(Block):
        def forward(self, x: Tensor) -> Tensor:
            if isinstance(x, fx.Proxy):
                raise TypeError("a tensor, please")
            return super().forward(x)

    inspection = skipvit_fx.inspect(rewrite(odd(NeedsTensor), PLAN))
    assert inspection.frontend == "export"
    assert "symbolic tracing was refused: the forward of Odd" in inspection.frontend_reason
    assert "TypeError: a tensor, please" in str(inspection)


@pytest.mark.slow
def test_a_plan_that_does_not_fit_an_exported_model() -> None:
    class Flips(Block):
        def forward(self, x: Tensor) -> Tensor:
            if isinstance(x, fx.Proxy):
                raise TypeError("a tensor, please")
            return super().forward(x.flip(1))

    with pytest.raises(UnsupportedModelError) as caught:
        rewrite(odd(Flips), PLAN)
    (note,) = caught.value.__notes__
    assert "captured by torch.export, because symbolic tracing was refused" in note
    assert "a tensor, please" in note


# -- one way to watch -------------------------------------------------------------------------------------------------


def test_models_are_watched_in_eval_mode_whatever_they_are_in() -> None:
    class OnlyInTraining(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).softmax(-1) if self.training else super().forward(x)

    model = odd(lambda: Block(mlp=OnlyInTraining(DIM, DIM)))
    reports = [
        skipvit_fx.find_attention(model.train(training), example_inputs=image())
        for training in (False, True)
    ]
    assert reports[0].sites == reports[1].sites
    assert len(reports[0].sites) == 2
    assert model.training


def test_watching_sees_attention_that_a_kernel_hides() -> None:
    """Without a graph, too: the calls that were watched are told."""
    layer = nn.TransformerEncoderLayer(DIM, 4, DIM, batch_first=True, dropout=0.0)

    class Unfollowed(Odd):
        def layers(self, x: Tensor) -> Tensor:
            return super().layers(x) * random.random()

    model = scramble(Unfollowed([layer, layer])).eval()
    with torch.no_grad():
        report = skipvit_fx.find_attention(model, example_inputs=image())
    assert report.refusal is not None
    assert [(site.fused, site.tokens) for site in report.sites] == [(True, 21), (True, 21)]
