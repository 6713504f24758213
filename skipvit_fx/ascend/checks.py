"""What each rule looks for. A check yields one sentence per place, or one for all places together."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import onnx

from skipvit_fx.ascend.knowledge import Knowledge, Rule
from skipvit_fx.ascend.model_facts import ModelFacts, attributes
from skipvit_fx.ascend.patterns import Pattern, attentions, layer_norms


@dataclass
class Case:
    """One file and one release, with what is derived from them once."""

    facts: ModelFacts
    knowledge: Knowledge
    cann: str

    @cached_property
    def attentions(self) -> list[Pattern]:
        """Attention patterns of the file."""
        return attentions(self.facts)

    @cached_property
    def layer_norms(self) -> list[Pattern]:
        """LayerNorm patterns of the file."""
        return layer_norms(self.facts)


Check = Callable[[Case, Rule], Iterator[str]]
CHECKS: dict[str, Check] = {}
"""The checks, by the name in a rule's ``check``."""

_DEFAULT = ("", "ai.onnx")


def _check(function: Check) -> Check:
    CHECKS[function.__name__.strip("_")] = function
    return function


def _name(node: onnx.NodeProto) -> str:
    return f"{node.op_type} {node.name!r}" if node.name else f"{node.op_type} without a name"


# -- the file ------------------------------------------------------------------------------------------------------


@_check
def _opset(case: Case, rule: Rule) -> Iterator[str]:
    if case.facts.opset > rule.params["max"]:
        yield f"the model has opset {case.facts.opset}"


@_check
def _domain(case: Case, rule: Rule) -> Iterator[str]:
    imported = Counter(
        "" if o.domain in _DEFAULT else o.domain for o in case.facts.model.opset_import
    )
    if imported[""] != 1:
        yield f"the default domain has {imported['']} versions"
    foreign = Counter((n.domain, n.op_type) for n in case.facts.nodes if n.domain not in _DEFAULT)
    for (domain, operator), count in foreign.items():
        undeclared = "" if domain in imported else ", which is not even declared"
        yield f"{count} x {operator} of domain {domain!r}{undeclared}"


@_check
def _constant_form(case: Case, rule: Rule) -> Iterator[str]:
    for node in case.facts.nodes:
        if node.op_type == "Constant" and [a.name for a in node.attribute] != ["value"]:
            yield f"{_name(node)} has {', '.join(a.name for a in node.attribute) or 'nothing'}"


@_check
def _functions(case: Case, rule: Rule) -> Iterator[str]:
    if case.facts.model.functions:
        yield ", ".join(function.name for function in case.facts.model.functions)


@_check
def _subgraph(case: Case, rule: Rule) -> Iterator[str]:
    kinds = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
    for node in case.facts.nodes:
        graphs = [a for a in node.attribute if a.type in kinds]
        if graphs and (node.op_type != "If" or len(graphs) != 2):
            yield _name(node)


@_check
def _dtype(case: Case, rule: Rule) -> Iterator[str]:
    for name, type_ in case.facts.types.items():
        if type_ not in rule.params["allowed"] and type_ not in ("UNDEFINED", "0"):
            yield f"{name!r} is {type_}"


@_check
def _io(case: Case, rule: Rule) -> Iterator[str]:
    if not case.facts.inputs:
        yield "there is no input"
    if not case.facts.model.graph.output:
        yield "there is no output"


@_check
def _names(case: Case, rule: Rule) -> Iterator[str]:
    for name, count in Counter(n.name for n in case.facts.nodes if n.name).items():
        if count > 1:
            yield f"{count} nodes are named {name!r}"


@_check
def _name_clash(case: Case, rule: Rule) -> Iterator[str]:
    names = {node.name for node in case.facts.nodes}
    for value in case.facts.inputs:
        if value.name in names:
            yield repr(value.name)


@_check
def _size(case: Case, rule: Rule) -> Iterator[str]:
    if case.facts.size > rule.params["max"]:
        yield f"{case.facts.size:,} bytes"


