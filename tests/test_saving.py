"""Rewritten models on disk, and fingerprints that do not depend on chance."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, fx, nn

import skipvit_fx
from skipvit_fx.graph.fingerprint import fingerprint, first_difference, module_lines, state_lines
from skipvit_fx.graph.record import graph_lines, record_of
from support.models import BY_NAME, TORCHVISION
from support.once import made_once

VIT = BY_NAME["vit"]


@made_once
def rewritten(name: str = "vit", plan: str = "2(55%)+4", **options: Any) -> Any:
    family = BY_NAME[name]
    return skipvit_fx.rewrite(family.build(), plan, example_inputs=family.input(), **options)


def stored(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        header: dict[str, Any] = json.loads(file.metadata()["skipvit"])
    return header


def change(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Write the file again with its header edited."""
    header = stored(path)
    edit(header)
    with safe_open(path, framework="pt") as file:
        names = file.keys()
        weights = {name: file.get_tensor(name) for name in names}
    save_file(weights, path, metadata={"skipvit": json.dumps(header)})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "fast.safetensors"
    skipvit_fx.save(rewritten(), path)
    return path


@pytest.mark.parametrize(
    ("name", "plan", "options"),
    [
        ("vit", "1,3(30%,100/3%)+5", {}),
        ("vit", "2(55%)+4+fused", {"score": "mean"}),
        ("vit", "", {}),
        ("vit", "2(0%)+4", {}),
        ("reg4-map", "2(55%)", {"cut": "block", "eliminate_dead_tokens": False}),
        ("siglip-gap", "2(55%)+4", {"prefix_tokens": 0}),
        ("rope-mixed", "2(55%)+4", {}),
    ],
)
def test_round_trip(name: str, plan: str, options: dict[str, Any], tmp_path: Path) -> None:
    family = BY_NAME[name]
    fast = rewritten(name, plan, **options)
    skipvit_fx.save(fast, tmp_path / "fast.safetensors")
    fresh = family.build(seed=9)
    x = family.input()
    back = skipvit_fx.load(tmp_path / "fast.safetensors", fresh)
    with torch.no_grad():
        assert torch.equal(back(x), fast(x))
    assert back.code == fast.code
    for key, value in fast.state_dict().items():
        assert torch.equal(back.state_dict()[key], value), key
        assert torch.equal(fresh.state_dict()[key], value), "the result shares its parameters"
    ours, theirs = record_of(fast), record_of(back)
    assert theirs.options == replace(ours.options, frontend=ours.frontend)
    assert theirs.before == ours.before


@pytest.mark.slow
def test_inputs_by_name_are_kept(tmp_path: Path) -> None:
    example = {"x": VIT.input()}
    fast = skipvit_fx.rewrite(VIT.build(depth=2), "1(55%)+2", example_inputs=example)
    skipvit_fx.save(fast, tmp_path / "fast")
    back = skipvit_fx.load(tmp_path / "fast", VIT.build(depth=2))
    assert list(record_of(back).kwargs) == ["x"]
    assert record_of(back).kwargs["x"].shape == VIT.input().shape


def test_what_the_file_says(saved: Path) -> None:
    header = stored(saved)
    fast = rewritten()
    lines = module_lines(fast), state_lines(fast.state_dict())
    assert header["options"]["plan"] == "2(55%)+4"
    assert header["versions"]["torch"] == torch.__version__.split("+")[0]
    assert header["fingerprint"] == fingerprint(record_of(fast).computation, *lines)
    assert module_lines(VIT.build()) == module_lines(fast)
    with safe_open(saved, framework="pt") as file:
        assert set(file.keys()) == set(VIT.build().state_dict())


class Tied(nn.Module):
    """Parameters under two names, two buffers that overlap, and one without dimensions."""

    def __init__(self, inner: nn.Module, tie: bool = True) -> None:
        super().__init__()
        self.inner = inner
        self.again: Any = inner.head if tie else nn.Linear(64, 10)
        both = torch.arange(6.0)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("front", both[:4])
        self.register_buffer("back", both[2:])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return out


@pytest.mark.slow
def test_tied_tensors_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    model = Tied(VIT.build(depth=2))
    fast = skipvit_fx.rewrite(model, "1(55%)+2", example_inputs=VIT.input())
    path = tmp_path / "tied.safetensors"
    skipvit_fx.save(fast, path)
    assert stored(path)["tied"] == {
        "again.weight": "inner.head.weight",
        "again.bias": "inner.head.bias",
    }
    back: Any = skipvit_fx.load(path, Tied(VIT.build(depth=2, seed=9)))
    assert back.again.weight is back.inner.head.weight
    with torch.no_grad():
        assert torch.equal(back(VIT.input()), fast(VIT.input()))
    assert back.front.tolist() == [0, 1, 2, 3]
    assert back.back.tolist() == [2, 3, 4, 5]
    untied = Tied(VIT.build(depth=2), tie=False)
    with pytest.raises(skipvit_fx.SavedModelError, match=r"same as inner\.head\.weight"):
        skipvit_fx.load(path, untied)


