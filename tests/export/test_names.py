"""A reader of the file finds the author's modules, what was inserted, and where the file comes from."""

from __future__ import annotations

import copy
import re
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch

import skipvit_fx as sv
from skipvit_fx.export.names import take_names
from support.models import BY_NAME
from support.once import made_once
from support.tiny import Tiny

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
PLAN = "1(50%)+3"
TARGETS = [pytest.param("onnxruntime"), pytest.param("ascend", marks=pytest.mark.slow)]


@made_once
def rewritten() -> Any:
    return sv.rewrite(Tiny().eval(), PLAN, example_inputs=(X,))


def exported(model: Any, folder: Path, **options: Any) -> onnx.ModelProto:
    sv.export_onnx(model, folder / "m.onnx", example_inputs=(X,), **options)
    return onnx.load(folder / "m.onnx")


@cache
def file_for(target: Any) -> onnx.ModelProto:
    with tempfile.TemporaryDirectory() as folder:
        return exported(rewritten(), Path(folder), target=target, batch=2)


def made(file: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """The nodes by the values that they make."""
    return {value: node for node in file.graph.node for value in node.output}


def test_what_lends_its_name_is_no_output_any_more() -> None:
    """What is still marked as an output stops the clean-up of onnx-ir: rotary tables alike in two places did."""
    x = ir.val("x", ir.DataType.FLOAT, [2])
    out, inserted = (ir.node("Relu", [x]).outputs[0] for _ in range(2))
    nodes = [value.producer() for value in (out, inserted)]
    graph = ir.Graph([x], [out, inserted], nodes=nodes, opset_imports={"": 20}, name="g")
    take_names(ir.Model(graph, ir_version=10), ["stage_1_kept"])
    assert graph.outputs == [out]
    assert (inserted.name, inserted.is_graph_output()) == ("stage_1_kept", False)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.slow
def test_nodes_and_values_are_named(target: Any) -> None:
    file = file_for(target)
    names = [node.name for node in file.graph.node]
    assert len(set(names)) == len(names)
    assert "blocks.1.q/MatMul" in names
    assert "blocks.1/Softmax" in names
    assert "skipvit.stage_1.select/TopK" in names
    assert not any(name.startswith("node_") for name in names)
    assert all(re.fullmatch(r"[\w./-]+", text) for text in [*names, *made(file)])
    values = made(file)
    for inserted in ("stage_1_scores", "stage_1_kept", "stage_1_kept_tokens", "stage_1_returned"):
        assert values[inserted].name.startswith("skipvit.stage_1.")
    assert [value.name for value in file.graph.output] == ["output"]


def test_a_name_stands_for_its_value() -> None:
    """Made an output, it is what the module of this name returns."""
    import onnxruntime

    fast = rewritten()
    file = copy.deepcopy(file_for("onnxruntime"))
    seen: dict[str, torch.Tensor] = {}
    stage = fast.skipvit.stage_1
    stage.select.register_forward_hook(lambda m, a, out: seen.update(stage_1_kept=out[0]))
    stage.keep.register_forward_hook(lambda m, a, out: seen.update(stage_1_kept_tokens=out))
    with torch.no_grad():
        fast(X)
    for name, wanted in seen.items():
        del file.graph.output[:]
        file.graph.output.append(onnx.ValueInfoProto(name=name))
        session = onnxruntime.InferenceSession(file.SerializeToString())
        (got,) = session.run(None, {file.graph.input[0].name: X.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), wanted, check_dtype=False)


@pytest.mark.parametrize("target", TARGETS)
def test_the_file_says_where_it_comes_from(target: Any) -> None:
    found = {p.key: p.value for p in file_for(target).metadata_props}
    assert found == {
        "model": "Tiny",
        "plan": PLAN,
        "cut": "attention",
        "score": "auto",
        "validated": found["validated"],
        "target": target,
        "skipvit_fx_version": found["skipvit_fx_version"],
        "torch_version": torch.__version__,
    }
    assert found["validated"].startswith("validated")
    assert found["skipvit_fx_version"]


@pytest.mark.slow
def test_any_other_model(tmp_path: Path) -> None:
    file = exported(Tiny().eval(), tmp_path)
    assert "blocks.1.q/MatMul" in [node.name for node in file.graph.node]
    keys = {p.key for p in file.metadata_props}
    assert keys == {"model", "target", "skipvit_fx_version", "torch_version"}


@pytest.mark.slow
def test_kept_positions_besides(tmp_path: Path) -> None:
    file = exported(rewritten(), tmp_path, expose_kept=True)
    assert [value.name for value in file.graph.output] == ["output", "kept_1"]
    assert "stage_1_kept_tokens" in made(file)


@pytest.mark.slow
def test_the_same_model_has_the_same_names(tmp_path: Path) -> None:
    one, other = (exported(rewritten(), tmp_path, verify=True) for _ in range(2))
    assert one.SerializeToString() == other.SerializeToString()


@pytest.mark.slow
def test_merged_tokens(tmp_path: Path) -> None:
    family = BY_NAME["vit"]
    x = family.input(2)
    fast = sv.rewrite(family.build(), "1-3(3)+merged", example_inputs=(x,))
    sv.export_onnx(fast, tmp_path / "m.onnx", example_inputs=(x,), verify=True)
    values = made(onnx.load(tmp_path / "m.onnx"))
    assert {f"stage_{i}_kept_tokens" for i in (1, 2, 3)} <= values.keys()


@pytest.mark.slow
def test_a_batch_of_any_size_is_called_so(tmp_path: Path) -> None:
    file = exported(rewritten(), tmp_path, batch="dynamic")
    for value in (*file.graph.input, *file.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    sizes = [
        size.dim_param
        for value in file.graph.value_info
        for size in value.type.tensor_type.shape.dim
    ]
    assert "batch" in sizes
    assert not any(re.search(r"\bs\d+\b", size) for size in sizes)
