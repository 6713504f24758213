"""The checker says of each kind of file what is publicly known, and no more."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from skipvit_fx.ascend import model_facts
from skipvit_fx.ascend.atc import NOT_RUN, AtcReport, atc_check
from skipvit_fx.ascend.checks import CHECKS
from skipvit_fx.ascend.knowledge import LEVELS, knowledge, opsets_in, release_key
from skipvit_fx.errors import ExportError
from skipvit_fx.export.to_onnx import export_onnx
from support.models import BY_NAME

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def rules_of(report: AtcReport, *levels: str) -> set[str]:
    return {f.rule.id for f in report.findings if not levels or f.level in levels}


def save(
    path: Path,
    nodes: list[onnx.NodeProto],
    *,
    inputs: dict[str, tuple[int, list[Any]]] | None = None,
    outputs: dict[str, tuple[int, list[Any] | None]] | None = None,
    constants: dict[str, np.ndarray] | None = None,
    opset: int = 13,
    ir_version: int = 8,
    imports: list[onnx.OperatorSetIdProto] | None = None,
    functions: list[onnx.FunctionProto] | None = None,
) -> Path:
    def infos(given: dict[str, Any]) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(k, t, s) for k, (t, s) in given.items()]

    graph = helper.make_graph(
        nodes,
        "g",
        infos(inputs if inputs is not None else {"x": (FLOAT, [2, 4])}),
        infos(outputs if outputs is not None else {"y": (FLOAT, None)}),
        [numpy_helper.from_array(v, k) for k, v in (constants or {}).items()],
    )
    opsets = imports if imports is not None else [helper.make_opsetid("", opset)]
    model = helper.make_model(
        graph, opset_imports=opsets, ir_version=ir_version, functions=functions or []
    )
    onnx.save(model, path)
    return path


def node(op: str, inputs: str, outputs: str = "y", **attributes: Any) -> onnx.NodeProto:
    name = attributes.pop("name", f"{op}_{outputs}")
    return helper.make_node(op, inputs.split(), outputs.split(), name=name, **attributes)


def attention(*, extra: bool = False, scale: bool = True) -> list[onnx.NodeProto]:
    nodes = [node("MatMul", "q k", "logits")]
    nodes.append(
        node("Mul", "logits scale", "scaled") if scale else node("Identity", "logits", "scaled")
    )
    nodes += [node("Softmax", "scaled", "weights", axis=-1), node("MatMul", "weights v", "y")]
    if extra:
        nodes.append(node("ReduceMean", "weights", "score", axes=[1], keepdims=0))
    return nodes


ATTENTION: dict[str, Any] = {
    "inputs": {
        "q": (FLOAT, [1, 2, 17, 8]),
        "k": (FLOAT, [1, 2, 8, 17]),
        "v": (FLOAT, [1, 2, 17, 8]),
    },
    "constants": {"scale": np.float32(0.5).reshape(())},
}


def layer_norm(epsilon: str = "eps") -> list[onnx.NodeProto]:
    return [
        node("ReduceMean", "x", "mean", axes=[-1]),
        node("Sub", "x mean", "centred"),
        node("Pow", "centred two", "square"),
        node("ReduceMean", "square", "variance", axes=[-1]),
        node("Add", f"variance {epsilon}", "shifted"),
        node("Sqrt", "shifted", "deviation"),
        node("Div", "centred deviation", "normed"),
        node("Mul", "normed gamma", "scaled"),
        node("Add", "scaled beta", "y"),
    ]


NORM: dict[str, Any] = {
    "constants": {
        "two": np.float32(2).reshape(()),
        "eps": np.float32(1e-6).reshape(()),
        "gamma": np.ones(4, np.float32),
        "beta": np.ones(4, np.float32),
    }
}


# -- the data ------------------------------------------------------------------------------------------------------


def test_every_rule_has_a_check_a_level_and_a_source() -> None:
    known = knowledge()
    assert {rule.check for rule in known.rules} == set(CHECKS)
    assert len({rule.id for rule in known.rules}) == len(known.rules)
    for rule in known.rules:
        assert rule.level in LEVELS
        assert rule.title
        assert rule.advice
        assert rule.source


def test_every_range_and_release_can_be_read() -> None:
    known = knowledge()
    assert list(known.releases) == sorted(known.releases, key=release_key)
    for entry in known.operators.values():
        for release, range_ in entry["opsets"].items():
            assert release in known.releases
            assert range_ is None or opsets_in(range_)


def test_release_order() -> None:
    assert release_key("8.0.RC3") < release_key("8.0.0") < release_key("8.1.RC1")
    assert release_key("9.1.0") < release_key("9.2.0-beta.2") < release_key("9.2.0")
    with pytest.raises(ExportError, match="not a CANN release"):
        release_key("eight")


@pytest.mark.parametrize(
    ("operator", "opset", "cann", "answer"),
    [
        ("MatMul", 13, "9.0.0", "yes"),
        ("MatMul", 19, "9.0.0", "no"),
        ("Trilu", 13, "9.0.0", "no"),
        ("Unsqueeze", 13, "5.0.3", "no"),
        ("Gelu", 13, "9.0.0", "none"),
        ("Conv", 13, "9.0.0", "between"),  # the registration is not public
        ("Conv", 14, "9.0.0", "unknown"),  # nor is it at the release before
        ("MatMul", 13, "8.0.0", "between"),  # between two releases that are
        ("MatMul", 14, "8.0.0", "unknown"),
        ("MatMul", 13, "10.0.0", "unknown"),  # behind the last release that was read
        ("Trilu", 13, "8.0.0", "unknown"),  # neither of the two takes it, which decides nothing
        ("NeverHeardOf", 13, "9.0.0", "unknown"),
        ("Swish", 13, "9.0.0", "unknown"),  # in the table, without a fact
    ],
)
def test_the_operator_table(operator: str, opset: int, cann: str, answer: str) -> None:
    assert knowledge().support(operator, opset, cann).answer == answer


# -- golden cases --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain ViT in the Ascend profile."""
    family = BY_NAME["vit"]
    path = tmp_path_factory.mktemp("vit") / "vit.onnx"
    export_onnx(family.build(depth=2), path, target="ascend", example_inputs=family.input(1))
    return path