def assert_refused(path: Path, model: nn.Module, *said: str) -> None:
    """Names what differs, gives a hint, and leaves the model's weights alone."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(skipvit_fx.SavedModelError) as caught:
        skipvit_fx.load(path, model)
    for words in said:
        assert words in str(caught.value)
    assert caught.value.hint
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.slow
def test_another_model_is_refused(saved: Path) -> None:
    assert_refused(saved, VIT.build(depth=3), "blocks.3.norm1.weight: float32 [64]", "norm.weight")
    assert_refused(saved, VIT.build(num_classes=11), "float32 [10, 64]", "float32 [11, 64]")
    assert_refused(saved, VIT.build().half(), "float32", "float16", "dtype")
    assert_refused(saved, VIT.build(act_layer="relu"), "mlp.act: GELU", "mlp.act: ReLU")
    assert_refused(saved, VIT.build(num_heads=2), "does not compute the same")
    assert_refused(saved, nn.Linear(2, 2), "VisionTransformer in the file, Linear in the model")
    assert_refused(saved, TORCHVISION.build())


def test_other_versions_are_named(saved: Path) -> None:
    assert_refused(saved, VIT.build(depth=3), f"torch {torch.__version__.split('+')[0]}")


@pytest.mark.slow
def test_a_changed_fingerprint_is_refused(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "changed"
    path.write_bytes(saved.read_bytes())
    change(path, lambda header: header.update(fingerprint="0" * 64))
    assert_refused(path, VIT.build(), "fingerprint")


def test_a_later_format_is_refused(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "later"
    path.write_bytes(saved.read_bytes())
    change(path, lambda header: header.update(format=4, something=1))
    assert_refused(path, VIT.build(), "format 4", "reads 3", "a later one")


def test_files_that_are_not_ours(saved: Path, tmp_path: Path) -> None:
    assert_refused(tmp_path / "missing", VIT.build(), "cannot read", "missing")
    assert_refused(tmp_path, VIT.build(), "cannot read")
    plain = tmp_path / "plain"
    save_file(VIT.build().state_dict(), plain)
    assert_refused(plain, VIT.build(), "no plan", "skipvit_fx.rewrite(model, plan)")
    half = tmp_path / "half"
    half.write_bytes(saved.read_bytes()[:5000])
    assert_refused(half, VIT.build(), "cannot read")
    damaged = tmp_path / "damaged"
    save_file({}, damaged, metadata={"skipvit": "{"})
    assert_refused(damaged, VIT.build(), "damaged")
    short = tmp_path / "short"
    save_file({}, short, metadata={"skipvit": '{"format": 3}'})
    assert_refused(short, VIT.build(), "damaged")


def test_meta_device_is_refused(saved: Path) -> None:
    with pytest.raises(skipvit_fx.SavedModelError, match="meta device") as caught:
        skipvit_fx.load(saved, VIT.build().to("meta"))
    assert "to_empty" in caught.value.hint
    with pytest.raises(skipvit_fx.SavedModelError, match="meta device"):
        skipvit_fx.save(rewritten().to("meta"), saved.with_name("never"))
    assert not saved.with_name("never").exists()


def auto(patches: Tensor) -> Tensor:
    """A score function named as a built-in score is."""
    return patches.sum(-1)


@pytest.mark.parametrize(
    ("plan", "score"),
    [("2(55%)+4", auto), ("2(55%)+4", lambda p: p.sum(-1)), ("", lambda p: p.sum(-1))],
)
@pytest.mark.slow
def test_a_score_function_is_refused(plan: str, score: Any, tmp_path: Path) -> None:
    fast = rewritten(plan=plan, score=score)
    with pytest.raises(skipvit_fx.SavedModelError, match="score is a function") as caught:
        skipvit_fx.save(fast, tmp_path / "fast")
    assert "state_dict" in caught.value.hint
    assert "register_score" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_state_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    fast = rewritten()
    fast.register_buffer("sparse", torch.eye(3).to_sparse())
    with pytest.raises(skipvit_fx.SavedModelError, match="'sparse'"):
        skipvit_fx.save(fast, tmp_path / "fast")
    assert list(tmp_path.iterdir()) == []


def test_a_plain_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(skipvit_fx.NotRewrittenError):
        skipvit_fx.save(VIT.build(), tmp_path / "plain")
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    fast = rewritten()
    file = tmp_path / "file"
    file.write_text("kept")
    (tmp_path / "directory").mkdir()
    for path in (tmp_path / "no" / "such", file / "below", tmp_path / "directory"):
        with pytest.raises(skipvit_fx.SavedModelError, match="cannot write") as caught:
            skipvit_fx.save(fast, path)
        assert str(path) in str(caught.value)
        assert caught.value.hint
    assert sorted(p.name for p in tmp_path.iterdir()) == ["directory", "file"]
    assert file.read_text() == "kept"
    assert list((tmp_path / "directory").iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write all")
def test_a_directory_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(skipvit_fx.SavedModelError, match="Permission denied"):
        skipvit_fx.save(rewritten(), tmp_path / "fast")
    tmp_path.chmod(0o700)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_half_way_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "fast"
    path.write_text("the old file")

    def full_disk(weights: Any, to: Path, metadata: Any) -> None:
        to.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("skipvit_fx.saving.save_file", full_disk)
    with pytest.raises(skipvit_fx.SavedModelError, match="No space left"):
        skipvit_fx.save(rewritten(), path)
    assert path.read_text() == "the old file"
    assert list(tmp_path.iterdir()) == [path]


def test_overwrites_and_has_ordinary_permissions(tmp_path: Path) -> None:
    path, other = tmp_path / "fast", tmp_path / "other"
    path.write_text("old")
    other.touch()
    before = path.stat().st_ino
    skipvit_fx.save(rewritten(), path)
    assert path.stat().st_ino != before, "replaced as a whole, not written over"
    assert stored(path)["options"]["plan"] == "2(55%)+4"
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)


@pytest.mark.slow
def test_nothing_is_pickled(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("pickle")

    for name in ("load", "loads", "dump", "dumps", "Unpickler", "Pickler"):
        monkeypatch.setattr(f"pickle.{name}", never)
    monkeypatch.setattr("torch.load", never)
    monkeypatch.setattr("torch.save", never)
    fast = skipvit_fx.load(saved, VIT.build())
    skipvit_fx.save(fast, saved.with_name("again"))


def test_first_difference() -> None:
    assert first_difference(["a", "b"], ["a", "b"]) is None
    assert first_difference(["a", "b"], ["a", "c"]) == ("b", "c")
    assert first_difference(["a"], ["a", "c"]) == ("", "c")
    assert first_difference(["a", "b"], ["a"]) == ("b", "")


@pytest.mark.slow
def test_a_file_outlives_other_names_of_nodes(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later torch may call its nodes otherwise."""
    create_name = fx.graph._Namespace.create_name

    def other(self: Any, candidate: str, obj: Any) -> str:
        return create_name(self, candidate if candidate == "x" else f"new_{candidate}", obj)

    monkeypatch.setattr(fx.graph._Namespace, "create_name", other)
    back = skipvit_fx.load(saved, VIT.build())
    assert any(line.startswith("new_") for line in record_of(back).before)


