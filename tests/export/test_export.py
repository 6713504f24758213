"""A written file computes what the module computes, or nothing is written."""

from __future__ import annotations

import collections
import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import skipvit_fx
from skipvit_fx.errors import ExportError
from skipvit_fx.export import files, verify
from skipvit_fx.export.decompose import free_attention_matrices
from skipvit_fx.export.to_onnx import ExportedFile, export_onnx
from support.models import BY_NAME, TORCHVISION
from support.once import made_once
from support.outside import HuggingFace

TOLERANCE = 1e-4
SHALLOW = "1(55%)+3"
ONE = "2(55%)+4"
TWO = "1,3(30%,40%)+4"
FUSED = "1,3(30%,40%)+4+fused"
BATCH = 2

FORBIDDEN = {"Shape", "Where", "Expand", "NonZero", "Loop", "GatherElements", "Range"} | {
    "ScatterElements",
    "ScatterND",
    "LayerNormalization",
    "Gelu",
    "ConstantOfShape",
}


@made_once
def rewritten(plan: str, depth: int = 3, **options: Any) -> Any:
    """A plain ViT."""
    family = BY_NAME["vit"]
    example = (family.input(BATCH),)
    return skipvit_fx.rewrite(family.build(depth=depth), plan, example_inputs=example, **options)


@dataclass
class Exported:
    fast: Any
    x: Tensor
    file: ExportedFile

    @property
    def proto(self) -> onnx.ModelProto:
        return onnx.load(self.file.path)

    def ops(self) -> collections.Counter[str]:
        return collections.Counter(node.op_type for node in self.proto.graph.node)


def run(path: Path, x: Tensor) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    (input_,) = session.get_inputs()
    return dict(zip(names, session.run(None, {input_.name: x.numpy()}), strict=True))


def kept_indices(fast: nn.Module, x: Tensor) -> list[Tensor]:
    """What the selections of the module itself return, in positions of their own stage."""
    found: list[Tensor] = []
    handles = [
        module.register_forward_hook(lambda m, args, out: found.append(out[0]))
        for name, module in fast.named_modules()
        if name.endswith(".select")
    ]
    with torch.no_grad():
        fast(x)
    for handle in handles:
        handle.remove()
    return found


def assert_same(fast: nn.Module, x: Tensor, got: dict[str, np.ndarray]) -> None:
    with torch.no_grad():
        wanted = fast(x).numpy()
    np.testing.assert_allclose(got["output"], wanted, rtol=0, atol=TOLERANCE * abs(wanted).max())


def written(plan: str, folder: Path, **options: Any) -> Exported:
    fast, x = rewritten(plan), BY_NAME["vit"].input(BATCH)
    path = folder / "fast.onnx"
    return Exported(fast, x, export_onnx(fast, path, example_inputs=x, expose_kept=True, **options))