@pytest.mark.parametrize("cann", ["8.0.0", "9.0.0", "9.2.0-beta.2"])
def test_a_plain_vit_is_clean(vit: Path, cann: str) -> None:
    report = atc_check(vit, cann=cann)
    assert report.clean, str(report)
    assert report.attentions == (2, 2)
    assert report.layer_norms == (5, 5)
    unknown = set() if cann == "9.2.0-beta.2" else {"OP-BETWEEN"}
    assert rules_of(report) == unknown | {"N-TILES"}


@pytest.mark.parametrize("opset", [11, 12, 14, 15, 16])
def test_a_plain_vit_is_clean_at_every_opset(tmp_path: Path, opset: int) -> None:
    family = BY_NAME["vit"]
    path = tmp_path / "vit.onnx"
    export_onnx(
        family.build(depth=1), path, target="ascend", opset=opset, example_inputs=family.input(1)
    )
    for cann in ("8.0.0", "9.0.0", "9.2.0-beta.2"):
        report = atc_check(path, cann=cann)
        assert report.clean, str(report)
        assert rules_of(report) <= {"OP-BETWEEN", "OP-UNKNOWN", "N-TILES"}


def test_a_missing_fact_is_never_ok(vit: Path) -> None:
    report = atc_check(vit, cann="8.0.0")
    (unknown,) = report.of("unknown")
    named = " ".join(unknown.places)
    used = {n.op_type for n in onnx.load(vit).graph.node} - {"Constant"}
    assert all(operator in named for operator in used)
    assert report.verdict.endswith("unknown: OP-BETWEEN")


def test_torchs_default_export_fails(tmp_path: Path) -> None:
    family = BY_NAME["vit"]
    path = tmp_path / "default.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            family.build(depth=1), (family.input(1),), path, dynamo=True, verbose=False
        )
    report = atc_check(path, cann="9.0.0")
    assert not report.clean
    assert {"P-OPSET", "OP-NONE"} <= rules_of(report, "fail")


@pytest.mark.parametrize("opset", [11, 16])
def test_torchs_older_export_is_clean(tmp_path: Path, opset: int) -> None:
    """A plain ViT from an exporter that leaves shape arithmetic in the file; with the folding undone, it would fail."""
    path = tmp_path / "older.onnx"
    family = BY_NAME["vit-unfused"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            family.build(depth=1), (family.input(1),), path, dynamo=False, opset_version=opset
        )
    assert {"Shape", "Expand"} <= {node.op_type for node in onnx.load(path).graph.node}
    report = atc_check(path, cann="9.2.0-beta.2")
    assert report.clean, str(report)
    assert "A-COMPUTED" in rules_of(report, "unknown")
    assert "S-STATIC" not in rules_of(report)
    assert report.layer_norms == (3, 3)


