"""What the README shows is what happens."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from skipvit_fx.cli.app import app

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")

SMALL = "num_hidden_layers=4, hidden_size=48, num_attention_heads=3, intermediate_size=96, image_size=64, patch_size=16"


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)  # PEFT asks transformers
def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With smaller models of four layers, a plan for these, and smaller images."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL))
    monkeypatch.chdir(tmp_path)
    for shown, used in (
        ('"vit_small_patch16_224"', '"vit_tiny_patch16_224", img_size=64, depth=4'),
        ("6(55%)+11", "2(55%)+4"),
        ("1-12(8)+merged", "1-4(2)+merged"),
        ("4,7,10(30%)+fused", "1,2,3(30%)+fused"),
        ("4(30%)+5;5(30%)+6;6(30%)+7", "1(30%)+2;2(30%)+3;3(30%)+4"),
        ("224, 224", "64, 64"),
        (
            "Dinov2Config()",
            "Dinov2Config(num_hidden_layers=4, hidden_size=48, num_attention_heads=4, mlp_ratio=2)",
        ),
        ("ViTConfig(num_labels=10)", f"ViTConfig(num_labels=10, {SMALL})"),
        ("CLIPConfig()", f"CLIPConfig(vision_config=dict({SMALL}), text_config=dict({SMALL}))"),
    ):
        assert shown in code
        code = code.replace(shown, used)
    exec(code, {"__name__": "readme"})
    assert list(tmp_path.iterdir())


def test_the_commands_exist() -> None:
    """With the options that are named."""
    lines = [line for line in README.splitlines() if line.startswith("skipvit ")]
    assert lines
    for line in lines:
        _, command, *arguments = shlex.split(line, comments=True)
        shown = CliRunner().invoke(app, [command, "--help"])
        assert shown.exit_code == 0, line
        for argument in arguments:
            assert not argument.startswith("--") or argument in shown.stdout, line