@_check
def _external(case: Case, rule: Rule) -> Iterator[str]:
    needed_inside = {
        name
        for node in case.facts.nodes
        if node.op_type in ("Reshape", "Expand", "TopK", "Slice", "Squeeze", "Unsqueeze")
        for name in node.input[1:]
    }
    missing: set[str] = set()
    for tensor in case.facts.model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if others := sorted(set(entries) - set(rule.params["entries"])):
            yield f"{tensor.name!r} has the entries {', '.join(others)}"
        if tensor.name in needed_inside:
            yield f"{tensor.name!r} is a shape, axes or k, and not in the file itself"
        location = entries.get("location", "")
        file = case.facts.path.parent / location
        if location not in missing and not file.is_file():
            missing.add(location)
            yield f"the file {location!r} with weights is not beside the model"
        elif location not in missing and file.stat().st_size < _end(entries):
            missing.add(location)
            yield f"the file {location!r} ends before the weights of {tensor.name!r} do"


def _end(entries: dict[str, str]) -> int:
    """The least size in bytes of a file that holds this tensor's weights."""
    return int(entries.get("offset", 0)) + int(entries.get("length", 0))


@_check
def _zero(case: Case, rule: Rule) -> Iterator[str]:
    unread = {name for name in case.facts.constants if not case.facts.consumers.get(name)}
    optional = {  # an empty roi or scales says "not given" to Resize
        name for node in case.facts.nodes if node.op_type == "Resize" for name in node.input[1:]
    }
    for name, shape in case.facts.shapes.items():
        if 0 in shape and name not in unread and name not in optional:
            yield f"{name!r} is {list(shape)}"


@_check
def _input_dtype(case: Case, rule: Rule) -> Iterator[str]:
    for value in case.facts.inputs:
        type_ = case.facts.types[value.name]
        if type_ not in rule.params["allowed"]:
            yield f"{value.name!r} is {type_}"


@_check
def _ir_version(case: Case, rule: Rule) -> Iterator[str]:
    if case.facts.model.ir_version > rule.params["max"]:
        yield f"IR version {case.facts.model.ir_version}"


@_check
def _static(case: Case, rule: Rule) -> Iterator[str]:
    for value in case.facts.inputs:
        shape = case.facts.shapes.get(value.name)
        if shape is None or not all(isinstance(size, int) and size > 0 for size in shape):
            known = "without a shape" if shape is None else f"[{', '.join(map(str, shape))}]"
            yield f"input {value.name!r} is {known}"
    inner = [
        name
        for node in case.facts.model.graph.node
        for name in node.output
        if name and not _is_static(case.facts.shapes.get(name))
    ]
    if inner:
        yield f"{len(inner)} of all results, from {inner[0]!r} on"


def _is_static(shape: tuple[Any, ...] | None) -> bool:
    return shape is not None and all(isinstance(size, int) for size in shape)


# -- operators -----------------------------------------------------------------------------------------------------


@_check
def _operators(case: Case, rule: Rule) -> Iterator[str]:
    opset = case.facts.opset
    own = dict.fromkeys(n.op_type for n in case.facts.nodes if n.domain in _DEFAULT)
    by_reason: dict[str, list[str]] = {}
    for operator in own:
        if operator == "Constant":  # the parser itself reads it
            continue
        support = case.knowledge.support(operator, opset, case.cann)
        if support.answer == rule.params["answer"]:
            by_reason.setdefault(support.why, []).append(operator)
    for why, operators in by_reason.items():
        yield f"{', '.join(operators)} at opset {opset}: {why}"


@_check
def _node(case: Case, rule: Rule) -> Iterator[str]:
    params = rule.params
    if case.facts.opset < params.get("opset_min", 0):
        return
    for node in case.facts.nodes:
        if (
            node.op_type in params["ops"]
            and node.domain in _DEFAULT
            and _matches(case, node, params)
        ):
            yield _name(node)


