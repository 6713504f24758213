"""The command: what it prints, what --json prints, and how it fails."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from skipvit_fx import scores
from skipvit_fx.cli.app import app
from support.commands import share_rewrites

PICTURE = str(Path(__file__).parents[2] / "examples" / "images" / "chelsea.png")
VIT = "vit_tiny_patch16_224"
SMALL = ["--img-size", "64", "--depth", "3"]
PLAN = "1(30%)+3"
BAD_INPUT, REFUSED = 2, 1


@pytest.fixture(autouse=True)
def _shared(monkeypatch: pytest.MonkeyPatch) -> None:
    share_rewrites(monkeypatch)


@pytest.fixture
def own_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module with scores; what it registers is forgotten afterwards."""
    (tmp_path / "own_score.py").write_text(
        "import skipvit_fx as sv\n"
        "NUMBER = 1\n"
        "def unnamed(tokens, *, keys):\n    return keys.mean((1, 3))\n"
        "def named(tokens):\n    return tokens.sum(-1)\n"
        "def greedy(tokens, everything):\n    return tokens\n"
        "sv.register_score('own-name', named)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_score", raising=False)
    monkeypatch.setattr(scores, "_functions", dict(scores._functions))
    return "own_score"


def skipvit(*args: str) -> Result:
    return CliRunner().invoke(app, list(args))


