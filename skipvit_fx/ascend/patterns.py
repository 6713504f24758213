"""Subgraphs that ATC's fusions look for, and what prevents a match."""

from __future__ import annotations

from dataclasses import dataclass

import onnx

from skipvit_fx.ascend.model_facts import ModelFacts, attributes


@dataclass(frozen=True)
class Pattern:
    """One place that is meant to be fused.

    Attributes:
        node: name of its main node: the Softmax, or the first ReduceMean.
        broken: why the fusion would not match; empty if nothing is known against it.
        rows, columns: those of an attention matrix, if known.
        scaled: whether an attention has a Mul (or Div) between its products.
    """

    node: str
    broken: str = ""
    rows: int | None = None
    columns: int | None = None
    scaled: bool = True


def attentions(facts: ModelFacts) -> list[Pattern]:
    """Every Softmax between two MatMul."""
    found = []
    for node in facts.model.graph.node:
        if node.op_type != "Softmax":
            continue
        readers = facts.consumers[node.output[0]]
        if not any(reader.op_type == "MatMul" for reader in readers):
            continue
        chain = _logits_chain(facts, node)
        if chain is None:
            continue
        broken = ""
        for part in [*chain, node]:
            if facts.only_consumer(part.output[0]) is None:
                users = sorted({u.op_type for u in facts.consumers[part.output[0]]})
                broken = f"the result of {part.op_type} {part.name!r} is read by {', '.join(users)}"
        shape = facts.shapes.get(node.output[0], ())
        rows, columns = (shape[-2], shape[-1]) if len(shape) >= 2 else (None, None)
        found.append(
            Pattern(
                node.name,
                broken,
                rows if isinstance(rows, int) else None,
                columns if isinstance(columns, int) else None,
                scaled=any(part.op_type in ("Mul", "Div") for part in chain),
            )
        )
    return found


def _logits_chain(facts: ModelFacts, softmax: onnx.NodeProto) -> list[onnx.NodeProto] | None:
    """From the first MatMul to what the Softmax reads, over Mul, Div and Add."""
    chain: list[onnx.NodeProto] = []
    name = softmax.input[0]
    while True:
        node = facts.producer.get(name)
        if node is None:
            return None
        chain.insert(0, node)
        if node.op_type == "MatMul":
            return chain
        if node.op_type not in ("Mul", "Div", "Add"):
            return None
        inner = [i for i in node.input if i not in facts.constants and i in facts.producer]
        onward = [i for i in inner if _reaches_matmul(facts, i)]
        if not onward:
            return None
        name = onward[0]


def _reaches_matmul(facts: ModelFacts, name: str) -> bool:
    node = facts.producer.get(name)
    while node is not None and node.op_type in ("Mul", "Div", "Add"):
        node = facts.producer.get(node.input[0])
    return node is not None and node.op_type == "MatMul"


def layer_norms(facts: ModelFacts) -> list[Pattern]:
    """Every ``x - mean(x)`` that is then divided by its standard deviation."""
    found = []
    for node in facts.model.graph.node:
        if node.op_type != "ReduceMean":
            continue
        centred = facts.only_consumer(node.output[0])
        if centred is None or centred.op_type != "Sub" or centred.input[0] != node.input[0]:
            continue
        readers = facts.consumers[centred.output[0]]
        if not any(reader.op_type in ("Pow", "Mul", "Div") for reader in readers):
            continue
        found.append(Pattern(node.name, _norm_fault(facts, node, centred)))
    return found


def _norm_fault(facts: ModelFacts, mean: onnx.NodeProto, centred: onnx.NodeProto) -> str:
    shape = facts.shapes.get(mean.input[0])
    if shape is None or not all(isinstance(size, int) for size in shape):
        return "the shape is not static"
    if not _over_last_axis(facts, mean, len(shape)):
        return "the mean is not over the last axis"
    readers = {reader.op_type: reader for reader in facts.consumers[centred.output[0]]}
    if set(readers) != {"Pow", "Div"} or len(facts.consumers[centred.output[0]]) != 2:
        return f"the centred value is read by {', '.join(sorted(readers))}, not by Pow and Div"
    power = facts.constant(readers["Pow"].input[1])
    if power is None or power.size != 1 or float(power.reshape(-1)[0]) != 2.0:
        return "the exponent is not a constant 2"
    node = readers["Pow"]
    for wanted in ("ReduceMean", "Add", "Sqrt", "Div", "Mul", "Add"):
        following = facts.only_consumer(node.output[0])
        if following is None or following.op_type != wanted:
            return f"{node.op_type} {node.name!r} is not followed by one {wanted}"
        if wanted == "ReduceMean" and not _over_last_axis(facts, following, len(shape)):
            return "the variance is not over the last axis"
        if wanted == "Add" and node.op_type == "ReduceMean":
            epsilon = [facts.constant(name) for name in following.input]
            if not any(value is not None and value.size == 1 for value in epsilon):
                return "epsilon is not a scalar constant"
        node = following
    return ""


def _over_last_axis(facts: ModelFacts, node: onnx.NodeProto, rank: int) -> bool:
    known = attributes(node)
    axes = known.get("axes")
    if axes is None and len(node.input) > 1:
        constant = facts.constant(node.input[1])
        axes = None if constant is None else constant.reshape(-1).tolist()
    return (
        axes is not None
        and [axis % rank for axis in axes] == [rank - 1]
        and known.get("keepdims", 1) == 1
    )
