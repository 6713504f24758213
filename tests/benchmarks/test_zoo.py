"""The zoo, and the checker behind it: it must see every kind of wrong rewrite."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch import fx, nn
from typer.testing import CliRunner

import skipvit_fx
import zoo
from skipvit_fx.cli.models import SpecError, parse_spec
from skipvit_fx.graph.record import record_of
from skipvit_fx.ops.skip import Keep, PutBack
from skipvit_fx.plan import Plan
from skipvit_fx.testing import Reference, check_rewrite, randomize, relative_error
from support.models import BY_NAME, layout_of
from support.once import made_once
from support.reference import masked_reference
from zoo import Kind, Row, default_plan, expand, page, parameter_bytes, read_rows, survey

VIT = "vit_tiny_patch16_224"
TINY = {"img_size": 64, "depth": 4}
PLAN = "1,3(30%,40%)+4"
GIB = 2**30


# -- the checker ----------------------------------------------------------------------------------------------


@made_once
def rewritten() -> tuple[nn.Module, Any, torch.Tensor]:
    """A model, its rewrite and images."""
    family = BY_NAME["vit"]
    model, x = family.build(), family.input()
    return model, skipvit_fx.rewrite(model, PLAN, example_inputs=x), x


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "cait", "beit", "rope-mixed"])
def test_two_references_agree(name: str) -> None:
    """That of this package, which shares the finding of layers, and the tests' own, which shares nothing."""
    family = BY_NAME[name]
    model, x = family.build(), family.input()
    fast = skipvit_fx.rewrite(model, PLAN, example_inputs=x, score="mean")
    reference = Reference(model, x)
    check = reference.check(fast, x)
    assert check.exact
    assert reference.depth == 4
    got, _ = reference.run(record_of(fast), check.selections, x)
    plan: dict[str, Any] = {"stages": [(1, "0.3"), (3, "0.4")], "return_layer": 4}
    with torch.no_grad():
        wanted = masked_reference(model, x, layout_of(model), score="mean", **plan)
    assert relative_error(got, wanted.output) < 1e-5


def _keep_others(fast: fx.GraphModule) -> None:
    """The kept rows are not those that were selected."""
    for module in fast.modules():
        if isinstance(module, Keep):
            module.register_forward_pre_hook(lambda m, args: (args[0], args[1].roll(1, 0)))


def _return_in_order(fast: fx.GraphModule) -> None:
    """Tokens return in another order, which the class token alone does not show."""
    for module in fast.modules():
        if isinstance(module, PutBack):
            module.register_forward_hook(lambda m, args, out: out.flip(1))


def _mask_forgotten(fast: fx.GraphModule) -> None:
    """One attention sees other values."""
    for node in fast.graph.nodes:
        if node.target is torch.nn.functional.scaled_dot_product_attention:
            node.args = (node.args[0], node.args[2], node.args[1], *node.args[3:])
    fast.recompile()


@pytest.mark.parametrize("spoil", [_keep_others, _return_in_order, _mask_forgotten])
@pytest.mark.slow
def test_a_wrong_graph_is_seen(spoil: Callable[[fx.GraphModule], None]) -> None:
    family = BY_NAME["vit"]
    model, x = family.build(), family.input()
    fast = skipvit_fx.rewrite(model, PLAN, example_inputs=x)
    assert check_rewrite(model, fast, x).exact
    spoil(fast)
    assert not check_rewrite(model, fast, x).exact


@pytest.mark.slow
def test_the_reference_is_not_the_model() -> None:
    model, fast, x = rewritten()
    with torch.no_grad():
        assert relative_error(fast(x), model(x)) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    "plan", ["1,3(30%,40%)", "1,2,3(50%,50%,50%)+4+fused", "1,2(50%,50%)+fused"]
)
def test_tokens_that_never_return_or_are_fused(plan: str) -> None:
    family = BY_NAME["reg4-gap"]
    model, x = family.build(), family.input()
    fast = skipvit_fx.rewrite(model, plan, example_inputs=x)
    assert check_rewrite(model, fast, x).exact
    _keep_others(fast)
    assert not check_rewrite(model, fast, x).exact