def shaped(name: str) -> list[onnx.NodeProto]:
    """A tensor expanded to a shape that is computed from the shape of ``name``."""
    return [
        node("Shape", name, "shape"),
        node("Gather", "shape zero", "rows"),
        node("Concat", "rows three", "wanted", axis=0),
        node("Expand", "one wanted", "wide"),
        node("Add", "wide one"),
    ]


SHAPED: dict[str, Any] = {
    "constants": {
        "zero": np.array([0]),
        "three": np.array([3]),
        "one": np.ones(1, np.float32),
    }
}


def test_shapes_are_followed_through_arithmetic(tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx", shaped("x"), **SHAPED)
    assert atc_check(path, cann="9.0.0").clean
    assert model_facts.read_model(path).shapes["wide"] == (2, 3)
    open_batch = save(tmp_path / "n.onnx", shaped("x"), inputs={"x": (FLOAT, ["n", 4])}, **SHAPED)
    assert "A-EXPAND-CONST" in rules_of(atc_check(open_batch, cann="9.0.0"), "fail")


def test_arithmetic_that_contradicts_itself_is_left_alone(tmp_path: Path) -> None:
    nodes = [node("Concat", "two three", "wanted", axis=7), node("Expand", "x wanted")]
    path = save(
        tmp_path / "m.onnx", nodes, constants={"two": np.array([2]), "three": np.array([3])}
    )
    assert "A-EXPAND-CONST" in rules_of(atc_check(path), "fail")


@pytest.mark.parametrize(
    ("cann", "opset", "fails"),
    [("8.0.0", 18, True), ("9.1.0", 18, True), ("9.2.0-beta.2", 18, False), ("9.0.0", 17, False)],
)
def test_reduce_mean_with_axes_as_input(tmp_path: Path, cann: str, opset: int, fails: bool) -> None:
    reduce = node("ReduceMean", "x axes") if opset == 18 else node("ReduceMean", "x", axes=[1])
    path = save(tmp_path / "m.onnx", [reduce], constants={"axes": np.array([1])}, opset=opset)
    assert ("A-REDUCE-AXES" in rules_of(atc_check(path, cann=cann), "fail")) == fails


def loop() -> onnx.NodeProto:
    body = helper.make_graph(
        [node("Identity", "go", "go_on"), node("Identity", "state", "next")],
        "body",
        [
            helper.make_tensor_value_info("i", INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", FLOAT, [2, 4]),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", FLOAT, [2, 4]),
        ],
    )
    return node("Loop", "trips yes x", body=body)


GOLDEN: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "NonZero": ("S-DATA", lambda p: save(p, [node("NonZero", "x")], outputs={"y": (INT64, None)})),
    "Loop": (
        "P-SUBGRAPH",
        lambda p: save(p, [loop()], constants={"trips": np.array(3), "yes": np.array(True)}),
    ),
    "zero dimension": (
        "P-ZERO",
        lambda p: save(
            p,
            [node("Slice", "x zero zero one", "empty"), node("Concat", "x empty", axis=1)],
            constants={"zero": np.array([0]), "one": np.array([1])},
        ),
    ),
    "foreign domain": (
        "P-DOMAIN",
        lambda p: save(
            p,
            [node("FastGelu", "x", domain="com.microsoft")],
            imports=[helper.make_opsetid("", 13), helper.make_opsetid("com.microsoft", 1)],
        ),
    ),
    "two default domains": (
        "P-DOMAIN",
        lambda p: save(
            p,
            [node("Relu", "x")],
            imports=[helper.make_opsetid("", 13), helper.make_opsetid("ai.onnx", 12)],
        ),
    ),
    "second consumer of an attention matrix": (
        "F-ATTENTION",
        lambda p: save(
            p,
            attention(extra=True),
            outputs={"y": (FLOAT, None), "score": (FLOAT, None)},
            **ATTENTION,
        ),
    ),
    "attention without Mul": ("F-SCALE", lambda p: save(p, _unscaled(), **ATTENTION)),
    "token count": ("N-TILES", lambda p: save(p, attention(), **ATTENTION)),
    "opset 19": ("P-OPSET", lambda p: save(p, [node("Relu", "x")], opset=19)),
    "IR 10": ("P-IR", lambda p: save(p, [node("Relu", "x")], ir_version=10)),
    "value_float": (
        "P-CONST",
        lambda p: save(p, [node("Constant", "", "c", value_float=1.0), node("Add", "x c")]),
    ),
    "function": (
        "P-FUNC",
        lambda p: save(
            p,
            [node("Mine", "x", domain="mine")],
            imports=[helper.make_opsetid("", 13), helper.make_opsetid("mine", 1)],
            functions=[
                helper.make_function(
                    "mine",
                    "Mine",
                    ["a"],
                    ["b"],
                    [node("Relu", "a", "b")],
                    [helper.make_opsetid("", 13)],
                )
            ],
        ),
    ),
    "same names": (
        "P-NAMES",
        lambda p: save(p, [node("Relu", "x", "h", name="n"), node("Relu", "h", name="n")]),
    ),
    "name clash": ("P-NAME-CLASH", lambda p: save(p, [node("Relu", "x", name="x")])),
    "no input": (
        "P-IO",
        lambda p: save(p, [node("Relu", "c")], inputs={}, constants={"c": np.ones(2, np.float32)}),
    ),
    "integer input": (
        "P-INDTYPE",
        lambda p: save(
            p,
            [node("Neg", "x")],
            inputs={"x": (INT64, [2])},
            outputs={"y": (INT64, [2])},
        ),
    ),
    "type": (
        "P-DTYPE",
        lambda p: save(
            p,
            [node("Cast", "x", "h", to=TensorProto.FLOAT8E4M3FNUZ), node("Cast", "h", to=FLOAT)],
            opset=19,
        ),
    ),
    "open batch": (
        "S-STATIC",
        lambda p: save(p, [node("Relu", "x")], inputs={"x": (FLOAT, ["n", 4])}),
    ),
    "unknown operator": ("OP-UNKNOWN", lambda p: save(p, [node("Swish", "x")], opset=18)),
    "opset out of range": (
        "OP-RANGE",
        lambda p: save(p, [node("Trilu", "x")], opset=13),
    ),
    "noop axes": (
        "A-REDUCE-NOOP",
        lambda p: save(p, [node("ReduceSum", "x", noop_with_empty_axes=1)]),
    ),
    "open k": (
        "A-TOPK-CONST",
        lambda p: save(
            p, [node("TopK", "x k", "y i")], inputs={"x": (FLOAT, [2, 4]), "k": (INT64, [1])}
        ),
    ),
    "integer TopK": (
        "A-TOPK-DTYPE",
        lambda p: save(
            p,
            [node("TopK", "x k", "y i")],
            inputs={"x": (INT64, [2, 4])},
            outputs={"y": (INT64, None)},
            constants={"k": np.array([2])},
        ),
    ),
    "int64 indices": (
        "A-TOPK-INDICES",
        lambda p: save(
            p,
            [node("TopK", "x k", "v i"), node("GatherElements", "x i", axis=1)],
            constants={"k": np.array([2])},
        ),
    ),
    "scatter": (
        "S-SCATTER",
        lambda p: save(
            p,
            [node("ScatterElements", "x i u", axis=1)],
            constants={"i": np.zeros((2, 1), np.int64), "u": np.zeros((2, 1), np.float32)},
        ),
    ),
    "scatter with reduction": (
        "A-SCATTER-REDUCTION",
        lambda p: save(
            p,
            [node("ScatterElements", "x i u", axis=1, reduction="add")],
            constants={"i": np.zeros((2, 1), np.int64), "u": np.zeros((2, 1), np.float32)},
            opset=16,
        ),
    ),
    "int64 Where": (
        "A-WHERE-INT64",
        lambda p: save(
            p,
            [node("Greater", "x zero", "c"), node("Where", "c one one")],
            outputs={"y": (INT64, None)},
            constants={"zero": np.float32(0).reshape(()), "one": np.array(1)},
        ),
    ),
    "large GatherElements": (
        "S-GATHER-ELEMENTS",
        lambda p: save(
            p,
            [node("GatherElements", "x i", axis=1)],
            inputs={"x": (FLOAT, [8, 197, 768]), "i": (INT64, [8, 89, 768])},
        ),
    ),
    "Einsum": ("S-AVOID", lambda p: save(p, [node("Einsum", "x", equation="ij->ji")])),
    "negative index": (
        "A-GATHER-NEGATIVE",
        lambda p: save(p, [node("Gather", "x i", axis=1)], constants={"i": np.array([-1])}),
    ),
    "part of a shape": (
        "A-SHAPE-RANGE",
        lambda p: save(p, [node("Shape", "x", start=1)], outputs={"y": (INT64, None)}, opset=15),
    ),
    "LayerNormalization": (
        "S-LAYERNORM-OP",
        lambda p: save(
            p,
            [node("LayerNormalization", "x s")],
            constants={"s": np.ones(4, np.float32)},
            opset=17,
        ),
    ),
    "broken LayerNorm": (
        "F-LAYERNORM",
        lambda p: save(
            p,
            [*layer_norm(), node("Relu", "variance", "z")],
            outputs={"y": (FLOAT, None), "z": (FLOAT, None)},
            **NORM,
        ),
    ),
}


