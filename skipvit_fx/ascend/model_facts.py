"""An ONNX file as the checker sees it: nodes, types and shapes, without the weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError
from onnx import helper, numpy_helper

from skipvit_fx.ascend.folding import infer
from skipvit_fx.errors import ExportError

Shape = tuple[int | str | None, ...]


@dataclass
class ModelFacts:
    """What rules need to know about a file.

    Attributes:
        path, size: the file and its size in bytes.
        model: the message; large external weights are not loaded.
        opset: the opset of the default domain; 0 if there is none.
        nodes: all nodes of the main graph, followed by those of subgraphs.
        producer, consumers: by tensor name, in the main graph.
        shapes, types: by tensor name, as far as inference knows them; types by name, such as ``FLOAT``.
        constants: initializers and Constant nodes' results.
        computed: small results that follow from constants and static shapes.
    """

    path: Path
    size: int
    model: onnx.ModelProto
    opset: int
    nodes: list[onnx.NodeProto]
    producer: dict[str, onnx.NodeProto] = field(default_factory=dict)
    consumers: dict[str, list[onnx.NodeProto]] = field(default_factory=lambda: defaultdict(list))
    shapes: dict[str, Shape] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)
    constants: dict[str, onnx.TensorProto | None] = field(default_factory=dict)
    computed: dict[str, onnx.TensorProto] = field(default_factory=dict)

    @property
    def inputs(self) -> list[onnx.ValueInfoProto]:
        """Graph inputs that are not initializers."""
        initialized = {tensor.name for tensor in self.model.graph.initializer}
        return [value for value in self.model.graph.input if value.name not in initialized]

    def only_consumer(self, name: str) -> onnx.NodeProto | None:
        """The only node that reads a tensor; ``None`` if none or several do, or the graph returns it."""
        readers = self.consumers[name]
        returned = any(output.name == name for output in self.model.graph.output)
        return readers[0] if len(readers) == 1 and not returned else None

    def constant(self, name: str) -> Any:
        """A small constant's numbers as an array; ``None`` if it is not constant or not in the file."""
        tensor = self.constants.get(name)
        if tensor is None or tensor.data_location == onnx.TensorProto.EXTERNAL:
            return None
        return numpy_helper.to_array(tensor)


def read_model(path: str | PathLike[str]) -> ModelFacts:
    """Read a file without its external weights.

    Raises:
        ExportError: there is no such file, or it is not a complete ONNX model.
    """
    file = Path(path)
    try:
        size = file.stat().st_size
        model = onnx.load(file, load_external_data=False)
    except OSError as error:
        raise ExportError(
            f"{file} cannot be read: {error.strerror or error}", hint="check the path"
        ) from error
    except DecodeError as error:
        raise ExportError(
            f"{file} is not an ONNX model, or only a part of one: {error}",
            hint="export or download it again",
        ) from error
    if not model.ir_version or not model.HasField("graph"):
        raise ExportError(
            f"{file} does not hold an ONNX model",
            hint="export it again; is it really an .onnx file?",
        )
    opset = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)
    facts = ModelFacts(file, size, model, opset, list(_nodes(model.graph)))
    graph, facts.computed = infer(model)
    _read_graph(facts, graph)
    return facts


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """A node's attributes by name; bytes as strings."""
    found = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return {k: v.decode() if isinstance(v, bytes) else v for k, v in found.items()}


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    yield from graph.node
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _nodes(attribute.g)


def _read_graph(facts: ModelFacts, graph: onnx.GraphProto) -> None:
    for node in facts.model.graph.node:
        for name in node.output:
            facts.producer[name] = node
        for name in node.input:
            facts.consumers[name].append(node)
        if node.op_type == "Constant":
            value = attributes(node).get("value")
            facts.constants[node.output[0]] = value
    for tensor in facts.model.graph.initializer:
        facts.constants[tensor.name] = tensor
    for tensor in [*facts.model.graph.initializer, *facts.computed.values()]:
        facts.shapes[tensor.name] = tuple(tensor.dims)
        facts.types[tensor.name] = _type_name(tensor.data_type)
    for value in [*graph.value_info, *graph.input, *graph.output]:
        type_ = value.type.tensor_type
        facts.types[value.name] = _type_name(type_.elem_type)
        if type_.HasField("shape"):
            facts.shapes[value.name] = tuple(_size(dim) for dim in type_.shape.dim)


def _size(dim: onnx.TensorShapeProto.Dimension) -> int | str | None:
    if dim.HasField("dim_value"):
        return dim.dim_value
    return dim.dim_param or None


def _type_name(number: int) -> str:
    names: dict[int, str] = {v: k for k, v in onnx.TensorProto.DataType.items()}
    return names.get(number, str(number))
