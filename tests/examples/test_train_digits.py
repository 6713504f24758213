"""The table of the digits example: its images, its log, and the whole of it in small."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

import skipvit_fx as sv
from support.scripts import load


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return load("examples/train_digits.py")


def test_every_picture_holds_its_digit_whole(example: ModuleType) -> None:
    settings = example.Settings(images=20, pieces=0)
    digits = example.Digits(settings)
    images, classes = digits.training(torch.Generator().manual_seed(3))
    assert images.shape == (20, 1, 32, 32)
    training = digits.pixels[: digits.split]
    for image, label in zip(images, classes, strict=True):
        pixels = (image[0] + 0.5) / 2
        places = [(r, c) for r in range(0, 25, 4) for c in range(0, 25, 4)]
        found = {
            int(digits.classes[i])
            for r, c in places
            for i in (training == pixels[r : r + 8, c : c + 8]).all((1, 2)).nonzero().flatten()
        }
        assert found == {int(label)}


def test_training_and_validation_share_no_digit(example: ModuleType) -> None:
    digits = example.Digits(example.Settings(images=50, validation=50, pieces=0))
    digits.pixels[digits.split :] = 7.0
    assert digits.training(torch.Generator().manual_seed(0))[0].max() < 7
    assert digits.validation()[0].amax((1, 2, 3)).min() > 7


@pytest.mark.slow
def test_rows_start_from_the_same_weights(example: ModuleType) -> None:
    one, other = (example.build(row, 5, example.QUICK).state_dict() for row in example.ROWS[:2])
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_plans_are_the_papers(example: ModuleType) -> None:
    assert all(str(sv.Plan.parse(row.plan)) == row.plan for row in example.ROWS)


@pytest.mark.slow
def test_what_is_finished_is_not_repeated(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--quick", "--seeds", "1", "--rounds", "1", "--out", str(tmp_path)]
    example.main(arguments)
    log = tmp_path / "digits.jsonl"
    lines = log.read_text().splitlines()
    assert [json.loads(line)["row"] for line in lines] == [row.name for row in example.ROWS[:3]]
    log.write_text("\n".join(lines[:2]) + "\n")  # as if stopped in the last
    trained = []
    monkeypatch.setattr(
        example, "train", lambda row, seed, settings: trained.append(row.name) or (0.5, 1.0)
    )
    example.main(arguments)
    assert trained == [example.ROWS[2].name]
    table = (tmp_path / "digits.md").read_text()
    assert "| `4,7(30%,30%)+10` | 50.0 (50.0 to 50.0) |" in table
    with Image.open(tmp_path / "digits.png") as drawn:
        assert drawn.width > 500
    assert len(json.loads((tmp_path / "digits.json").read_text())) == 3
