"""What is tried next, and what is kept where."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from skipvit_fx.errors import SearchError
from skipvit_fx.plan import Plan
from skipvit_fx.planner import study as study_module
from skipvit_fx.planner.space import Space
from skipvit_fx.planner.study import Known, Study, storage_at

SPACE = Space(6, (1, 2, 3, 4, 5, 6), ("skip", "fused", "merged"), 2)
pytestmark = pytest.mark.every_case


def known(plan: Plan) -> Known:
    """Some numbers that depend on the plan."""
    left = sum(float(stage.amount) for stage in plan.stages)
    return Known(int(1000 - 300 * left), 1.0 / (1.0 + left / plan.stages[0].layer), 0.01)


def evaluate(study: Study, count: int) -> list[str]:
    found = []
    for _ in range(count):
        proposal = study.ask()
        assert proposal is not None
        found.append(str(proposal.plan))
        study.tell(proposal, known(proposal.plan))
    return found


def test_no_plan_twice_and_the_same_for_the_same_seed() -> None:
    plans = evaluate(Study("s", None, 3, SPACE), 60)
    assert len(set(plans)) == 60
    assert plans == evaluate(Study("s", None, 3, SPACE), 60)
    assert plans != evaluate(Study("s", None, 4, SPACE), 60)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["study.log", "journal:///study.log", "sqlite:///study.db"])
def test_a_study_that_was_interrupted_goes_on_as_if_not(kind: str, tmp_path: Path) -> None:
    place = kind.replace("study", f"{tmp_path}/study")
    whole = evaluate(Study("s", None, 0, SPACE), 12)
    first = Study("s", place, 0, SPACE)
    parts = evaluate(first, 7)
    second = Study("s", place, 0, SPACE)
    assert second.known().keys() == set(parts)
    assert parts + evaluate(second, 5) == whole
    assert Study("s", place, 0, SPACE).known() == {p: known(Plan.parse(p)) for p in whole}
    assert Study("other", place, 0, SPACE).known() == {}


def test_what_is_noted_is_known() -> None:
    study = Study("s", None, 0, SPACE)
    noted = [Plan(), Plan.parse("1-6(2)+merged"), Plan.parse("2(50%)+4")]
    for i, plan in enumerate(noted):
        study.note(plan, Known(i, 0.5, None))
    assert study.known() == {str(plan): Known(i, 0.5, None) for i, plan in enumerate(noted)}
    assert not set(evaluate(study, 30)) & {str(plan) for plan in noted}


def test_what_others_evaluate_at_the_moment_is_not_proposed(tmp_path: Path) -> None:
    place = str(tmp_path / "study.log")
    here, there = Study("s", place, 0, SPACE), Study("s", place, 0, SPACE)
    proposals = [study.ask() for study in (here, there) * 10]
    plans = [str(proposal.plan) for proposal in proposals if proposal]
    assert len(set(plans)) == len(proposals) == 20


def test_what_is_rejected_is_not_proposed_again() -> None:
    study = Study("s", None, 0, Space(1, (1,), ("merged",), 1))
    seen = set()
    while (proposal := study.ask()) is not None:
        assert str(proposal.plan) not in seen
        seen.add(str(proposal.plan))
        study.reject(proposal)
    assert "1(50%)+2+merged" in seen
    assert study.known() == {}


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("study.txt", "what kind of storage"),
        ("nodatabase://here", "cannot be opened"),
        ("sqlite:////nowhere/at/all.db", "cannot be opened"),
        ("nodatabase://me:secret@here/db", r"me:\*\*\*@here"),
    ],
)
def test_a_storage_that_is_none(place: str, words: str) -> None:
    with pytest.raises(SearchError, match=words) as caught:
        storage_at(place)
    assert "journal" in caught.value.hint
    assert "secret" not in str(caught.value)


def test_a_storage_of_optuna_is_used_as_it_is() -> None:
    assert storage_at(None) is None
    storage = study_module.optuna().storages.InMemoryStorage()
    assert storage_at(storage) is storage


def test_without_optuna(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(SearchError, match="optuna is not installed") as caught:
        study_module.optuna()
    assert "skipvit_fx[search]" in caught.value.hint