def said_as_json(*args: str) -> Any:
    result = skipvit(*args, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def assert_fails(result: Result, code: int, *words: str) -> None:
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr


class TestSites:
    def test_table(self) -> None:
        result = skipvit("sites", VIT, *SMALL)
        assert result.exit_code == 0, result.output
        assert "3 layers, 1 prefix rows, 16 patches, with a class token" in result.stdout
        assert "blocks.2.attn" in result.stdout
        assert "random weights" in result.stderr

    def test_json(self) -> None:
        said = said_as_json("sites", f"timm:{VIT}", *SMALL, "--explain", "blocks.0.mlp")
        assert [layer["index"] for layer in said["layers"]] == [1, 2, 3]
        assert "keeps tokens apart" in said["explain"]["blocks.0.mlp"]

    def test_explain(self) -> None:
        places = ("--explain", "blocks.1.attn", "--explain", "blocks.1.atn")
        first, second = skipvit("sites", VIT, *SMALL, *places).stdout.splitlines()
        assert "the attention of layer 2" in first
        assert "Close to it: blocks.1.attn" in second

    def test_a_refused_model_has_a_report_and_a_code(self) -> None:
        result = skipvit("sites", "resnet18")
        assert result.exit_code == REFUSED
        assert "ResNet: no layers found" in result.stdout
        assert "Refused: " in result.stdout
        assert "hint: " in result.stdout

    def test_prefix_tokens(self) -> None:
        said = said_as_json("sites", VIT, *SMALL, "--prefix-tokens", "2")
        assert (said["prefix_tokens"], said["patches"]) == (2, 15)


class TestRewrite:
    def test_table(self) -> None:
        result = skipvit("rewrite", VIT, PLAN, *SMALL)
        assert result.exit_code == 0, result.output
        assert "blocks.1.attn" in result.stdout

    def test_json(self) -> None:
        said = said_as_json("rewrite", VIT, PLAN, *SMALL)
        assert [layer["attention_tokens"] for layer in said["layers"]] == [17, 13, 17]

    @pytest.mark.slow
    def test_options_reach_the_compiler(self) -> None:
        said = said_as_json("rewrite", VIT, PLAN, *SMALL, "--cut", "block", "--keep-dead-tokens")
        assert [layer["ffn_tokens"] for layer in said["layers"]] == [17, 13, 17]

    def test_save(self, tmp_path: Path) -> None:
        target = tmp_path / "fast"
        result = skipvit("rewrite", VIT, PLAN, *SMALL, "--save", str(target))
        assert result.exit_code == 0, result.output
        assert target.exists()
        assert "saved to" in result.stderr

    def test_own_factory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "own_vit.py").write_text(
            "import timm\n"
            f"def make():\n    return timm.create_model({VIT!r}, img_size=64, depth=3)\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        assert len(said_as_json("rewrite", "module:own_vit:make", PLAN)["layers"]) == 3

    @pytest.mark.parametrize("score", ["received", "keys", "values"])
    @pytest.mark.slow
    def test_named_scores(self, score: str) -> None:
        assert said_as_json("rewrite", VIT, PLAN, *SMALL, "--score", score)["score"] == score

    @pytest.mark.slow
    def test_own_score(self, own_score: str, tmp_path: Path) -> None:
        """From a module, by the name that the module gave it, so that it can be saved; and by that name."""
        target, place = tmp_path / "fast", f"module:{own_score}:"
        said = said_as_json("rewrite", VIT, PLAN, *SMALL, "--score", f"{place}unnamed")
        assert said["score"] == "unnamed"
        for score in (f"{place}named", "own-name"):
            args = ("--score", score, "--save", str(target))
            assert said_as_json("rewrite", VIT, PLAN, *SMALL, *args)["score"] == "own-name"
            assert target.exists()
            target.unlink()

    def test_own_scores_that_are_none(self, own_score: str) -> None:
        for score, words in {
            f"module:{own_score}": ["cannot read", "module:package.module:function"],
            f"module:{own_score}:none": ["'none' cannot be imported", "PYTHONPATH"],
            "module:no_such:named": ["'named' cannot be imported", "No module named 'no_such'"],
            f"module:{own_score}:NUMBER": ["is not a function"],
            f"module:{own_score}:greedy": ["asks for 'everything'", "keys, queries, values"],
        }.items():
            result = skipvit("rewrite", VIT, PLAN, *SMALL, "--score", score)
            assert_fails(result, BAD_INPUT, *words)


class TestDiff:
    @pytest.mark.slow
    def test_text(self) -> None:
        result = skipvit("rewrite", VIT, PLAN, *SMALL, "--diff")
        assert "+stage_1_scores" in result.stdout

    def test_json(self) -> None:
        said = said_as_json("rewrite", VIT, PLAN, *SMALL, "--diff")
        assert said["plan"] == PLAN
        assert any("stage_1_returned" in line for line in said["diff"])


class TestTrace:
    def test_indices_and_picture(self, tmp_path: Path) -> None:
        out = tmp_path / "kept.png"
        said = said_as_json("trace", VIT, PICTURE, "1,2(25%,50%)+3", *SMALL, "--out", str(out))
        first, second = said["stages"]
        assert sorted(first["kept"] + first["dropped"]) == list(range(16))
        assert sorted(second["kept"] + second["dropped"]) == first["kept"]
        assert (len(first["kept"]), len(second["kept"])) == (12, 6)
        with Image.open(out) as drawn:
            assert drawn.size == (3 * 64, 64)
            shown, kept = drawn.crop((0, 0, 64, 64)), drawn.crop((64, 0, 128, 64))
            row, column = divmod(first["dropped"][0], 4)
            place = (16 * column + 8, 16 * row + 8)
            assert sum(kept.getpixel(place)) < sum(shown.getpixel(place)) / 3
            row, column = divmod(first["kept"][0], 4)
            place = (16 * column + 8, 16 * row + 8)
            assert kept.getpixel(place) == shown.getpixel(place)

    @pytest.mark.slow
    def test_merged_patches_have_one_colour(self, tmp_path: Path) -> None:
        out = tmp_path / "kept.png"
        said = said_as_json("trace", VIT, PICTURE, "1(25%)+3+merged", *SMALL, "--out", str(out))
        (stage,) = said["stages"]
        assert (len(stage["kept"]), len(stage["dropped"])) == (12, 4)
        with Image.open(out) as drawn:
            kept = drawn.crop((64, 0, 128, 64))
        places = [(16 * (i % 4) + 8, 16 * (i // 4) + 8) for i in range(16)]
        colours = [kept.getpixel(place) for place in places]
        for owner in set(stage["owner"]):
            own = {c for c, other in zip(colours, stage["owner"], strict=True) if other == owner}
            assert len(own) == 1
        assert len(set(colours)) > 8
        text = skipvit("trace", VIT, PICTURE, "1(25%)+3+merged", *SMALL).stdout
        assert text.startswith("layer 1: kept 12, merged into others 4\n  merged into others: ")

    def test_text(self) -> None:
        result = skipvit("trace", VIT, PICTURE, PLAN, *SMALL)
        assert result.stdout.startswith("layer 1: kept 12, dropped 4\n  dropped: ")

    def test_kept_patches_are_drawn_in_the_terminal(self) -> None:
        """Where colours mean nothing, by shape: a block where a patch is left."""
        stage = said_as_json("trace", VIT, PICTURE, PLAN, *SMALL)["stages"][0]
        text = skipvit("trace", VIT, PICTURE, PLAN, *SMALL).stdout
        lines = text.splitlines()
        start = next(i for i, line in enumerate(lines) if line.strip() == "layer 1") + 1
        drawn = [line.ljust(8) for line in lines[start : start + 4]]
        for patch in range(16):
            row, column = divmod(patch, 4)
            wanted = "██" if patch in stage["kept"] else "  "
            assert drawn[row][2 * column : 2 * column + 2] == wanted

    def test_a_file_or_json_is_instead_of_a_drawing(self, tmp_path: Path) -> None:
        args = ("trace", VIT, PICTURE, PLAN, *SMALL)
        assert "█" not in skipvit(*args, "--out", str(tmp_path / "kept.png")).stdout
        assert "█" not in skipvit(*args, "--json").stdout

    def test_no_image(self, tmp_path: Path) -> None:
        file = tmp_path / "not.png"
        file.write_text("text")
        for path in (file, tmp_path / "none.png"):
            result = skipvit("trace", VIT, str(path), PLAN, *SMALL)
            assert_fails(result, BAD_INPUT, "is not a readable image", "hint: ")

    def test_picture_that_cannot_be_written(self, tmp_path: Path) -> None:
        out = str(tmp_path / "kept.unknown")
        result = skipvit("trace", VIT, PICTURE, PLAN, *SMALL, "--out", out)
        assert_fails(result, BAD_INPUT, "cannot write", ".png")


class TestReport:
    @pytest.mark.slow
    def test_a_page(self, tmp_path: Path) -> None:
        out = tmp_path / "page.html"
        args = ("report", VIT, PLAN, PICTURE, PICTURE, "-o", str(out), *SMALL, "--rounds", "1")
        result = skipvit(*args)
        assert result.exit_code == 0, result.output
        assert result.stdout == f"written to {out}, {out.stat().st_size / 1e6:.1f} MB\n"
        text = out.read_text(encoding="utf-8")
        assert "The weights are random" in text
        assert text.count(">chelsea.png</h3>") == 2
        said = said_as_json(*args[:-2], "--rounds", "0")
        assert said == {"path": str(out), "bytes": out.stat().st_size}
        assert "not measured" in out.read_text(encoding="utf-8")

    def test_what_is_wrong_is_said_before_the_work(self, tmp_path: Path) -> None:
        missing, folder = str(tmp_path / "none.png"), str(tmp_path / "no" / "page.html")
        args = ("report", VIT, PLAN)
        assert_fails(skipvit(*args, PICTURE, "-o", folder), BAD_INPUT, "does not exist", "hint: ")
        out = str(tmp_path / "page.html")
        result = skipvit(*args, missing, "-o", out, *SMALL)
        assert_fails(result, BAD_INPUT, "is not a readable image", "hint: ")
        assert list(tmp_path.iterdir()) == []


class TestFailures:
    @pytest.mark.parametrize(
        ("args", "words"),
        [
            (["rewrite", VIT, "1(3.5)+3"], ["3.5 is neither a percentage nor a number", "hint: "]),
            (["rewrite", VIT, "9(30%)", *SMALL], ["layer 9 is out of range", "layers 1 to 3"]),
            (["rewrite", VIT], ["PLAN"]),
            (["rewrite", "vit_tny_patch16_224", PLAN], ["close to it: vit_tiny_patch16_224"]),
            (["sites", "flax:vit"], ["cannot read the model 'flax:vit'", "timm:NAME"]),
            (["rewrite", VIT, PLAN, "--cut", "here"], ["--cut 'here'", "attention, block"]),
            (["rewrite", VIT, PLAN, "--score", "best"], ["--score 'best'", "mean"]),
            (["sites", VIT, "--img-size", "many"], ["Usage: "]),
        ],
    )
    def test_bad_input(self, args: list[str], words: list[str]) -> None:
        assert_fails(skipvit(*args), BAD_INPUT, *words)

    def test_refusal(self) -> None:
        assert_fails(skipvit("rewrite", "resnet18", PLAN), REFUSED, "error: ", "hint: ")

    def test_json_keeps_stdout_clean(self) -> None:
        assert_fails(skipvit("rewrite", "resnet18", PLAN, "--json"), REFUSED)

    @pytest.mark.slow
    def test_without_typer(self) -> None:
        code = "import sys\nsys.modules['typer'] = None\nfrom skipvit_fx.cli import main\nmain()\n"
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1
        assert done.stderr.strip() == "skipvit needs typer: pip install 'skipvit_fx[cli]'"


def test_it_runs_as_a_module(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["skipvit", "rewrite", "--help"])
        with pytest.raises(SystemExit) as left:
            runpy.run_module("skipvit_fx", run_name="__main__")
    assert left.value.code == 0
    assert "rewrite" in capsys.readouterr().out


def test_every_command_has_help() -> None:
    for command in (
        *("sites", "rewrite", "trace", "report", "bench"),
        *("export", "atc-check", "doctor"),
    ):
        result = skipvit(command, "--help")
        assert result.exit_code == 0
        assert "--json" in result.stdout
