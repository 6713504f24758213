"""What quality is, image by image, and how sure its mean is."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor

from skipvit_fx.errors import SearchError
from skipvit_fx.planner.quality import (
    Metric,
    NotComparableError,
    cosines,
    doubts,
    logits_of,
    quality_of,
)

pytestmark = pytest.mark.every_case


def test_a_mean_over_batches_counts_images() -> None:
    found = quality_of([(torch.tensor([1.0, 3.0, 5.0]), 3), (torch.tensor([7.0]), 1)])
    assert found.mean == 4.0
    assert found.images == 4
    assert found.spread == pytest.approx(torch.tensor([1.0, 3.0, 5.0, 7.0]).std().item() / 2)
    weighed = quality_of([(torch.tensor([1.0]), 3), (torch.tensor([5.0]), 1)])
    assert weighed.mean == 2.0


def test_the_spread_of_a_share_is_not_zero_where_all_agree() -> None:
    all_agree = quality_of([(torch.ones(16), 16)])
    assert all_agree.mean == 1.0
    assert all_agree.spread == pytest.approx(math.sqrt(0.9 * 0.1 / 20))
    many = quality_of([(torch.ones(400), 400)]).spread
    assert many is not None
    assert many < 0.01


def test_a_single_number_has_no_spread() -> None:
    assert quality_of([(torch.tensor([0.5]), 8)]).spread is None


@pytest.mark.parametrize(
    "outputs",
    [
        torch.eye(3),
        (torch.eye(3), torch.zeros(3, 7, 2)),
        OrderedDict(loss=torch.tensor(1.0), logits=torch.eye(3)),
        {"features": torch.zeros(3, 5), "logits": torch.eye(3)},
    ],
)
def test_class_scores_are_found(outputs: Any) -> None:
    assert torch.equal(logits_of(outputs), torch.eye(3))


@pytest.mark.parametrize("outputs", [torch.zeros(3, 7, 2), {}, torch.zeros(3, 1), "text"])
def test_no_class_scores(outputs: Any) -> None:
    with pytest.raises(SearchError, match="class scores") as caught:
        logits_of(outputs)
    assert "cosine" in caught.value.hint


def test_agreement_is_by_image() -> None:
    metric = Metric("agreement")
    model = torch.tensor([[1.0, 2.0], [2.0, 1.0], [0.0, 1.0]])
    reference = metric.reference(model)
    assert metric.values(model, reference, None, 3).tolist() == [1, 1, 1]
    assert metric.values(-model, reference, None, 3).tolist() == [0, 0, 0]
    model[1] = torch.tensor([1.0, 2.0])
    assert metric.values(model, reference, None, 3).tolist() == [1, 0, 1]


def test_accuracy_is_by_label() -> None:
    scores, labels = torch.eye(3), torch.tensor([0, 2, 2])
    assert Metric("accuracy").values(scores, None, (None, labels), 3).tolist() == [1, 0, 1]


def test_cosine_is_along_features_at_matching_tokens() -> None:
    tokens = torch.randn(2, 5, 4)
    assert cosines(tokens * 3, [tokens]).tolist() == pytest.approx([1, 1])
    swapped = tokens.clone()
    swapped[1, [0, 1]] = tokens[1, [1, 0]]
    found = cosines(swapped, [tokens])
    between = torch.nn.functional.cosine_similarity(tokens[1, 0], tokens[1, 1], dim=0)
    assert found.tolist() == pytest.approx([1, (3 + 2 * between.item()) / 5], abs=1e-6)
    maps = torch.randn(2, 4, 3, 3)
    wanted = torch.nn.functional.cosine_similarity(maps, maps.flip(2), dim=1).mean((1, 2))
    assert torch.allclose(cosines(maps.flip(2), [maps]), wanted)
    both = cosines((tokens, -tokens[:, 0]), [tokens, tokens[:, 0]])
    assert both.tolist() == pytest.approx([0, 0], abs=1e-6)


def test_fewer_tokens_cannot_be_compared() -> None:
    with pytest.raises(NotComparableError):
        cosines(torch.zeros(2, 3, 4), [torch.zeros(2, 5, 4)])


def half(outputs: Tensor, batch: Tensor) -> Tensor:
    return outputs[:, 0] + batch


def test_a_function_gets_outputs_and_batch() -> None:
    metric = Metric(half)
    assert metric.name == "half"
    found = metric.values(torch.ones(2, 3), None, torch.tensor([1.0, 2.0]), 2)
    assert found.tolist() == [2, 3]
    assert Metric(lambda *_: 0.25).values(torch.ones(2, 3), None, None, 2).tolist() == [0.25]


@pytest.mark.parametrize("returned", [torch.zeros(3), torch.zeros(2, 2), math.nan, "good", None])
def test_a_function_that_returns_something_else(returned: Any) -> None:
    with pytest.raises(SearchError, match=r"returned .* for 2 images"):
        Metric(lambda *_: returned).values(torch.ones(2, 3), None, None, 2)


def test_answers_that_mean_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    sure = torch.nn.functional.one_hot(torch.arange(20) % 10, 10) * 9.0
    vague = torch.randn(20, 10, generator=generator) * 0.1
    metric = Metric("agreement")
    assert doubts([sure], metric) == ""
    assert "nearly uniform" in doubts([vague], metric)
    features = torch.randn(20, 8, generator=generator)
    assert doubts([features], Metric("cosine")) == ""
    assert "hardly differ" in doubts(
        [features[:10] * 0.01 + 5, features[10:] * 0.01 + 5], Metric("cosine")
    )
