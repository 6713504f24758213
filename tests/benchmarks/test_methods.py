"""The benchmark of the published methods measures them, draws them, and writes its pages."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

import skipvit_fx as sv
from skipvit_fx.reports.grid import Grid
from skipvit_fx.reports.pictures import mean_colours
from support.scripts import load

SOME = {name: sv.METHODS[name] for name in ("evit", "tome", "patchdropout")}
MODEL = ["--models", "vit_tiny_patch16_224", "--model-kwargs", "img_size=56", "patch_size=4"]
MODEL += ["embed_dim=24", "num_heads=3"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = load("benchmarks/methods.py")
    monkeypatch.setattr(sv, "METHODS", MappingProxyType(SOME))
    return module


@pytest.mark.slow
def test_it_writes_what_it_measured(script: ModuleType, tmp_path: Path) -> None:
    out, page, picture = (tmp_path / "new" / name for name in ("all.md", "page.md", "methods.png"))
    written = ["--out", str(out), "--page", str(page), "--picture", str(picture)]
    assert script.main([*MODEL, "--batches", "1", "2", "--rounds", "1", *written]) == 0

    text = out.read_text()
    for mode in ("inference", "training"):
        for batch in (1, 2):
            heading = f"## vit_tiny_patch16_224, {mode}, float32, eager, batch {batch}"
            assert text.count(f"{heading}\n") == 1
    (model,) = json.loads(out.with_suffix(".json").read_text())["models"]
    cut = {"the lengths of ToMe, cut by hand", "the lengths of ToMe, r = 13, cut by hand"}
    variants = {"model", "EViT", "ToMe", "PatchDropout", "ToMe, r = 13"}
    assert set(model["macs"]) == variants | cut
    modes: dict[str, set[str]] = {}
    for row in model["results"]:
        modes.setdefault(row["variant"], set()).add(row["setting"]["mode"])
        assert row["limit"] == pytest.approx(model["macs"]["model"] / model["macs"][row["variant"]])
    assert modes.pop("model") == {"inference", "training"}
    assert modes.pop("PatchDropout") == {"training"}
    assert set.union(*modes.values()) == {"inference"}

    first = page.read_text()
    assert "random weights" in first
    assert "The weights of the model are random" in first
    for method in SOME.values():
        assert f"### {method.name}\n" in first
    with Image.open(picture) as drawn:
        assert drawn.width > drawn.height > 200

    page.unlink()
    again = ["--results", str(out.with_suffix(".json")), "--page", str(page)]
    assert script.main([*MODEL, *again]) == 0
    assert page.read_text() == first


@pytest.mark.slow
def test_what_is_cut_by_hand_has_the_lengths_of_the_method(script: ModuleType) -> None:
    args = script.parse([*MODEL])
    model = script.build("vit_tiny_patch16_224", args).eval()
    fast = sv.rewrite(model, "1-12(8)+merged")
    lengths = script.lengths(fast, args)
    assert lengths == [*(197 - 8 * layer for layer in range(1, 12)), 1]

    whole = script.OnlyCut(model, [197] * 12)
    x = script.one_image(model, args)
    with torch.no_grad():
        torch.testing.assert_close(whole(x), model(x))
    assert script.counted(whole, args) == sv.inspect(fast).baseline_macs

    attention = sum(4 * n * 24**2 + 2 * n**2 * 24 for n in (197, *lengths[:-1]))
    mlp = sum(8 * n * 24**2 for n in lengths)
    ends = 196 * 3 * 4**2 * 24 + 24 * 1000
    cut = script.OnlyCut(model, lengths)
    assert script.counted(cut, args) == attention + mlp + ends


@pytest.mark.every_case
@pytest.mark.parametrize(
    ("change", "missed"),
    [
        ({}, True),
        ({"variant": "ToMe, r = 13"}, True),
        ({"variant": "EViT"}, False),
        ({"speed": (1.36, 1.3, 1.4)}, False),
        ({"device": "cuda"}, False),
        ({"precision": "bfloat16"}, False),
        ({"model_kwargs": {"depth": 3}}, False),
    ],
)
def test_a_missed_target_is_told(change: dict[str, Any], missed: bool, script: ModuleType) -> None:
    result = script.Result(
        script.Setting("inference", "float32", False, 8),
        change.get("variant", "ToMe"),
        1.0,
        change.get("speed", (1.35, 1.3, 1.4)),
        1.4,
        None,
    )
    asked = Namespace(**{"device": "cpu", "precision": "float32", "model_kwargs": {}} | change)
    told = list(script.misses(asked, [script.Measured(script.MODEL, {}, [result])]))
    assert bool(told) is missed


def test_patches_have_the_mean_colour_of_their_token() -> None:
    picture = torch.arange(3 * 4 * 6, dtype=torch.float32).view(3, 4, 6) / 72
    drawn = mean_colours(picture, torch.tensor([1, 3, 1, 3, 2, 1]), Grid(2, 3))
    patches = [picture[:, y : y + 2, x : x + 2] for y in (0, 2) for x in (0, 2, 4)]
    mean = torch.stack([patches[i] for i in (0, 2, 5)]).mean((0, 2, 3))
    for y, x in ((0, 0), (0, 4), (2, 4)):
        torch.testing.assert_close(drawn[:, y, x], mean)
        torch.testing.assert_close(drawn[:, y + 1, x + 1], mean)
    torch.testing.assert_close(drawn[:, 2, 2], patches[4].mean((1, 2)))
