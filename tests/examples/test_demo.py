"""The demo's own parts, and the demo as `make demo` runs it."""

from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch
from PIL import Image
from torch import nn

from support.scripts import load


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    return load("examples/demo.py")


def test_only_dropped_patches_are_dimmed(demo: ModuleType) -> None:
    picture = torch.ones(3, 4, 6)
    dimmed = demo.dim(picture, torch.tensor([0, 5]), rows=2, columns=3)
    kept = torch.tensor([[1, 1, 0, 0, 0, 0]] * 2 + [[0, 0, 0, 0, 1, 1]] * 2, dtype=torch.bool)
    assert torch.equal(dimmed == 1, kept.expand(3, -1, -1))
    assert torch.all(dimmed[:, ~kept] == 0.25)
    assert torch.equal(picture, torch.ones(3, 4, 6))


def test_one_panel_a_stage_beside_the_picture(demo: ModuleType, tmp_path: Path) -> None:
    kept = {4: torch.arange(5), 7: torch.arange(2)}
    figure = demo.draw(torch.rand(3, 32, 48), kept, (2, 3))
    assert [axes.get_title() for axes in figure.axes] == [
        "what the model sees",
        "after layer 4: 5 of 6 patches",
        "after layer 7: 2 of 6 patches",
    ]
    figure.savefig(tmp_path / "demo.png")
    with Image.open(tmp_path / "demo.png") as drawn:
        assert drawn.width > 2 * drawn.height


def test_models_take_turns(demo: ModuleType) -> None:
    calls = []

    class Recorder(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append(self.name)
            return x

    seconds = demo.measure([Recorder("a"), Recorder("b")], torch.zeros(1), rounds=3)
    assert calls == ["a", "a", "b", "b", *["a", "b"] * 3]
    assert [len(times) for times in seconds] == [3, 3]


def test_speed_is_the_ratio_within_each_round(demo: ModuleType) -> None:
    # The machine slows down by the round; the ratio does not.
    assert demo.speed_report([[1.0, 2.0, 4.0], [0.5, 1.0, 2.0]], batch=10, limit=2.5) == (
        "model      200.00 (100.00-400.00) ms per picture, in batches of 10\n"
        "rewritten  100.00 (50.00-200.00) ms per picture, in batches of 10\n"
        "speed-up   2.000 (2.000-2.000) as measured in this run (median, min-max)\n"
        "limit      2.500 by the multiply-adds saved"
    )


def test_classes_side_by_side(demo: ModuleType) -> None:
    before, after = torch.zeros(1000), torch.zeros(1000)
    before[281], after[282] = 20.0, 20.0
    first, second, *_, last = demo.compare(before, after).splitlines()
    assert first.split() == ["model", "rewritten"]
    assert "100.00%  tabby" in second
    assert "100.00%  tiger cat" in second
    assert last == "Logits differ by at most 20; the largest is 20."


@pytest.fixture
def _shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models have three layers."""
    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, depth=3))


@pytest.mark.usefixtures("_shallow")
def test_demo(demo: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "demo.png"
    demo.main(["--plan", "1,2(30%,30%)+3", "--rounds", "1", "--batch", "1", "--out", str(out)])
    said = capsys.readouterr().out
    assert "random weights" in said
    assert "speed-up" in said
    with Image.open(out) as drawn:
        assert drawn.size == (1440, 528)


@pytest.mark.usefixtures("_shallow")
def test_demo_passes_on_the_compilers_hint(demo: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"layer 4 is out of range(.|\n)*hint: "):
        demo.main(["--plan", "4(55%)", "--out", str(tmp_path / "demo.png")])