@pytest.mark.slow
def test_where_it_does_not_apply() -> None:
    model, fast, x = rewritten()
    skipvit_fx.set_skipping(fast, False)
    with pytest.raises(skipvit_fx.SkipViTError, match="switched off"):
        check_rewrite(model, fast, x)
    with pytest.raises(ValueError, match="eval mode"):
        check_rewrite(model, rewritten()[1].train(), x)
    with pytest.raises(ValueError, match="eval mode"):
        Reference(model.train(), x)


def test_relative_error() -> None:
    one = torch.ones(2)
    assert relative_error({"a": one, "b": (one, None)}, {"a": one, "b": [one, None]}) == 0
    assert relative_error(one * 3, one * 2) == 0.5
    assert str(relative_error([one, one * torch.nan], [one, one])) == "nan"
    wrong: list[tuple[Any, Any]] = [
        (torch.ones(3), one),
        ({"a": one}, {"b": one}),
        ([one], [one, one]),
        (None, one),
    ]
    for got, wanted in wrong:
        with pytest.raises(ValueError, match=r"expected .*, got"):
            relative_error(got, wanted)


def test_weights_move_and_the_seed_decides_where() -> None:
    def build(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        return dict(randomize(BY_NAME["vit-layerscale-qknorm"].build(), seed).state_dict())

    first, again, other = build(1), build(1), build(2)
    fresh = BY_NAME["vit-layerscale-qknorm"].build().state_dict()
    for key, value in first.items():
        assert torch.equal(value, again[key]), key
        assert not torch.equal(value, other[key]), key
        assert not torch.equal(value, fresh[key]), key
        assert value.isfinite().all(), key
    assert first["blocks.0.ls1.gamma"].abs().mean() > 0.3
    norm = nn.BatchNorm2d(4)
    randomize(norm)
    assert norm.running_var is not None
    assert not torch.equal(norm.running_var, torch.ones(4))


# -- models by name -------------------------------------------------------------------------------------------


def make() -> nn.Module:
    return nn.Linear(2, 2)


class TestSpecs:
    def test_names(self) -> None:
        assert str(parse_spec("vit_tiny_patch16_224")) == "timm:vit_tiny_patch16_224"
        assert parse_spec("torchvision:vit_b_16", img_size=None, depth=2).options == {"depth": 2}
        assert str(parse_spec("module:a.b:c")) == "module:a.b:c"

    def test_wildcards(self) -> None:
        assert expand("torchvision:vit_b_*") == ["torchvision:vit_b_16", "torchvision:vit_b_32"]
        assert "timm:vit_tiny_patch16_224" in expand("vit_tiny_patch16_*")
        assert expand("hf:dinov2") == ["hf:dinov2"]

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("flax:vit", "cannot read the model"),
            ("timm:", "cannot read the model"),
            ("vit_no_such*", "no model matches"),
            ("hf:*", "no wildcards"),
        ],
    )
    @pytest.mark.slow
    def test_bad_names(self, text: str, said: str) -> None:
        with pytest.raises(SpecError, match=said) as caught:
            expand(text)
        assert caught.value.hint

    @pytest.mark.parametrize(
        ("text", "said", "hint"),
        [
            ("vit_tiny_patch16_225", "timm has no model", "vit_tiny_patch16_224"),
            ("torchvision:vit_b_17", "torchvision has no model", "vit_b_16"),
            ("module:test_zoo", "cannot read", "module:package.module:factory"),
            ("module:no_such:make", "cannot be imported", "PYTHONPATH"),
            ("module:math:pi2", "cannot be imported", "PYTHONPATH"),
            ("module:builtins:dict", "returned a dict", "torch.nn.Module"),
        ],
    )
    def test_what_cannot_be_built(self, text: str, said: str, hint: str) -> None:
        with pytest.raises(SpecError, match=said) as caught:
            parse_spec(text).build()
        assert hint in caught.value.hint

    def test_an_option_too_many(self) -> None:
        with pytest.raises(SpecError, match="cannot be built with"):
            parse_spec("resnet18", depth=3).build()

    def test_a_missing_package_names_its_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing(name: str) -> None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        monkeypatch.setattr("importlib.import_module", missing)
        with pytest.raises(SpecError, match="timm is not installed") as caught:
            parse_spec("vit_tiny_patch16_224").build()
        assert caught.value.hint == "pip install 'skipvit_fx[timm]'"

    def test_size_without_allocating(self) -> None:
        spec = parse_spec("vit_tiny_patch16_224", depth=1)
        state = spec.build().state_dict().values()
        assert parameter_bytes(spec) == sum(t.numel() * t.element_size() for t in state)


