"""What looks public is declared public, and the reverse."""

from __future__ import annotations

import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import timm
import torch

import skipvit_fx

ROOT = Path(__file__).resolve().parents[1]


def public_looking(module: ModuleType | SimpleNamespace) -> set[str]:
    """Names without underscore that are not submodules."""
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }


def test_declared_is_what_is_there() -> None:
    assert public_looking(skipvit_fx) | {"__version__"} == set(skipvit_fx.__all__)
    assert len(skipvit_fx.__all__) == len(set(skipvit_fx.__all__))


def test_the_comparison_sees_both_mistakes() -> None:
    module = SimpleNamespace(__all__=["a"], a=1, _hidden=2, tests=skipvit_fx.__class__("tests"))
    assert public_looking(module) == {"a"}
    assert public_looking(SimpleNamespace(a=1, forgotten=2)) != {"a"}
    assert public_looking(SimpleNamespace()) != {"a"}


def test_every_public_name_is_documented() -> None:
    for name in set(skipvit_fx.__all__) - {"METHODS", "__version__"}:  # which are values
        assert getattr(skipvit_fx, name).__doc__, name


def test_every_error_is_one_of_ours_and_has_a_hint() -> None:
    for name in skipvit_fx.__all__:
        value = getattr(skipvit_fx, name)
        if name.endswith("Error"):
            assert issubclass(value, skipvit_fx.SkipViTError), name
            assert value("what is wrong", hint="what to do").hint == "what to do"


def test_the_version_is_that_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert skipvit_fx.__version__ == project["version"]


@pytest.mark.slow
def test_a_report_in_a_notebook_is_its_text() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)
    fast = skipvit_fx.rewrite(model, "1(50%)")
    for report in (skipvit_fx.inspect(fast), skipvit_fx.find_attention(model)):
        assert repr(report) == str(report)
        assert "blocks.1.attn" in repr(report)
    plan = skipvit_fx.Plan.parse("6(55%)+11")
    assert repr(plan) == "Plan('6(55%)+11')"


def test_skipping_for_a_while() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2).eval()
    fast, x = skipvit_fx.rewrite(model, "1(50%)"), torch.randn(1, 3, 32, 32)
    on = fast(x)
    with skipvit_fx.skipping(fast, False):
        assert torch.equal(fast(x), model(x))
        with skipvit_fx.skipping(fast, True):
            assert torch.equal(fast(x), on)
        assert torch.equal(fast(x), model(x))
    assert torch.equal(fast(x), on)
    with pytest.raises(RuntimeError), skipvit_fx.skipping(fast, False):
        fast(x[:, :2])
    assert torch.equal(fast(x), on)
    assert not torch.equal(on, model(x))
    with pytest.raises(skipvit_fx.NotRewrittenError), skipvit_fx.skipping(model, False):
        pass