def _matches(case: Case, node: onnx.NodeProto, params: dict[str, Any]) -> bool:
    facts, given = case.facts, attributes(node)
    if "input_given" in params and not _input(node, params["input_given"]):
        return False
    if "not_constant" in params:
        names = [_input(node, index) for index in params["not_constant"]]
        return any(n and n not in facts.constants and n not in facts.computed for n in names)
    for name, values in params.get("attribute", {}).items():
        if given.get(name) not in values:
            return False
    if "attribute_not" in params:
        wrong = params["attribute_not"].items()
        return any(name in given and given[name] not in values for name, values in wrong)
    for index, types in params.get("dtype_in", {}).items():
        if facts.types.get(_input(node, int(index))) not in types:
            return False
    for index, types in params.get("dtype_not_in", {}).items():
        if facts.types.get(_input(node, int(index))) in types:
            return False
    return True


def _input(node: onnx.NodeProto, index: int) -> str:
    return node.input[index] if index < len(node.input) else ""


@_check
def _computed(case: Case, rule: Rule) -> Iterator[str]:
    for node in case.facts.nodes:
        operands = [_input(node, index) for index in rule.params["operands"].get(node.op_type, ())]
        if node.domain in _DEFAULT and any(name in case.facts.computed for name in operands):
            yield _name(node)


@_check
def _topk_indices(case: Case, rule: Rule) -> Iterator[str]:
    for node in case.facts.nodes:
        if node.op_type != "TopK" or len(node.output) < 2:
            continue
        readers = case.facts.consumers[node.output[1]]
        returned = any(value.name == node.output[1] for value in case.facts.model.graph.output)
        casts = [
            r.op_type == "Cast" and attributes(r)["to"] == onnx.TensorProto.INT32 for r in readers
        ]
        if returned or not all(casts):
            yield _name(node)


@_check
def _clip(case: Case, rule: Rule) -> Iterator[str]:
    for node in case.facts.nodes:
        if node.op_type == "Clip" and not any(node.input[1:]) and not node.attribute:
            yield _name(node)


@_check
def _gather_negative(case: Case, rule: Rule) -> Iterator[str]:
    for node in case.facts.nodes:
        if node.op_type == "Gather":
            indices = case.facts.constant(node.input[1])
            if indices is not None and indices.size and indices.min() < 0:
                yield _name(node)


@_check
def _gather_elements(case: Case, rule: Rule) -> Iterator[str]:
    for node in case.facts.nodes:
        if node.op_type != "GatherElements":
            continue
        data, indices = (case.facts.shapes.get(name, (None,)) for name in node.input[:2])
        if not (_is_static(data) and _is_static(indices)):
            yield f"{_name(node)}, of unknown size"
        elif _bytes(data) > rule.params["bytes"] and _bytes(indices) > 4 * rule.params["indices"]:
            yield f"{_name(node)} reads {list(indices)} of {list(data)}"


def _bytes(shape: Iterable[Any]) -> int:
    """The bytes of a tensor in single precision."""
    return 4 * math.prod(int(size) for size in shape)


# -- fusion --------------------------------------------------------------------------------------------------------


@_check
def _attention(case: Case, rule: Rule) -> Iterator[str]:
    for pattern in case.attentions:
        if pattern.broken:
            yield f"at Softmax {pattern.node!r}: {pattern.broken}"


@_check
def _attention_scale(case: Case, rule: Rule) -> Iterator[str]:
    plain = [pattern.node for pattern in case.attentions if not pattern.scaled]
    if plain:
        yield f"{len(plain)} of {len(case.attentions)}, the first at Softmax {plain[0]!r}"


@_check
def _layer_norm(case: Case, rule: Rule) -> Iterator[str]:
    for pattern in case.layer_norms:
        if pattern.broken:
            yield f"at ReduceMean {pattern.node!r}: {pattern.broken}"


@_check
def _tiles(case: Case, rule: Rule) -> Iterator[str]:
    tile = rule.params["tile"]
    counts = Counter(pattern.columns for pattern in case.attentions if pattern.columns)
    for count, layers in counts.items():
        if count % tile:
            padded = math.ceil(count / tile) * tile
            yield f"{count} tokens in {layers} attentions become {padded}"
