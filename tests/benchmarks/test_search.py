"""The benchmarks of the search run, and write their pages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from support.scripts import load


@pytest.mark.slow
def test_plans_are_compared_on_a_trained_model(tmp_path: Path) -> None:
    script = load("benchmarks/search.py")
    script.main(["--quick", "--seeds", "1", "--out", str(tmp_path)])
    page = (tmp_path / "search.md").read_text()
    assert "## digits: 1 seed\n" in page
    (line,) = (tmp_path / "search.jsonl").read_text().splitlines()
    assert all(row["found_share"] <= row["share"] for row in json.loads(line)["rows"])
    before = (tmp_path / "search.jsonl").stat().st_mtime
    script.main(["--quick", "--seeds", "1", "--out", str(tmp_path)])
    assert (tmp_path / "search.jsonl").stat().st_mtime == before
    for name in ("search-digits.png", "search-digits-profile.png"):
        assert (tmp_path / name).stat().st_size


def row(accuracy: float, found: float) -> dict[str, Any]:
    return {
        "plan": "6(55%)+11",
        "method": "SkipViT",
        "share": 0.7,
        "found": "1(30%)+2",
        "found_share": 0.6,
        "accuracy": accuracy,
        "found_accuracy": found,
    }


def test_a_plan_that_is_less_accurate_is_counted() -> None:
    script = load("benchmarks/search.py")
    common = {"task": "digits", "accuracy": 0.9, "tuned": 0.9}
    seconds = {"training": 1.0, "search": 1.0}
    lines = [
        {**common, "seconds": seconds, "rows": [row(0.8, 0.9)]},
        {**common, "seconds": seconds, "rows": [row(0.8, 0.75)]},
    ]
    page = script.page({script.TASKS[0]: lines}, script.Settings())
    assert "Of 2 comparisons" in page
    assert "less accurate in 1, by more than a point in 1" in page
    assert "| 80.0 (80.0 to 80.0) |" in page
    assert "| +2.5 (-5.0 to +10.0) |" in page


def test_no_digit_is_in_two_shares() -> None:
    script = load("benchmarks/search.py")
    pictures = script.Pictures(script.TASKS[0])
    pictures.pixels = torch.arange(len(pictures.classes)).float()[:, None, None].expand(-1, 8, 8)
    shown = {}
    for share in script.SHARES:
        images, _ = pictures.make(share, 500, torch.Generator().manual_seed(0))
        shown[share] = set(((images + 0.5) / 2).flatten().tolist()) - {0.0}
    assert not shown["training"] & shown["search"]
    assert not shown["search"] & shown["test"]


@pytest.mark.slow
def test_the_cost_of_a_search_is_measured(tmp_path: Path) -> None:
    script = load("benchmarks/search_cost.py")
    small = ["--model", "test_vit", "--images", "4", "--batch", "2", "--trials", "24"]
    script.main([*small, "--out", str(tmp_path / "cost.md")])
    found = json.loads((tmp_path / "cost.json").read_text())
    assert found["plans"] == 24
    assert "| beside |" in (tmp_path / "cost.md").read_text()