@pytest.fixture(scope="module")
def ascend(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Two stages of a plain ViT, for Ascend."""
    return written("1,2(30%,40%)+3", tmp_path_factory.mktemp("ascend"), target="ascend")


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """One stage, for onnxruntime with any batch."""
    return written(SHALLOW, tmp_path_factory.mktemp("dynamic"))


def test_ascend_parity(ascend: Exported) -> None:
    for seed in (1, 2):
        x = BY_NAME["vit"].input(BATCH, seed)
        got = run(ascend.file.path, x)
        assert_same(ascend.fast, x, got)
        for i, stage in enumerate(skipvit_fx.trace_tokens(ascend.fast, x)):
            np.testing.assert_array_equal(got[f"kept_{i + 1}"], stage.kept.numpy())


def test_ascend_form(ascend: Exported) -> None:
    proto, ops = ascend.proto, ascend.ops()
    assert not FORBIDDEN & set(ops)
    assert proto.ir_version == 8
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", 13)]
    assert not proto.functions
    assert ops["Erf"] == 3
    assert ops["Sqrt"] == 7  # two norms a layer and the last
    onnx.checker.check_model(proto, full_check=True)


def test_ascend_indices_are_int32(ascend: Exported) -> None:
    graph = onnx.shape_inference.infer_shapes(ascend.proto).graph
    types = {v.name: v.type.tensor_type.elem_type for v in [*graph.value_info, *graph.output]}
    types |= {v.name: v.data_type for v in graph.initializer}
    indices = {node.input[1] for node in graph.node if node.op_type == "Gather"}
    constants = {v.name for v in graph.initializer}
    assert {types[name] for name in indices - constants} == {onnx.TensorProto.INT32}
    wide = [name for name, type_ in types.items() if type_ == onnx.TensorProto.INT64]
    from_topk = {out for node in graph.node if node.op_type == "TopK" for out in node.output}
    assert set(wide) <= constants | from_topk


def test_ascend_attention_matrices_have_one_consumer(ascend: Exported) -> None:
    graph = ascend.proto.graph
    readers = collections.Counter(name for node in graph.node for name in node.input)
    softmaxes = [node for node in graph.node if node.op_type == "Softmax"]
    assert len(softmaxes) == 3 + 2  # one a layer, one row a stage
    assert all(readers[node.output[0]] == 1 for node in softmaxes)


def test_nothing_of_the_machine_is_in_the_file(ascend: Exported) -> None:
    data = ascend.file.path.read_bytes()
    assert os.getcwd().encode() not in data
    assert b"site-packages" not in data


@pytest.mark.slow
def test_dynamic_batch(dynamic: Exported) -> None:
    assert dynamic.file.batch is None
    for batch in (1, 3):
        x = BY_NAME["vit"].input(batch, seed=batch)
        got = run(dynamic.file.path, x)
        assert_same(dynamic.fast, x, got)
        (kept,) = kept_indices(dynamic.fast, x)
        np.testing.assert_array_equal(got["kept_1"], kept.numpy())


def test_the_model_is_left_alone(dynamic: Exported) -> None:
    names = {type(module).__name__ for module in dynamic.fast.modules()}
    assert {"Select", "Keep", "PutBack"} <= names
    assert dynamic.fast.graph.output_node().args[0] is not None
    with torch.no_grad():
        assert isinstance(dynamic.fast(dynamic.x), Tensor)


# -- bad input -----------------------------------------------------------------------------------------------------


@pytest.fixture
def fast() -> Any:
    return rewritten(SHALLOW)


def refused(fast: nn.Module, path: Path, match: str, **options: Any) -> None:
    before = sorted(path.parent.iterdir()) if path.parent.is_dir() else None
    with pytest.raises(ExportError, match=match) as caught:
        export_onnx(fast, path, **options)
    assert caught.value.hint
    assert before is None or sorted(path.parent.iterdir()) == before


def test_skipping_off_is_refused(tmp_path: Path) -> None:
    off = rewritten(SHALLOW)
    skipvit_fx.set_skipping(off, False)
    refused(off, tmp_path / "m.onnx", "switched off")


def test_a_random_score_is_refused(tmp_path: Path) -> None:
    refused(rewritten("1(55%)+2", depth=2, score="random"), tmp_path / "m.onnx", "random score")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"target": "ascend", "opset": 17}, "opset 17 is outside the profile 'ascend'"),
        ({"target": "ascend", "opset": 10}, "opset 10 is outside"),
        ({"opset": 23}, "opset 23 is outside the profile 'onnxruntime'"),
        ({"target": "tensorrt"}, "no export target 'tensorrt'"),
        ({"target": "ascend", "batch": "dynamic"}, "not possible for target 'ascend'"),
        ({"batch": "any"}, "batch='any' is not possible"),
        ({"batch": 0}, "a batch of 0"),
        ({"batch": 4, "example_inputs": torch.zeros(2, 3, 64, 96)}, "have a batch of 2"),
        ({"example_inputs": (1.0,)}, "no image"),
        ({"example_inputs": torch.zeros(2, 3, 48, 48)}, "does not run on the example inputs"),
    ],
)
def test_bad_arguments(fast: Any, tmp_path: Path, options: dict[str, Any], match: str) -> None:
    refused(fast, tmp_path / "m.onnx", match, **options)


def test_a_missing_folder(fast: Any, tmp_path: Path) -> None:
    refused(fast, tmp_path / "no" / "m.onnx", "does not exist")


def test_a_folder_as_file(fast: Any, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").mkdir()
    refused(fast, tmp_path / "m.onnx", "is a folder")


@pytest.mark.slow
def test_tied_scores_are_told_from_a_wrong_file(
    fast: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "difference_to", lambda *args: 0.5)
    refused(fast, tmp_path / "m.onnx", "does not compute what the module does", verify=True)
    model = BY_NAME["vit"].build()
    with torch.no_grad():
        for block in model.blocks:  # queries of zero: every patch is as important as the other
            block.attn.qkv.weight[:64] = 0
            block.attn.qkv.bias[:64] = 0
    tied = skipvit_fx.rewrite(model, ONE, example_inputs=(BY_NAME["vit"].input(2),))
    refused(tied, tmp_path / "m.onnx", "choose different patches at layer 2", verify=True)


def _tiny_ir(values: int = 8) -> Any:
    import onnx_ir as ir
    from onnx import helper, numpy_helper

    weight = numpy_helper.from_array(np.zeros(values, np.float32), "w")
    value = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [values])
    out = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [values])
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])], "g", [value], [out], [weight]
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    return ir.from_proto(proto)


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "m.onnx"
    target.write_bytes(b"old")

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(ExportError, match="No space left"):
        files.write_model(_tiny_ir(), target)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_failed_check_leaves_nothing(tmp_path: Path) -> None:
    def check(path: Path) -> None:
        assert path.is_file()
        raise ExportError("no")

    with pytest.raises(ExportError):
        files.write_model(_tiny_ir(), tmp_path / "m.onnx", check)
    assert not list(tmp_path.iterdir())


def test_large_weights_lie_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "EXTERNAL_ABOVE", 2**16)
    found = files.write_model(_tiny_ir(2**15), tmp_path / "m.onnx", lambda path: None)
    assert [path.name for path in found] == ["m.onnx", "m.onnx.data"]
    onnx.checker.check_model(tmp_path / "m.onnx", full_check=True)
    x = np.ones(2**15, np.float32)
    session = onnxruntime.InferenceSession(str(found[0]))
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], x)
    keys = {
        e.key
        for t in onnx.load(found[0], load_external_data=False).graph.initializer
        for e in t.external_data
    }
    assert keys <= {"location", "offset", "length"}


# -- every family --------------------------------------------------------------------------------------------------


HUGGING_FACE = "hugging-face"
POSITIONED = {"beit", "beit-unfused", "eva02", "dinov3", "relpos-shared"}
"""Their layers need a position for every token, and a fused token has none."""


def images(batch: int, seed: int) -> Tensor:
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def outputs(value: Any) -> dict[str, Tensor]:
    return {"output": value} if isinstance(value, Tensor) else dict(value)


def export_and_compare(
    name: str, plan: str, path: Path, batches: tuple[int, ...] = (BATCH,), **options: Any
) -> ExportedFile:
    """Write the file, run it on new images, compare outputs and kept positions with the module's."""
    if name == HUGGING_FACE:
        model, argument, make = HuggingFace("vit", 1).build(), "pixel_values", images
    else:
        family = TORCHVISION if name == "torchvision" else BY_NAME[name]
        model, argument, make = family.build(), "", family.input

    def inputs(x: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
        return ([], {argument: x}) if argument else ([x], {})

    x = make(BATCH, 0)
    example = {argument: x} if argument else x
    fast = skipvit_fx.rewrite(model, plan, example_inputs=example)
    file = export_onnx(fast, path, example_inputs=example, expose_kept=True, **options)
    onnx.checker.check_model(path, full_check=True)
    assert file.inputs == (argument or "x",)
    for seed, batch in enumerate(batches, 1):
        x = make(batch, seed)
        got = run(path, x)
        args, kwargs = inputs(x)
        with torch.no_grad():
            wanted = outputs(fast(*args, **kwargs))
        for key, value in wanted.items():
            atol = TOLERANCE * float(value.abs().max())
            np.testing.assert_allclose(got[key], value.numpy(), rtol=0, atol=atol)
        stages = skipvit_fx.trace_tokens(fast, *args, **kwargs)
        compare_kept(got, stages)
    if file.check is not None:
        assert file.check.clean, str(file.check)
        assert file.check.attentions[0] == file.check.attentions[1] > 0
    return file


def compare_kept(got: dict[str, np.ndarray], stages: list[skipvit_fx.TokenTrace]) -> None:
    patches = stages[0].kept.shape[1] + stages[0].dropped.shape[1]
    for i, stage in enumerate(stages, 1):
        for ours, theirs in zip(got[f"kept_{i}"], stage.kept.numpy(), strict=True):
            # where there are fused tokens, they stand in ours behind the patches, and -1 fills theirs up
            np.testing.assert_array_equal(ours[ours < patches], theirs[theirs >= 0])


@pytest.mark.parametrize("name", ["torchvision", HUGGING_FACE])
@pytest.mark.slow
def test_other_libraries(name: str, tmp_path: Path) -> None:
    if torch.__version__ < "2.14":
        pytest.skip("torch.onnx does not translate it")
    file = export_and_compare(name, FUSED, tmp_path / "m.onnx", target="ascend")
    names = ("output",) if name == "torchvision" else ("last_hidden_state", "pooler_output")
    assert file.outputs == (*names, "kept_1", "kept_2")


@pytest.mark.parametrize("name", ["eva02", "beit"])
@pytest.mark.slow
def test_any_batch_with_positions(name: str, tmp_path: Path) -> None:
    export_and_compare(name, TWO, tmp_path / "m.onnx", batches=(1, 3))


@pytest.mark.slow
@pytest.mark.parametrize("plan", [ONE, TWO, FUSED])
@pytest.mark.parametrize("target", ["ascend", "onnxruntime"])
@pytest.mark.parametrize(
    "name",
    [
        *("vit", "vit-unfused", "deit3", "beit", "beit-unfused", "eva02", "dinov3", "dinov2"),
        *("dinov2-reg4", "cait", "torchvision", HUGGING_FACE, "relpos-shared", "naflex-gap"),
        "siglip-map",
    ],
)
def test_families(name: str, target: Any, plan: str, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    if plan == FUSED and name in POSITIONED:
        with pytest.raises(skipvit_fx.UnsupportedModelError, match="a fused token has no position"):
            export_and_compare(name, plan, path, target=target)
        return
    batches = (BATCH,) if target == "ascend" else (1, 3)
    export_and_compare(name, plan, path, batches, target=target)


@pytest.mark.slow
@pytest.mark.parametrize("opset", [11, 12, 14, 15, 16])
def test_opsets(opset: int, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    export_and_compare("eva02", TWO, path, target="ascend", opset=opset)
    assert onnx.load(path).opset_import[0].version == opset


@pytest.mark.slow
def test_weights_are_folded(tmp_path: Path) -> None:
    """No weight is transposed or sliced again in every run, however large."""
    import timm

    model = timm.create_model("vit_base_patch16_224", depth=2).eval()
    fast = skipvit_fx.rewrite(model, "1(55%)+3")
    path = tmp_path / "m.onnx"
    export_onnx(fast, path, target="ascend")
    graph = onnx.load(path).graph
    constants = {tensor.name for tensor in graph.initializer}
    again = [n.name for n in graph.node if n.input and set(n.input) <= constants]
    assert not again


@pytest.mark.slow
def test_a_tiny_epsilon_stays(tmp_path: Path) -> None:
    """Without it, a constant row would be divided by zero."""
    path = tmp_path / "m.onnx"
    model = nn.Sequential(nn.LayerNorm(4, eps=1e-12))
    export_onnx(model, path, target="ascend", example_inputs=torch.randn(2, 4))
    got = run(path, torch.ones(2, 4))
    np.testing.assert_array_equal(got["output"], np.zeros((2, 4), np.float32))


class SpelledOut(nn.Module):
    """Attention whose matrix is also read row by row, as a score does."""

    def __init__(self, dropout: bool, start: int) -> None:
        super().__init__()
        self.start = start
        self.drop = nn.Dropout(0.1) if dropout else nn.Identity()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        weights = self.drop(((q * 0.5) @ k.transpose(-2, -1) + bias).softmax(-1))
        return weights @ v, weights.narrow(-2, self.start, 1).mean(1)


@pytest.mark.parametrize(("dropout", "start"), [(False, 0), (True, 0), (False, -1)])
@pytest.mark.parametrize("bias", [(1, 3, 5, 5), (5, 5), (1, 1, 1, 5)])
def test_a_row_of_attention_is_computed_apart(
    dropout: bool, start: int, bias: tuple[int, ...]
) -> None:
    args = (*(torch.randn(2, 3, 5, 4) for _ in range(3)), torch.randn(bias))
    module = SpelledOut(dropout, start).eval()
    program = torch.export.export(module, args, strict=False)
    free_attention_matrices(program)
    softmaxes = [n for n in program.graph.nodes if n.target is torch.ops.aten.softmax.int]
    assert sorted(tuple(n.meta["val"].shape) for n in softmaxes) == [(2, 3, 1, 5), (2, 3, 5, 5)]
    assert all(len(node.users) == 1 for node in softmaxes)
    for ours, theirs in zip(program.module()(*args), module(*args), strict=True):
        torch.testing.assert_close(ours, theirs)
