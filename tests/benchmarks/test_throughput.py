"""The benchmark of throughput measures what it says, on a tiny model."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from support.scripts import load

MODEL = ["--model", "vit_tiny_patch16_224", "--model-kwargs", "img_size=64", "patch_size=8"]
MODEL += ["depth=4", "embed_dim=48", "num_heads=3"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load("benchmarks/throughput.py")


@pytest.fixture(scope="module")
def written(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    page = tmp_path_factory.mktemp("throughput") / "new" / "page.md"
    options = ["--plan", "2(50%)+4", "--rounds", "2", "--batches", "1", "2", "--out", str(page)]
    precisions = ["--precisions", "float32", "bfloat16"]
    assert script.main([*MODEL, *options, *precisions]) == 0
    return page


@pytest.mark.slow
def test_every_setting_is_on_the_page(written: Path) -> None:
    headings = [line for line in written.read_text().splitlines() if line.startswith("## ")]
    assert len(headings) == 2 * 2 * 2
    assert "## training, bfloat16, eager, batch 2" in headings
    assert "## inference, float32, eager, batch 1" in headings


@pytest.mark.slow
def test_limits_and_memory(written: Path) -> None:
    results = json.loads(written.with_suffix(".json").read_text())["results"]
    rows: dict[str, Any] = {
        row["variant"]: row
        for row in results
        if row["setting"]
        == {"mode": "training", "precision": "float32", "compiled": False, "batch": 2}
    }
    limits = {name: row["limit"] for name, row in rows.items()}
    assert limits["model"] == limits["skipping off"] == 1
    assert limits["0 %"] == pytest.approx(1, rel=1e-3)  # the score counts
    assert 1.1 < limits["plan"] < limits["plan, no dead rows"] < 2
    memory = {name: row["megabytes"] for name, row in rows.items()}
    assert memory["model"] == memory["0 %"] == memory["skipping off"]
    assert memory["plan, no dead rows"] < memory["plan"] < memory["model"]
    for row in results:
        middle, least, most = row["speed"]
        assert 0 < least <= middle <= most
        assert row["reached"] == pytest.approx(middle / row["limit"])
        assert (row["megabytes"] is None) == (row["setting"]["mode"] == "inference")


@pytest.mark.parametrize(
    ("change", "missed"),
    [({}, True), ({"variant": "0 %"}, True), ({"limit": 1.2}, False), ({"compiled": True}, False)],
)
def test_a_missed_target_is_told(change: dict[str, Any], missed: bool, script: ModuleType) -> None:
    setting = script.Setting("training", "float32", change.get("compiled", False), 8)
    variant = change.get("variant", "plan")
    result = script.Result(setting, variant, 1.0, (1.2, 1.1, 1.3), change.get("limit", 1.3), None)
    asked = Namespace(model=script.MODEL, plan=script.PLAN, device="cpu", model_kwargs={})
    told = list(script.misses(asked, [result]))
    assert bool(told) is missed
    assert all(variant in line for line in told)