# -- the zoo --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "plan"),
    [(1, "1(30%)+2"), (2, "1,2(30%,30%)+3"), (4, "1,2(30%,30%)+4"), (12, "4,8(30%,30%)+10")],
)
def test_default_plan_fits(depth: int, plan: str) -> None:
    assert default_plan(depth) == plan
    for layers, kind in product(range(1, 50), Kind):
        Plan.parse(default_plan(layers, kind)).check(layers)


@pytest.mark.parametrize(
    ("kind", "plan"), [(Kind.SPANS, "1(30%)+2;2(9)+4"), (Kind.MERGED, "1-2(10%)+4+merged")]
)
@pytest.mark.slow
def test_other_kinds_of_plans(kind: Kind, plan: str) -> None:
    row = survey("timm:vit_tiny_patch16_224", limit=GIB, kind=kind, **TINY)
    assert (row.status, row.plan) == ("exact", plan)


@pytest.mark.slow
def test_exact_refused_skipped_and_failed() -> None:
    exact = survey("timm:vit_tiny_patch16_224", limit=GIB, **TINY)
    assert exact.status == "exact"
    assert (exact.layers, exact.prefix, exact.patches, exact.plan) == (4, 1, 16, "1,2(30%,30%)+4")
    assert exact.error is not None
    assert exact.error < 1e-4
    refused = survey("timm:resnet18", limit=GIB)
    assert refused.status == "refused"
    assert refused.reason
    assert survey("timm:no_such_model", limit=GIB).status == "skipped"
    failed = survey("module:zlib:crc32", limit=GIB)
    assert failed.status in ("skipped", "error")
    assert failed.reason


@pytest.mark.slow
def test_a_wrong_rewrite_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(*args: Any, **kwargs: Any) -> nn.Module:
        fast = rewrite(*args, **kwargs)
        _return_in_order(fast)
        return fast

    rewrite = skipvit_fx.rewrite
    monkeypatch.setattr(skipvit_fx, "rewrite", spoiled)
    row = survey("timm:vit_tiny_patch16_224", limit=GIB, **TINY)
    assert (row.status, row.reason) == ("wrong", "differs from the reference")


