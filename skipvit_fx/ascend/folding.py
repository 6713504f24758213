"""Values that follow from a file's constants and static shapes alone, and the shapes that follow from these."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

_FOLDED = frozenset(
    {
        *("Add", "Cast", "Concat", "ConstantOfShape", "Div", "Equal", "Expand", "Gather"),
        *("Identity", "Mul", "Range", "Reshape", "Shape", "Slice", "Squeeze", "Sub", "Unsqueeze"),
        "Where",
    }
)
"""Operators with which exporters compute shapes."""

_LARGEST = 1024
"""The most elements of a shape; anything larger is a weight, and is not examined."""


def infer(model: onnx.ModelProto) -> tuple[onnx.GraphProto, dict[str, onnx.TensorProto]]:
    """The main graph with inferred shapes, and the results that do not depend on an input.

    Shapes make further shape arithmetic known, which makes further shapes known, so the two alternate.
    """
    found: dict[str, onnx.TensorProto] = {}
    while True:
        graph = _inferred(_with_constants(model, found) if found else model)
        more = _fold(model, graph, found)
        if not more:
            return graph, found
        found |= more


def _inferred(model: onnx.ModelProto) -> onnx.GraphProto:
    try:
        return onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    except (onnx.shape_inference.InferenceError, ValueError, RuntimeError):
        return (
            model.graph
        )  # too large, or an opset that this onnx does not know: use the shapes in the file


def _with_constants(model: onnx.ModelProto, found: dict[str, onnx.TensorProto]) -> onnx.ModelProto:
    """A copy in which these results are initializers."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    nodes = [node for node in copy.graph.node if not set(node.output) <= set(found)]
    del copy.graph.node[:]
    copy.graph.node.extend(nodes)
    copy.graph.initializer.extend(found.values())
    return copy


def _fold(
    model: onnx.ModelProto, graph: onnx.GraphProto, found: dict[str, onnx.TensorProto]
) -> dict[str, onnx.TensorProto]:
    """Results that have newly become known."""
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in [*graph.value_info, *graph.input, *graph.output]
        if value.type.tensor_type.HasField("shape")
        and all(dim.HasField("dim_value") for dim in value.type.tensor_type.shape.dim)
    }
    shapes |= {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    values = {t.name: t for t in model.graph.initializer if _is_small(t)} | found
    more: dict[str, onnx.TensorProto] = {}
    for node in model.graph.node:
        known = values | more
        if node.op_type == "Constant" and [a.name for a in node.attribute] == ["value"]:
            if _is_small(node.attribute[0].t):
                values[node.output[0]] = node.attribute[0].t
        elif node.op_type not in _FOLDED or node.domain or node.output[0] in found:
            continue
        elif node.op_type == "Shape" and not node.attribute and node.input[0] in shapes:
            shape = np.array(shapes[node.input[0]], np.int64)
            more[node.output[0]] = numpy_helper.from_array(shape, node.output[0])
        elif all(name in known for name in node.input if name):
            result = _evaluated(node, model, known)
            if result is not None:
                more[node.output[0]] = numpy_helper.from_array(result, node.output[0])
    return more


def _is_small(tensor: onnx.TensorProto) -> bool:
    inside = tensor.data_location != onnx.TensorProto.EXTERNAL
    return inside and int(np.prod(tensor.dims)) <= _LARGEST


def _evaluated(
    node: onnx.NodeProto, model: onnx.ModelProto, known: dict[str, onnx.TensorProto]
) -> np.ndarray | None:
    """One node's result; ``None`` if it is large, or if the node is inconsistent."""
    names = list(dict.fromkeys(name for name in node.input if name))
    graph = helper.make_graph(
        [node],
        "one",
        [onnx.ValueInfoProto(name=name) for name in names],
        [onnx.ValueInfoProto(name=node.output[0])],
    )
    alone = helper.make_model(graph, opset_imports=model.opset_import)
    try:
        feeds = {name: numpy_helper.to_array(known[name]) for name in names}
        (result,) = ReferenceEvaluator(alone).run(None, feeds)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None
    return result if isinstance(result, np.ndarray) and result.size <= _LARGEST else None