def test_the_fingerprint_sees_every_part() -> None:
    whole = fingerprint(["a"], ["b"], ["c"])
    assert whole == fingerprint(["a"], ["b"], ["c"])
    others = [(["x"], ["b"], ["c"]), (["a"], ["x"], ["c"]), (["a"], ["b"], ["x"])]
    others += [(["a", "b"], [], ["c"]), (["ab"], [""], ["c"])]
    assert whole not in {fingerprint(*other) for other in others}


def graph_text() -> str:
    """All that is said of two rewrites."""
    said: list[Any] = []
    for name in ("vit", "rope-mixed"):
        model, example = BY_NAME[name].build(depth=2), BY_NAME[name].input()
        fast = skipvit_fx.rewrite(model, "1,2(30%,40%)+3", example_inputs=example)
        record, lines = record_of(fast), (module_lines(fast), state_lines(fast.state_dict()))
        said += [*graph_lines(fast.graph), fast.code]
        said += [fingerprint(record.computation, *lines), *record.passes]
    return "\n".join(map(str, said))


@pytest.mark.slow
def test_the_same_input_gives_the_same_graph_whatever_the_hash_seed() -> None:
    """In another process, and here, where the seed is another."""
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    done = subprocess.run(
        [sys.executable, "-c", "from test_saving import graph_text; print(graph_text())"],
        env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    here = graph_text()
    assert "skipvit.stage_1.put_back" in here
    assert done.stdout == here + "\n"
