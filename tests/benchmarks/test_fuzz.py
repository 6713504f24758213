"""The fuzzer: a few cases every time, many in the slow tests, and a bug put in on purpose that it must find."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fuzzing import cases
from fuzzing.cases import Case, Outcome, as_test, draw_case, run, shrink
from fuzzing.compose import Composition, Placed
from fuzzing.named import Named
from fuzzing.operators import Operator
from skipvit_fx.rewriting import context
from support.scripts import load

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.filterwarnings("ignore")  # of models that are odd on purpose

QUICK = (2006, 2008, 2011, 2015, 2016, 2018, 2020, 2021, 2027, 2046)
PLAIN = Composition(
    grid=(3, 4),
    channels=16,
    heads=2,
    prefix=("cls",),
    suffix=(),
    position="add",
    tokens_first=False,
    blocks=("pre",) * 3,
    attentions=("fused",) * 3,
    head="first",
    placed=(),
)


def at(place: str, block: int, code: str, make: str = "") -> Placed:
    return Placed(place, block, Operator("by hand", code, make))


@pytest.mark.parametrize("seed", QUICK)
@pytest.mark.slow
def test_a_case(seed: int) -> None:
    outcome = run(draw_case(seed))
    assert outcome.kind in ("exact", "refused", "guard"), outcome


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(300))
def test_many_cases(seed: int) -> None:
    outcome = run(draw_case(seed))
    assert not outcome.failed, as_test(draw_case(seed))


@pytest.mark.slow
def test_cases_are_mostly_worth_something() -> None:
    """Most of what is drawn is a model that runs and that the reference can judge; a good part of it is rewritten."""
    kinds = [run(draw_case(seed)).kind for seed in range(300, 400)]
    assert kinds.count("invalid") + kinds.count("unjudged") <= 5
    assert kinds.count("exact") >= 30


@pytest.mark.slow  # it imports everything twice
def test_a_case_is_drawn_from_its_number_alone() -> None:
    code = "from fuzzing.cases import draw_case; print([draw_case(seed) for seed in range(50)])"
    said = set()
    for hash_seed in ("1", "2"):
        path = os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT)])
        env = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": path}
        said.add(
            subprocess.run(
                [sys.executable, "-c", code], env=env, capture_output=True, check=True
            ).stdout
        )
    assert said == {f"{[draw_case(seed) for seed in range(50)]}\n".encode()}


# -- a bug put in on purpose ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_bug_is_found_and_shrunk(monkeypatch: pytest.MonkeyPatch) -> None:
    placed = (at("mlp", 2, "x - x.mean(1, keepdim=True)"), at("joined", 1, "x.sin()"))
    model = replace(PLAIN, placed=placed, position="patches")
    case = Case(7, model, ((1, 25), (2, 50)), return_layer=4, cut="block", score="mean", batch=3)
    assert run(case).kind == "refused"
    monkeypatch.setattr(context, "mixing_leaves", lambda spans, opened: [])
    assert run(case).kind == "wrong"
    small = shrink(case)
    assert run(small).kind == "wrong"
    assert isinstance(small.model, Composition)
    assert small.model.depth == 2
    assert [p.operator.code for p in small.model.placed] == ["x - x.mean(1, keepdim=True)"]
    assert len(small.stages) == 1
    names: dict[str, Any] = {}
    exec(as_test(small), names)
    with pytest.raises(AssertionError, match="wrong"):
        names["test_case_7"]()
    monkeypatch.undo()
    names["test_case_7"]()


def test_a_bug_is_found_among_cases_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "mixing_leaves", lambda spans, opened: [])
    assert any(run(draw_case(seed)).kind == "wrong" for seed in (64, 111))


@pytest.mark.parametrize(
    ("case", "kind", "words"),
    [
        (Case(1, PLAIN, ((1, 50),), return_layer=3), "exact", ""),
        (Case(1, PLAIN, ((1, 50),), return_layer=3, score="random", grad=True), "exact", ""),
        (
            Case(1, PLAIN, ((1, 50), (3, 50)), score="longest", multiple_of=4, train=True),
            "exact",
            "",
        ),
        (
            Case(1, PLAIN, ((1, 50),), frontend="symbolic", cut="nowhere"),
            "refused",
            "PlanError: cut=",
        ),
        (
            Case(1, replace(PLAIN, placed=(at("mlp", 1, "x @ x"),)), ((1, 50),)),
            "invalid",
            "RuntimeError",
        ),
    ],
)
@pytest.mark.slow
def test_outcomes(case: Case, kind: str, words: str) -> None:
    outcome = run(case)
    assert outcome.kind == kind, outcome
    assert words in outcome.reason


@pytest.mark.parametrize(
    ("raised", "kind"), [(KeyError("x"), "crash"), (cases.SkipViTError("no"), "mute")]
)
def test_what_is_no_refusal(monkeypatch: pytest.MonkeyPatch, raised: Exception, kind: str) -> None:
    def fails(spans: Any, opened: Any) -> list[str]:
        raise raised

    monkeypatch.setattr(context, "mixing_leaves", fails)
    outcome = run(Case(1, PLAIN, ((1, 50),)))
    assert outcome.kind == kind
    assert outcome.failed


@pytest.mark.slow
def test_other_tokens_other_gradients_and_the_wrong_model_when_off_are_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = Case(1, PLAIN, ((1, 50),), return_layer=3, grad=True)
    for name, told in (
        ("_same_tokens", "different tokens dropped"),
        ("_same_gradients", "the gradients differ"),
    ):
        with monkeypatch.context() as patch:

            def differs(*args: Any, told: str = told, **kwargs: Any) -> None:
                raise cases.Difference(told)

            patch.setattr(cases, name, differs)
            assert run(case) == Outcome("wrong", told, float("inf"))


def test_shrinking_a_named_model() -> None:
    model = Named("timm", "vit", {"depth": 2, "qk_norm": True, "embed_dim": 32})
    assert [m.options for m in model.smaller()] == [
        {"depth": 2, "embed_dim": 32},
        {"depth": 2, "qk_norm": True},
    ]


# -- the command ----------------------------------------------------------------------------------------------------


def test_the_page_and_going_on_after_an_interrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fuzz = load("benchmarks/fuzz.py")
    outcomes = iter([Outcome("exact", error=1e-7), Outcome("refused", "PlanError: no"), None])

    def run_once(case: Case) -> Outcome:
        outcome = next(outcomes)
        if outcome is None:
            raise KeyboardInterrupt
        return outcome

    monkeypatch.setattr(fuzz, "run", run_once)
    monkeypatch.setattr(fuzz, "shrink", lambda case: case)
    monkeypatch.setattr(fuzz, "_quiet", lambda: None)
    out = tmp_path / "fuzz.md"
    arguments = ["--cases", "4", "--seed", "10", "--out", str(out)]
    assert fuzz.main(arguments) == 0
    assert "interrupted" in capsys.readouterr().err
    rows = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    assert [row["seed"] for row in rows] == [10, 11]
    with out.with_suffix(".jsonl").open("a") as log:
        log.write('{"seed": 12, "outc')  # cut off in the middle of a line
    outcomes = iter([Outcome("wrong", "the output differs", 0.3), Outcome("exact")])
    assert fuzz.main(arguments) == 1
    rows = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    assert [row["seed"] for row in rows] == [10, 11, 12, 13]
    said = out.read_text()
    assert "| all | 2 | 1 | 1 | 4 |" in said
    assert "| PlanError: no | 1 |" in said
    assert "Seeds 10 to 13." in said
    assert "def test_case_12()" in capsys.readouterr().out


@pytest.mark.slow
def test_a_case_that_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    fuzz = load("benchmarks/fuzz.py")

    def forever(case: Case) -> Outcome:
        while True:
            try:
                sum(range(10_000))
            except Exception:  # as the code under test may catch everything
                continue

    monkeypatch.setattr(fuzz, "run", forever)
    monkeypatch.setattr(fuzz, "TIMEOUT", 1)
    assert fuzz.record(5)["outcome"] == "timeout"
