"""Batches, and how they are split."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from skipvit_fx.errors import SearchError
from skipvit_fx.planner.images import contents, images_of, read_all, split

pytestmark = pytest.mark.every_case


def numbered(*sizes: int) -> list[Tensor]:
    numbers = iter(range(sum(sizes)))
    return [
        torch.stack([torch.full((3, 2, 2), float(next(numbers))) for _ in range(n)]) for n in sizes
    ]


def numbers_in(batches: list[Any]) -> list[float]:
    return [image.flatten()[0].item() for batch in batches for image in batch.args[0]]


@pytest.mark.parametrize("holdout", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("sizes", [(8,), (3, 3, 3, 3), (1,) * 8, (5, 1)])
def test_each_image_is_on_one_side(sizes: tuple[int, ...], holdout: float) -> None:
    ours, held = split(read_all(numbered(*sizes), False), holdout, 0, False)
    both = numbers_in(ours) + numbers_in(held)
    assert sorted(both) == list(range(sum(sizes)))
    assert abs(images_of(held) - holdout * sum(sizes)) <= 0.5


def test_the_seed_decides() -> None:
    batches = read_all(numbered(32), False)
    halves = [numbers_in(split(batches, 0.5, seed, False)[0]) for seed in (0, 0, 1)]
    assert halves[0] == halves[1] != halves[2]


def test_nothing_is_held_out() -> None:
    batches = read_all(numbered(2), False)
    assert split(batches, 0, 0, False) == (batches, [])


def test_what_has_one_entry_per_image_is_split_with_it() -> None:
    images = numbered(6)[0]
    given = {"pixel_values": images, "mask": images[:, 0, 0, 0].clone(), "table": torch.zeros(3, 2)}
    ours, held = split(read_all([given], False), 0.5, 0, False)
    for part in (*ours, *held):
        values = part.kwargs
        assert torch.equal(values["pixel_values"][:, 0, 0, 0], values["mask"])
        assert values["table"].shape == (3, 2)


def test_labels_go_with_their_images() -> None:
    images = numbered(6)[0]
    pairs = [[images, images[:, 0, 0, 0].long()]]
    ours, held = split(read_all(pairs, True), 0.5, 0, True)
    for part in (*ours, *held):
        assert len(part.args) == 1
        assert part.given[1].tolist() == part.given[0][:, 0, 0, 0].long().tolist()


@pytest.mark.parametrize(
    ("batches", "labelled", "words"),
    [
        (torch.zeros(4, 3, 2, 2), False, "list or a loader"),
        ({"x": torch.zeros(4, 3, 2, 2)}, False, "list or a loader"),
        (7, False, "list or a loader"),
        ([], False, "no batches"),
        (["picture.png"], False, "a batch is a str"),
        ([torch.zeros(0, 3, 2, 2)], False, "no images"),
        ([torch.zeros(4, 3, 2, 2)], True, "pair"),
        ([(torch.zeros(4, 3, 2, 2), torch.zeros(3))], True, "labels of a batch of 4"),
    ],
)
def test_what_is_no_batch(batches: Any, labelled: bool, words: str) -> None:
    with pytest.raises(SearchError, match=words) as caught:
        read_all(batches, labelled)
    assert caught.value.hint


def test_too_few_to_split() -> None:
    with pytest.raises(SearchError, match="1 images cannot be split"):
        split(read_all(numbered(1), False), 0.5, 0, False)


def test_contents_tell_images_apart() -> None:
    one, other = numbered(3)[0], numbered(3)[0]
    assert list(contents(read_all([one], False))) == list(contents(read_all([other], False)))
    other[1, 2, 1, 1] += 1
    assert list(contents(read_all([one], False))) != list(contents(read_all([other], False)))
    half = list(contents(read_all([one.bfloat16()], False)))
    assert half != list(contents(read_all([one], False)))
