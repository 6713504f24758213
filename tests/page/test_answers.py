"""What two outputs are compared by."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput

from skipvit_fx.page.answers import answers, mean_cosine

BEFORE = torch.tensor([[4.0, 1.0, 0.0], [0.0, 1.0, 2.0]])
AFTER = torch.tensor([[3.0, 1.0, 0.5], [0.0, 3.0, 2.0]])


def model(**attributes: Any) -> Any:
    return SimpleNamespace(**attributes)


def test_logits_of_a_model_that_counts_its_classes() -> None:
    found = answers(model(num_classes=3), BEFORE, AFTER, 2)
    assert [answer.same for answer in found] == [True, False]
    assert found[1].before[0] == ("class 2", pytest.approx(BEFORE[1].softmax(0)[2].item()))
    assert [name for name, _ in found[1].after] == ["class 1", "class 2", "class 0"]
    wanted = torch.cosine_similarity(BEFORE.double(), AFTER.double()).tolist()
    assert [answer.cosine for answer in found] == pytest.approx(wanted)
    assert mean_cosine(found) == pytest.approx(sum(wanted) / 2)


def test_logits_by_name_and_labels_of_the_configuration() -> None:
    config = SimpleNamespace(id2label={0: "cat", 1: "<b>dog</b>", 2: "bird"})
    outputs = (ImageClassifierOutput(logits=logits) for logits in (BEFORE, AFTER))
    found = answers(model(config=config), *outputs, 2)
    assert found[1].after[0][0] == "<b>dog</b>"


def test_features_are_no_logits() -> None:
    for features in (model(num_classes=0), model(), model(num_classes=10)):
        found = answers(features, BEFORE, AFTER, 2)
        assert found[0].before == ()
        assert found[0].cosine is not None


def test_outputs_of_other_lengths_are_compared_by_what_fits() -> None:
    """Where tokens never return, the last hidden state is shorter."""
    long, short = torch.rand(2, 5, 3), torch.rand(2, 4, 3)
    found = answers(
        model(),
        BaseModelOutputWithPooling(last_hidden_state=long, pooler_output=BEFORE),
        BaseModelOutputWithPooling(last_hidden_state=short, pooler_output=AFTER),
        2,
    )
    wanted = torch.cosine_similarity(BEFORE.double(), AFTER.double()).tolist()
    assert [answer.cosine for answer in found] == pytest.approx(wanted)
    nothing = answers(model(), long, short, 2)
    assert [answer.cosine for answer in nothing] == [None, None]
    assert mean_cosine(nothing) is None
