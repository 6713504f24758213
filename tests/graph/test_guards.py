"""What tracing decides in silence: right at every call, checked at every call, or refused by name."""

from __future__ import annotations

import builtins
import copy
import itertools
from collections.abc import Container
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import skipvit_fx
from skipvit_fx.errors import (
    ExportError,
    GuardError,
    TraceError,
    UnsupportedModelError,
)
from support.branching_models import BATCH, DEPTH, KIND, MODES, PLACES, branching
from support.checks import rewrite
from support.models import scramble
from support.odd_models import TOKENS, Block, Odd, image
from support.once import made_once
from support.reference import masked_reference

FRONTENDS = ["symbolic", "export"]
PLAN = "1(40%)+3"
STAGES: Any = {"stages": [(1, "0.4")], "return_layer": 3}
BATCHES = (1, 2, 5, 120)


_REFUSED = [
    ("even", "symbolic"),
    ("looked-up", "symbolic"),
    ("looked-up", "export"),
    ("numel", "symbolic"),
]
"""Where one graph cannot tell which way the branch goes, or whether it also depends on the number of tokens."""


def assert_right(fast: Any, model: Odd, other: Container[int] = ()) -> list[int]:
    """Right at every batch, wherever a branch goes at it: a call that goes another way gets a graph of its own.

    Args:
        other: the batches at which a branch goes another way than in the example, which may be refused by name: where
            it goes that way for no other number of samples, there is no graph for them.

    Returns:
        Those that are.
    """
    refused = []
    for batch in BATCHES:
        x = image(batch)
        with torch.no_grad():
            if batch in other:
                try:
                    fast(x)
                except (GuardError, TraceError, UnsupportedModelError):
                    refused.append(batch)
                    continue
            wanted = masked_reference(model, x, model.layout(), **STAGES).output
            torch.testing.assert_close(fast(x), wanted, rtol=1e-4, atol=1e-4)
            skipvit_fx.set_skipping(fast, False)
            assert torch.equal(fast(x), model(x))
            skipvit_fx.set_skipping(fast, True)
    return refused


def check_batch(name: str, place: str, frontend: str) -> None:
    model = branching(BATCH[name], place)
    try:
        fast = rewrite(model, PLAN, frontend=frontend)
    except (TraceError, UnsupportedModelError):
        assert (name, frontend) in _REFUSED or place == "leaf"
        return
    goes = [bool(BATCH[name](torch.empty(batch, TOKENS, 32))) for batch in (2, *BATCHES)]
    other = [batch for batch, way in zip(BATCHES, goes[1:], strict=True) if way != goes[0]]
    refused = assert_right(fast, model, other)
    if name in ("below", "above"):  # where neighbours go that way, too
        assert not refused


def check_kind(name: str, place: str, frontend: str) -> None:
    model = branching(KIND[name], place)
    fast = rewrite(model, PLAN, frontend=frontend)
    assert_right(fast, model)
    assert len(fast.own.calls) == 1


QUICK = list(itertools.islice(itertools.cycle(PLACES), len(BATCH) + len(KIND)))
BATCH_CASES = list(zip(BATCH, QUICK, strict=False))
KIND_CASES = list(zip(KIND, QUICK[3:], itertools.cycle(FRONTENDS), strict=False))


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize(("name", "place"), BATCH_CASES)
@pytest.mark.slow
def test_branches_on_the_batch_size(name: str, place: str, frontend: str) -> None:
    check_batch(name, place, frontend)


@pytest.mark.slow
@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", BATCH)
def test_branches_on_the_batch_size_everywhere(name: str, place: str, frontend: str) -> None:
    check_batch(name, place, frontend)


@pytest.mark.slow
@pytest.mark.parametrize("frontend", FRONTENDS)
def test_a_branch_on_a_fraction_of_the_batch_size(frontend: str) -> None:
    model = branching(lambda x: x.shape[0] / 2 < 2.0, "every-block")
    assert_right(rewrite(model, PLAN, frontend=frontend), model)