def _unscaled() -> list[onnx.NodeProto]:
    return [
        node("MatMul", "q k", "logits"),
        node("Softmax", "logits", "weights", axis=-1),
        node("MatMul", "weights v", "y"),
    ]


@pytest.mark.parametrize("case", GOLDEN)
def test_golden(case: str, tmp_path: Path) -> None:
    rule, make = GOLDEN[case]
    report = atc_check(make(tmp_path / "m.onnx"), cann="9.0.0")
    assert rule in rules_of(report), str(report)


def test_a_good_attention_and_a_good_norm_pass(tmp_path: Path) -> None:
    for nodes, rest in ((attention(), ATTENTION), (layer_norm(), NORM)):
        report = atc_check(save(tmp_path / "m.onnx", nodes, **rest), cann="9.0.0")
        assert report.clean, str(report)
        assert report.attentions + report.layer_norms in ((1, 1, 0, 0), (0, 0, 1, 1))


def test_the_same_norm_with_a_vector_epsilon_is_not_fused(tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx", layer_norm("gamma"), **NORM)
    report = atc_check(path, cann="9.0.0")
    (finding,) = report.of("slow")
    assert "epsilon is not a scalar constant" in finding.places[0]


def test_external_data(tmp_path: Path) -> None:
    weights = {"w": np.ones(64, np.float32)}
    path = save(
        tmp_path / "m.onnx", [node("Add", "x w")], inputs={"x": (FLOAT, [64])}, constants=weights
    )
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    assert "P-EXT" not in rules_of(atc_check(path))
    weights_file = tmp_path / "w.bin"
    weights_file.write_bytes(weights_file.read_bytes()[:-1])
    (finding,) = atc_check(path).of("fail")
    assert "'w.bin' ends before the weights of 'w'" in finding.places[0]
    weights_file.unlink()
    (finding,) = atc_check(path).of("fail")
    assert "'w.bin' with weights is not beside" in finding.places[0]


# -- what is said ----------------------------------------------------------------------------------------------------


def test_it_never_claims_that_atc_was_run(vit: Path) -> None:
    report = atc_check(vit)
    assert NOT_RUN in str(report)
    assert json.loads(report.to_json())["atc_was_run"] is False
    assert NOT_RUN in report.to_sarif()
    assert "\n  ok" not in str(report)
    assert all(f"source: {finding.rule.source}" in str(report) for finding in report.findings)


def test_the_command(vit: Path) -> None:
    command = atc_check(vit, soc="Ascend310P3").command
    assert command.startswith("atc --framework=5 ")
    assert "--input_shape=x:1,3,64,96" in command
    assert "--soc_version=Ascend310P3" in command


def test_the_command_leaves_open_sizes_to_the_reader(tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx", [node("Relu", "x")], inputs={"x": (FLOAT, ["n", 4])})
    assert "x:<n>,4" in atc_check(path).command


def test_sarif(tmp_path: Path) -> None:
    path = GOLDEN["Loop"][1](tmp_path / "m.onnx")
    document = json.loads(atc_check(path).to_sarif())
    assert document["version"] == "2.1.0"
    (run,) = document["runs"]
    declared = {rule["id"] for rule in run["tool"]["driver"]["rules"]}
    assert {result["ruleId"] for result in run["results"]} <= declared
    assert ("P-SUBGRAPH", "error") in {(r["ruleId"], r["level"]) for r in run["results"]}


# -- bad input -------------------------------------------------------------------------------------------------------


def test_bad_files(vit: Path, tmp_path: Path) -> None:
    truncated, empty, text = (tmp_path / name for name in ("truncated", "empty", "text"))
    data = vit.read_bytes()
    truncated.write_bytes(data[: len(data) // 2])
    empty.touch()
    text.write_text("this is no model\n" * 20)
    for path in (truncated, empty, text, tmp_path / "missing", tmp_path):
        with pytest.raises(ExportError) as caught:
            atc_check(path)
        assert caught.value.hint


def test_bad_targets(vit: Path) -> None:
    with pytest.raises(ExportError, match="not a known chip"):
        atc_check(vit, soc="310P3")
    with pytest.raises(ExportError, match="not a CANN release"):
        atc_check(vit, cann="latest")
    assert atc_check(vit, soc="Ascend910_9382").soc == "Ascend910_9382"
