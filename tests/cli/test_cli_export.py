"""The commands of export, and what the doctor says of broken machines."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import typer
from onnx import helper, numpy_helper
from typer.testing import CliRunner

import skipvit_fx
from skipvit_fx.ascend import doctor
from skipvit_fx.ascend.npu import find_device, npu_operators
from skipvit_fx.cli.app import app as skipvit
from skipvit_fx.cli.export import register
from skipvit_fx.errors import ExportError
from support.models import BY_NAME

app = typer.Typer()
register(app)
runner = CliRunner()


def model(path: Path, op: str = "Relu", opset: int = 13) -> Path:
    value = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2, 4])
    type_ = onnx.TensorProto.INT64 if op == "NonZero" else onnx.TensorProto.FLOAT
    out = helper.make_tensor_value_info("y", type_, None)
    nodes = [helper.make_node(op, ["x"], ["y"], name="n")]
    spare = numpy_helper.from_array(np.ones(1, np.float32), "spare")
    graph = helper.make_graph(nodes, "g", [value], [out], [spare])
    imports = [helper.make_opsetid("", opset)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), path)
    return path


# -- atc-check -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "opset", "fail_on", "code"),
    [
        ("Relu", 13, "fail", 0),
        ("Relu", 13, "slow", 0),
        ("NonZero", 13, "fail", 0),
        ("NonZero", 13, "slow", 1),
        ("Relu", 19, "fail", 1),
        ("Swish", 13, "slow", 0),
        ("Swish", 13, "unknown", 1),
    ],
)
def test_exit_status(tmp_path: Path, op: str, opset: int, fail_on: str, code: int) -> None:
    path = model(tmp_path / "m.onnx", op, opset)
    result = runner.invoke(app, ["atc-check", str(path), "--cann", "9.0.0", "--fail-on", fail_on])
    assert result.exit_code == code, result.output
    assert "ATC itself was not run" in result.output
    assert "atc --framework=5" in result.output


def test_json_and_sarif(tmp_path: Path) -> None:
    path = model(tmp_path / "m.onnx", "NonZero")
    report = json.loads(runner.invoke(app, ["atc-check", str(path), "--json"]).output)
    assert report["verdict"].startswith("would be slow")
    sarif = json.loads(runner.invoke(app, ["atc-check", str(path), "--sarif"]).output)
    assert sarif["runs"][0]["results"]


def test_an_unreadable_file_is_told_from_a_finding(tmp_path: Path) -> None:
    result = runner.invoke(skipvit, ["atc-check", str(tmp_path / "missing.onnx")])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "cannot be read" in result.stderr
    assert "hint: " in result.stderr


@pytest.mark.slow
def test_export_takes_the_options_of_a_rewrite(tmp_path: Path) -> None:
    out = tmp_path / "m.onnx"
    small = ["vit_tiny_patch16_224", "--depth", "1", "--img-size", "32"]
    how = ["1(50%)", "--score", "mean", "--keep-dead-tokens", "-o", str(out)]
    result = runner.invoke(skipvit, ["export", *small, *how, "--json"])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["files"] == [str(out)]
    assert (said["target"], said["batch"], said["check"]) == ("onnxruntime", "dynamic", None)
    assert said["inputs"] == [value.name for value in onnx.load(out).graph.input]
    assert "TopK" in {node.op_type for node in onnx.load(out).graph.node}


# -- export --------------------------------------------------------------------------------------------------------


def test_export(tmp_path: Path) -> None:
    out = tmp_path / "m.onnx"
    what = ["export", "vit_tiny_patch16_224", "1(50%)", "--depth", "1", "--img-size", "32"]
    how = ["--target", "ascend", "--batch", "2", "--verify", "--cann", "9.0.0"]
    result = runner.invoke(app, [*what, *how, "-o", str(out)])
    assert result.exit_code == 0, result.output
    assert "opset 13, batch 2" in result.output
    assert "ATC itself was not run" in result.output
    assert str(out) in result.output
    assert onnx.load(out).graph.input[0].type.tensor_type.shape.dim[0].dim_value == 2


@pytest.mark.parametrize(
    "options", [["--batch", "many"], ["--opset", "17", "--target", "ascend"], ["--soc", "A100"]]
)
def test_bad_options(tmp_path: Path, options: list[str]) -> None:
    arguments = ["export", "vit_tiny_patch16_224", "--depth", "1", "--img-size", "32"]
    result = runner.invoke(app, [*arguments, "-o", str(tmp_path / "m.onnx"), *options])
    assert isinstance(result.exception, ExportError)
    assert not list(tmp_path.iterdir())


# -- doctor --------------------------------------------------------------------------------------------------------


def broken(code: str, environment: Mapping[str, str]) -> tuple[int, str]:
    """A machine with torch-npu and without CANN."""
    if "torch_npu" in code:
        return 1, "ImportError: libhccl.so: cannot open shared object file"
    if environment.get(doctor.AUTOLOAD) == "0":
        return 0, ""
    return 1, "RuntimeError: Failed to load the backend extension: torch_npu"


def line(lines: list[doctor.Line], what: str) -> doctor.Line:
    return next(found for found in lines if found.what == what)


def with_versions(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: versions.get(name.replace("-", "_")))


def test_a_broken_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    with_versions(monkeypatch, torch="2.15.0", torch_npu="2.15.0")
    lines = doctor.examine(broken)
    assert line(lines, "torch").state == "broken"
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in line(lines, "torch").advice
    assert line(lines, "torch-npu").state == "broken"
    assert "set_env.sh" in line(lines, "torch-npu").advice
    assert line(lines, "onnxruntime").state == "missing"


@pytest.mark.parametrize(
    ("npu", "answer", "state", "part"),
    [
        (None, (0, ""), "missing", "only needed"),
        ("2.13.0", (0, "True 8"), "broken", "torch-npu 2.15.*"),
        ("2.15.0", (0, "False 0"), "broken", "npu-smi"),
        ("2.15.0", (0, "True 8"), "ok", "TORCH_NPU_FALLBACK_CPU_DISABLE=1"),
    ],
)
def test_torch_npu(
    monkeypatch: pytest.MonkeyPatch, npu: str | None, answer: tuple[int, str], state: str, part: str
) -> None:
    versions = {"torch": "2.15.0"} | ({"torch_npu": npu} if npu else {})
    with_versions(monkeypatch, **versions)
    found = line(doctor.examine(lambda code, environment: answer), "torch-npu")
    assert found.state == state
    assert part in found.advice


def test_a_package_that_does_not_import(monkeypatch: pytest.MonkeyPatch) -> None:
    with_versions(monkeypatch, torch="2.15.0", onnx="1.20", onnxruntime="1.30")

    def run(code: str, environment: Mapping[str, str]) -> tuple[int, str]:
        return (1, "ImportError: no") if "onnxruntime" in code else (0, "")

    lines = doctor.examine(run)
    assert line(lines, "onnx").state == "ok"
    assert line(lines, "onnxruntime").state == "broken"
    assert "ImportError: no" in line(lines, "onnxruntime").detail
    assert "--force-reinstall onnxruntime" in line(lines, "onnxruntime").advice


def test_other_processes_may_die() -> None:
    assert doctor.run_python("import os; os.abort()", {})[0] != 0
    assert doctor.run_python("print('a'); print('b')", {}) == (0, "b")
    status, said = doctor.run_python("raise RuntimeError('no')", {})
    assert (status, said) == (1, "RuntimeError: no")


@pytest.mark.slow
def test_a_real_broken_extension_is_told(tmp_path: Path) -> None:
    """An extension that torch loads by itself and that fails: without it, the command says what is wrong."""
    (tmp_path / "bad_backend.py").write_text("raise OSError('libhccl.so: cannot open')\n")
    info = tmp_path / "bad_backend-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bad_backend\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[torch.backends]\nbad = bad_backend:autoload\n")
    root = Path(skipvit_fx.__file__).parents[1]
    status, said = doctor.run_python("import torch", {"PYTHONPATH": str(tmp_path)})
    assert status != 0
    code = "import sys; sys.argv = ['skipvit', 'doctor']\nfrom skipvit_fx.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={
            "PYTHONPATH": f"{tmp_path}:{root}",
            "PATH": "/usr/bin:/bin",
            "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "broken" in done.stdout
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in done.stdout
    assert said


def test_doctor_command(monkeypatch: pytest.MonkeyPatch) -> None:
    ask: Callable[[], list[doctor.Line]] = lambda: [doctor.Line("torch", "ok", "2.15.0")]  # noqa: E731
    monkeypatch.setattr(doctor, "examine", ask)
    assert "2.15.0" in runner.invoke(app, ["doctor"]).output
    assert json.loads(runner.invoke(app, ["doctor", "--json"]).output)[0]["state"] == "ok"


# -- torch-npu -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit", "beit", "eva02"])
def test_no_inserted_operator_is_known_bad(name: str) -> None:
    family = BY_NAME[name]
    model, example = family.build(depth=3), (family.input(2),)
    fast = skipvit_fx.rewrite(model, "1,2(30%,40%)+3", example_inputs=example)
    operators = npu_operators(fast, family.input(2))
    inserted = {operator.name for operator in operators if operator.inserted}
    assert {"index_select", "cat"} <= inserted
    assert not [operator.name for operator in operators if operator.known_bad]
    page = (Path(__file__).parents[2] / "docs" / "ascend.md").read_text()
    known = {o.name for o in operators if o.inserted and o.status != "unknown"}
    assert all(f"`{name}`" in page for name in known)


def test_a_mask_is_known_bad() -> None:
    class Masked(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[x > 0].sum() + x[torch.tensor([0])].sum() + x.nonzero().sum()

    bad = {o.name for o in npu_operators(Masked(), torch.randn(3, 4)) if o.known_bad}
    assert bad == {"index.Tensor, by mask", "nonzero"}


def test_without_an_npu_the_cpu_is_used() -> None:
    assert find_device() == torch.device("cpu")