@pytest.mark.parametrize(("name", "place", "frontend"), KIND_CASES)
def test_questions_of_kind(name: str, place: str, frontend: str) -> None:
    check_kind(name, place, frontend)


@pytest.mark.slow
@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", KIND)
def test_questions_of_kind_everywhere(name: str, place: str, frontend: str) -> None:
    check_kind(name, place, frontend)


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("place", ["every-block", "leaf"])
def test_the_class_of_a_fake_tensor(place: str, frontend: str) -> None:
    model = branching(lambda x: x.__class__ is Tensor, place)
    with pytest.raises(TraceError, match="compares the __class__ of a value") as caught:
        rewrite(model, PLAN, frontend=frontend)
    assert "isinstance" in caught.value.hint


def of_numbers(x: Tensor) -> Tensor:
    """Functions of numbers and tensors, of which torch asks in C++ which one they were given."""
    x = x + torch.pow(x, 2) * 0.1 + torch.remainder(x, 2.0) * 0.1
    x = torch.where(x > 1, x, 0.5) + torch.where(x > 1, 0.5, x)
    return x + torch.xlogy(x.abs(), 2.0) * 0.1 + torch.float_power(x, 2).to(x) * 0.1


class OfNumbers(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(of_numbers(x) if builtins.isinstance(x, Tensor) else x * 2)


def test_torch_is_not_told_that_a_proxy_is_a_tensor() -> None:
    model, x = scramble(Odd([OfNumbers() for _ in range(DEPTH)])).eval(), image(3)
    with torch.no_grad():
        wanted = masked_reference(model, x, model.layout(), **STAGES).output
        got = rewrite(model, PLAN, frontend="symbolic")(x)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("name", MODES)
def test_modes_of_torch(name: str, frontend: str) -> None:
    condition, asked = MODES[name]
    with pytest.raises(
        TraceError, match=rf"calls torch\.{asked}\(\) around attention, in `"
    ) as caught:
        rewrite(branching(condition, "block-under-drop"), PLAN, frontend=frontend)
    assert caught.value.hint
    model = branching(condition, "leaf")
    assert_right(rewrite(model, PLAN, frontend=frontend), model)


def test_a_mode_under_another_name() -> None:
    from torch import is_inference_mode_enabled as asks

    globals()["asks"] = asks
    try:
        with pytest.raises(TraceError, match=r"calls torch\.is_inference_mode_enabled"):
            rewrite(branching(_by_another_name, "every-block"), PLAN, frontend="symbolic")
        assert globals()["asks"] is asks
    finally:
        del globals()["asks"]


def _by_another_name(x: Tensor) -> bool:
    return asks()  # type: ignore[name-defined,no-any-return] # noqa: F821


@pytest.mark.parametrize("place", ["every-block", "attention-under-drop", "leaf"])
@pytest.mark.parametrize("frontend", FRONTENDS)
def test_a_graph_for_calls_that_are_recorded_and_one_for_others(place: str, frontend: str) -> None:
    model, x = branching(lambda x: torch.is_grad_enabled(), place), image(3)
    fast = rewrite(model, PLAN, frontend=frontend)
    with torch.no_grad():
        fast(x)
    for grad in (False, True, False):
        with torch.set_grad_enabled(grad):
            wanted = masked_reference(model, x, model.layout(), **STAGES).output
            torch.testing.assert_close(fast(x), wanted, rtol=1e-4, atol=1e-4)
    assert len(fast.own.calls) == (1 if place == "leaf" else 2)


@pytest.mark.parametrize("asks", ["requires_grad", "is_leaf", "is_inference"])
def test_gradients(asks: str) -> None:
    def condition(x: Tensor) -> Any:
        found = getattr(x, asks)
        return found() if callable(found) and asks == "is_inference" else found

    with pytest.raises(TraceError, match=f"asks for '{asks}' of a tensor"):
        rewrite(branching(condition, "every-block"), PLAN, frontend="symbolic")


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize(
    "name", ["dtype", "dtype-is", "dtype-in-set", "floating", "on-cpu", "cuda"]
)
@pytest.mark.slow
def test_another_dtype(name: str, frontend: str) -> None:
    model = branching(KIND[name], "every-block")
    fast = rewrite(model, PLAN, frontend=frontend)
    model.double()  # and with it what shares its parameters
    x = image(3).double()
    with torch.no_grad():
        wanted = masked_reference(model, x, model.layout(), **STAGES).output
        torch.testing.assert_close(fast(x), wanted, rtol=1e-6, atol=1e-6)
    assert len(fast.own.calls) == 2


# -- what else a guard must survive ------------------------------------------------------------------------------


@made_once
def guarded(frontend: str = "symbolic") -> tuple[Odd, Any]:
    model = branching(BATCH["below"], "every-block")
    return model, rewrite(model, PLAN, frontend=frontend)


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_a_guard_says_what_and_where(frontend: str) -> None:
    _, fast = guarded(frontend)
    (call,) = fast.own.calls
    with pytest.raises(
        GuardError, match=r"`.*(condition\(x\)|x\.shape\[0\] < 100).*` in .* finds True"
    ) as caught:
        call.run(fast, image(100))
    assert isinstance(caught.value, ValueError)
    assert "example_inputs" in caught.value.hint


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.slow
def test_guards_last(frontend: str) -> None:
    """Through a copy, train mode, another mode and back, and switching off, in which the author's forward runs."""
    model, fast = guarded(frontend)
    x = image(100)
    with torch.no_grad():
        wanted = masked_reference(model, x, model.layout(), **STAGES).output
        fast(x)
        for module in (copy.deepcopy(fast), fast, fast.train(), fast.eval()):
            torch.testing.assert_close(module(x), wanted, rtol=1e-4, atol=1e-4)
        skipvit_fx.set_skipping(fast, False)
        assert torch.equal(fast(x), model(x))


@pytest.mark.slow
def test_a_guard_in_train_mode_only() -> None:
    class Warms(Block):
        def forward(self, x: Tensor) -> Tensor:
            if self.training and x.shape[0] > 50:
                x = x * 2.0
            return super().forward(x)

    model = scramble(Odd([Warms() for _ in range(3)])).eval()
    fast = rewrite(model, PLAN, frontend="symbolic")
    x = image(60)
    fast(x)
    assert len(fast.own.calls) == 1
    got = fast.train()(x)
    assert len(fast.own.calls) == 2
    again = skipvit_fx.rewrite(model, PLAN, example_inputs=x)
    torch.testing.assert_close(got, again.train()(x))


# torch.compile itself does that up to torch 2.12
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
@pytest.mark.slow
def test_guards_when_compiled() -> None:
    _, fast = guarded()
    compiled = torch.compile(fast, backend="eager", dynamic=True, fullgraph=True)
    with torch.no_grad():
        for batch in (2, 5, 7):
            torch.testing.assert_close(compiled(image(batch)), fast(image(batch)))
        with pytest.raises(torch._dynamo.exc.TorchDynamoException):
            compiled(image(100))  # no graph can be made while torch.compile follows
        wanted = fast(image(100))
        torch.testing.assert_close(compiled(image(100)), wanted)


@pytest.mark.parametrize(
    ("name", "frontend", "batch"),
    [
        ("five", "symbolic", 2),
        ("above", "symbolic", 5),
        ("above", "export", 5),
        ("even", "export", 6),
    ],
)
def test_validated_on_as_many_samples_as_the_graph_is_for(
    name: str, frontend: str, batch: int
) -> None:
    model, x = branching(BATCH[name], "every-block"), image(batch)
    fast: Any = skipvit_fx.rewrite(model, PLAN, example_inputs=x, frontend=frontend)  # type: ignore[arg-type]
    assert skipvit_fx.inspect(fast).validated.startswith("validated")
    with torch.no_grad():
        wanted = masked_reference(model, x, model.layout(), **STAGES).output
        torch.testing.assert_close(fast(x), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_counting_takes_one_sample_for_any() -> None:
    model = branching(BATCH["not-one"], "every-block")
    fast = rewrite(model, PLAN, frontend="symbolic")
    plain = rewrite(
        scramble(Odd([Block() for _ in range(DEPTH)])).eval(), PLAN, frontend="symbolic"
    )
    assert skipvit_fx.inspect(fast).macs == skipvit_fx.inspect(plain).macs


@pytest.mark.parametrize(("name", "reason"), [("below", "batch"), ("not-one", "one sample")])
@pytest.mark.slow
def test_guards_in_a_file(name: str, reason: str, tmp_path: Path) -> None:
    """A file checks nothing, so it is written for batches only for which it is right."""
    fast = rewrite(branching(BATCH[name], "every-block"), PLAN, frontend="symbolic")
    with pytest.raises(ExportError, match=reason) as caught:
        skipvit_fx.export_onnx(fast, tmp_path / "free.onnx", example_inputs=image(2))
    assert "batch=" in caught.value.hint
    file = skipvit_fx.export_onnx(
        fast, tmp_path / "two.onnx", example_inputs=image(2), batch=2, verify=True
    )
    assert file.difference is not None
    assert file.difference < 1e-5


def test_what_cannot_change_is_not_guarded() -> None:
    def condition(x: Tensor) -> bool:
        return x.ndim == 3 and x.dim() < 4 and not x.is_nested

    fast = rewrite(branching(condition, "every-block"), PLAN, frontend="symbolic")
    assert not [node for node in fast.graph.nodes if "guard" in node.name]


# -- sizes -------------------------------------------------------------------------------------------------------


class ClassTokenAtTheEnd(Odd):
    """Found by a literal slice."""

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed(image).flatten(2).transpose(1, 2)
        x = torch.cat([x, self.cls_token.expand(x.shape[0], -1, -1)], dim=1)
        return self.head(self.norm(self.layers(x))[:, 20])


@pytest.mark.slow
@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("size", [(32, 48), (24, 40), (40, 32), (64, 80)])
def test_another_image_size(size: tuple[int, int], frontend: str) -> None:
    """A literal slice takes out what the author's does: the row that it names, or nothing that is there."""
    model = scramble(ClassTokenAtTheEnd([Block() for _ in range(DEPTH)])).eval()
    fast = rewrite(model, PLAN, frontend=frontend)
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        if size[0] * size[1] < 32 * 40:
            with pytest.raises(IndexError):
                model(x)
            with pytest.raises(TraceError, match="IndexError"):
                fast(x)
        else:
            again = skipvit_fx.rewrite(model, PLAN, example_inputs=x, frontend=frontend)
            torch.testing.assert_close(fast(x), again(x))
            skipvit_fx.set_skipping(fast, False)
            assert torch.equal(fast(x), model(x))
            assert torch.equal(fast.graph_forward(x), model(x))
        fast(image(7))


# -- what is none -------------------------------------------------------------------------------------------------


class Optional(nn.Module):
    """Returns a mask, or none."""

    def __init__(self, few: int) -> None:
        super().__init__()
        self.few = few

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return x, (x[:1] * 0.1 if x.shape[0] > self.few else None)


class AddsWhatThereIs(Block):
    def __init__(self, few: int) -> None:
        super().__init__()
        self.optional = Optional(few)

    def forward(self, x: Tensor) -> Tensor:
        y, more = self.optional(self.norm1(x))
        if more is not None:
            y = y + more.mean() * 0.1
        return super().forward(x) + y * 0.1


@pytest.mark.slow
def test_none_from_a_module() -> None:
    model = scramble(Odd([AddsWhatThereIs(50) for _ in range(DEPTH)])).eval()
    fast = rewrite(model, PLAN, frontend="symbolic")
    with torch.no_grad():
        for batch in (1, 5):
            torch.testing.assert_close(
                fast.graph_forward(image(batch)).shape, model(image(batch)).shape
            )
        with pytest.raises(UnsupportedModelError, match="mixes the samples of a batch"):
            fast(image(60))
