"""The command skipvit search."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

import skipvit_fx as sv
from skipvit_fx.cli.app import app

SMALL = ["vit_tiny_patch16_224", "--img-size", "32", "--depth", "2", "--trials", "0"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six pictures, two of them one folder deeper."""
    for i in range(6):
        place = tmp_path / "pictures" / ("more" if i > 3 else "")
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (40 * i, 255 - 40 * i, 90)).save(place / f"{i}.png")
    (tmp_path / "pictures" / "notes.txt").write_text("no picture")
    return tmp_path / "pictures"


def search(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["search", *SMALL, *arguments])


@pytest.mark.slow
def test_a_table_and_pictures(folder: Path, tmp_path: Path) -> None:
    pictures = [tmp_path / "front.png", tmp_path / "profile.png"]
    plots = ["--plot", str(pictures[0]), "--plot-profile", str(pictures[1])]
    result = search("--images", str(folder), *plots, "--batch", "4")
    assert result.exit_code == 0, result.output
    assert "agreement on 3 images, 3 held out" in result.stdout
    assert "1(75%)+3" in result.stdout
    assert "layer" in result.stdout
    assert "with random weights it means nothing" in result.stdout
    assert all(path.stat().st_size for path in pictures)


@pytest.mark.slow
def test_a_report_of_the_first_four_pictures(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "front.html"
    result = search("--images", str(folder), "--report", str(out), "--score", "mean")
    assert result.exit_code == 0, result.output
    assert f"report written to {out}" in result.stderr
    text = out.read_text(encoding="utf-8")
    assert "The weights are random" in text
    assert "score=&#39;mean&#39;" in text
    assert [name for name in map("{}.png</h3>".format, range(6)) if name in text] == [
        f"{i}.png</h3>" for i in range(4)
    ]


def test_a_report_that_cannot_be_written_is_told_before_the_work(
    folder: Path, tmp_path: Path
) -> None:
    result = search("--images", str(folder), "--report", str(tmp_path / "no" / "front.html"))
    assert result.exit_code == 2
    assert "does not exist" in result.stderr
    assert "hint" in result.stderr


def test_labels_and_json(folder: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.csv"
    labels.write_text("0.png,3\n1.png, 5\n\n4.png,7\n5.png,7\n")
    options = ["--metric", "accuracy", "--no-measure", "--holdout", "0", "--budget", "0.9"]
    result = search("--images", str(folder), "--labels", str(labels), *options, "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert (said["images"], said["metric"], said["budget"]) == (4, "accuracy", 0.9)
    assert said["front"]


@pytest.mark.parametrize(
    ("line", "words"), [("0.png;3", "line 1 of"), ("x.png,1", "that"), ("0.png,dog", "line 1 of")]
)
def test_labels_that_are_none(folder: Path, tmp_path: Path, line: str, words: str) -> None:
    labels = tmp_path / "labels.csv"
    labels.write_text(line)
    result = search("--images", str(folder), "--labels", str(labels), "--metric", "accuracy")
    assert result.exit_code == 2
    assert words in result.stderr
    assert "hint" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--budget", "12s"], "budget must be a share"),
        (["--metric", "truth"], "metric must be one of"),
        (["--storage", "study.txt"], "what kind of storage"),
        (["--device", "toaster"], "cannot be used"),
    ],
)
def test_what_is_wrong_is_said(folder: Path, arguments: list[str], words: str) -> None:
    result = search("--images", str(folder), *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_no_pictures(tmp_path: Path) -> None:
    result = search("--images", str(tmp_path))
    assert result.exit_code == 2
    assert "holds no pictures" in result.stderr


def test_ctrl_c_prints_what_was_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = sv.search

    def stopped(*args: object, **kwargs: object) -> sv.SearchResult:
        def stop(progress: sv.Progress) -> None:
            if progress.evaluated == 3:
                raise KeyboardInterrupt

        return real(*args, **{**kwargs, "progress": stop})  # type: ignore[arg-type]

    monkeypatch.setattr(sv, "search", stopped)
    result = search("--images", str(folder), "--no-measure")
    assert result.exit_code == 0
    assert "Interrupted: this is the front so far" in result.stdout
