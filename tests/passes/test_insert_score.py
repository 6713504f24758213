"""A score beside the layer's own attention."""

from __future__ import annotations

import pytest
from torch import Tensor

from skipvit_fx.errors import UnsupportedModelError
from skipvit_fx.passes.insert_score import InsertScore
from support.tiny import Tiny, assert_documented, run_up_to


def test_as_documented() -> None:
    assert_documented(run_up_to(InsertScore, Tiny()))


def test_one_score_per_stage_and_the_attention_stays() -> None:
    ran = run_up_to(InsertScore, Tiny(), "1,2(25%,25%)+3")
    assert [(kind, node) for kind, node in ran.events] == [
        ("insert", "stage_1_scores"),
        ("insert", "stage_2_scores"),
    ]
    assert [line for line in ran.after if "_scores" not in line] == ran.before


def long(patches: Tensor) -> Tensor:
    return patches.norm(dim=-1)


@pytest.mark.parametrize("score", ["random", long])
def test_what_does_not_read_the_attention_reads_the_stream(score: object) -> None:
    ran = run_up_to(InsertScore, Tiny(), score=score)
    assert "stage_1_scores = skipvit.stage_1.score(add)" in ran.after


def by_all(
    tokens: Tensor, *, attention: Tensor, queries: Tensor, values: Tensor, keys: Tensor
) -> Tensor:
    return tokens.norm(dim=-1)


def test_what_a_function_asks_for_is_read() -> None:
    """In the order of its parameters; attention is computed beside the layer's own."""
    ran = run_up_to(InsertScore, Tiny(), score=by_all)
    query, key, value = "getitem_1", "getitem_2", "getitem_3"
    beside = f"stage_1_attention = skipvit.stage_1.attention({query}, {key})"
    scored = (
        f"stage_1_scores = skipvit.stage_1.score(add, stage_1_attention, {query}, {value}, {key})"
    )
    assert set(ran.after) - set(ran.before) == {beside, scored}
    for score, line in {
        "keys": f"skipvit.stage_1.score(add, {key})",
        "values": f"skipvit.stage_1.score(add, {value})",
        "received": f"skipvit.stage_1.score({query}, {key})",
    }.items():
        ran = run_up_to(InsertScore, Tiny(), score=score)
        assert set(ran.after) - set(ran.before) == {f"stage_1_scores = {line}"}


def test_a_score_that_the_model_has_not_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="needs a class token"):
        run_up_to(InsertScore, Tiny(), score="cls", prefix_tokens=0)


def test_without_a_drop_nothing_is_scored() -> None:
    assert run_up_to(InsertScore, Tiny(), "").events == ()