@pytest.mark.slow
def test_what_does_not_fit_is_made_shallower_and_says_so() -> None:
    name, full = "timm:vit_tiny_patch16_224", parameter_bytes(parse_spec("vit_tiny_patch16_224"))
    options, note = zoo._fit(name, full // 2, {})
    assert options == {"depth": 4}
    assert note.startswith("made 4 layers deep")
    assert zoo._fit(name, full, {}) == ({}, "")
    assert "too large with 2 layers" in survey(name, limit=10).reason
    assert "its depth cannot be set" in survey("timm:resnet18", limit=10).reason


@pytest.mark.slow
def test_finished_models_are_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = []

    def pretend(name: str, **_: Any) -> Row:
        done.append(name)
        if name == "c":
            raise KeyboardInterrupt
        return Row(name, "exact")

    monkeypatch.setattr(zoo, "survey", pretend)
    log = tmp_path / "deep" / "zoo.jsonl"
    with pytest.raises(KeyboardInterrupt):
        zoo.run(["a", "b", "c"], log, lambda _: None, limit=GIB)
    with log.open("a") as file:
        file.write('{"name": "d", "sta')
    assert list(read_rows(log)) == ["a", "b"]
    log.write_text(log.read_text().rpartition("\n")[0] + "\n")
    rows = zoo.run(["b", "a", "e"], log, lambda _: None, limit=GIB)
    assert done == ["a", "b", "c", "e"]
    assert [row.name for row in rows] == ["b", "a", "e"]
    assert [json.loads(line)["name"] for line in log.read_text().splitlines()] == ["a", "b", "e"]


def test_page() -> None:
    rows = [
        Row("timm:a", "exact", 12, 1, 196, "4(30%)+6", 1.23e-6, 1.51, note="made 4 layers deep"),
        Row("timm:b", "refused", reason="tokens | mix\nhere"),
    ]
    rows = [replace(row, on="torch 2.14, on a desk") for row in rows]
    text = page(rows, "python benchmarks/zoo.py a b")
    assert "`python benchmarks/zoo.py a b`" in text
    assert "random" in text
    assert "with torch 2.14, on a desk." in text
    elsewhere = page([*rows, replace(rows[0], on="torch 2.11, on a chair")], "python")
    assert (
        "torch 2.14, on a desk (2 of the models); and with torch 2.11, on a chair (1 of"
        in elsewhere
    )
    assert "- 1 exact" in text
    assert "wrong" not in text
    line = "| timm:a | 12 | 1 | 196 | `4(30%)+6` | exact | 1.2e-06 | 1.5 | made 4 layers deep |"
    assert line in text
    assert "| timm:b |  |  |  |  | refused |  |  | tokens \\| mix here |" in text


@pytest.mark.slow
def test_the_script_writes_a_page_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(zoo.main)
    runner, out = CliRunner(), tmp_path / "zoo.md"
    asked = [VIT, "--img-size", "64", "--depth", "3", "--out", str(out)]
    result = runner.invoke(app, asked)
    assert result.exit_code == 0, result.output
    assert f"exact    timm:{VIT}" in result.stdout
    assert f"| timm:{VIT} | 3 | 1 | 16 |" in out.read_text()
    # a second run takes the row from beside the page
    rows = out.with_suffix(".jsonl")
    rows.write_text(rows.read_text().replace('"exact"', '"wrong"'))
    again = runner.invoke(app, [*asked, "--json"])
    assert again.exit_code == 1
    assert json.loads(again.stdout)[0]["status"] == "wrong"
    assert runner.invoke(app, [*asked, "--fresh"]).exit_code == 0


@pytest.mark.parametrize(
    ("names", "words"),
    [([], "no models named"), (["timm:qqq*"], "no model matches"), (["hf:v*"], "no wildcards")],
)
def test_bad_names(
    names: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [zoo.__file__, *names, "--out", str(tmp_path / "zoo.md")])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(zoo.__file__), run_name="__main__")
    said = left.value.code
    assert isinstance(said, str), "Python prints it and exits with 1"
    assert said.startswith(f"error: {words}")
    assert "hint: " in said
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_every_isotropic_model_is_exact(tmp_path: Path) -> None:
    names = zoo.isotropic_names()
    assert len(names) > 300
    rows = zoo.run(names, tmp_path / "zoo.jsonl", lambda _: None, limit=3 * GIB)
    assert [(row.name, row.status, row.reason) for row in rows if row.status != "exact"] == []


@pytest.mark.slow
def test_every_other_module_is_exact_or_refused(tmp_path: Path) -> None:
    rows = zoo.run(zoo.other_names(), tmp_path / "zoo.jsonl", lambda _: None, limit=3 * GIB)
    assert [row for row in rows if row.status in ("wrong", "error")] == []
