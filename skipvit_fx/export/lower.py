"""Converts a model from the exporter's opset to an older one, by comparing operator schemas."""

from __future__ import annotations

import logging

import onnx
import onnx_ir as ir
from onnx import defs
from onnx_ir.passes import common
from onnxscript import optimizer
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.rules import common as rules

from skipvit_fx.errors import ExportError

_CHANGED_MEANING = {"Softmax": 13, "LogSoftmax": 13, "Hardmax": 13}
"""Operators whose old form flattens the axes after ``axis``; both forms agree only for the last axis."""

_IRRELEVANT = frozenset({"num_outputs", "allowzero"})
"""Attributes that have no effect here: a Split without sizes is even, and no tensor has a dimension of zero."""


_ANY_SIZE = 2**62

_MOVES_ONLY = (
    rules.materialize_reshape_shape_rule,
    rules.one_reshape_matmul_reshape_rule,
    rules.two_reshapes_matmul_reshape_rule,
    rules.reshape_reshape_rule,
    rules.squeeze_reshape_1d_rule,
    rules.transpose_transpose_rule,
    rules.unsqueeze_unsqueeze_rule,
    rules.no_op_cast_rule,
    rules.no_op_expand_rule,
    rules.no_op_transpose_rule,
    rules.collapse_slice_rule,
    rules.collapse_slice2_rule,
)
"""Rewrites that only move data and never change a number."""


def lower_opset(model: ir.Model, opset: int) -> None:
    """Rewrite ``model`` in place for an older default opset.

    Attributes that became inputs since then (the axes of ReduceMean) become attributes again, attributes that did not
    exist are dropped if they have the default value, and anything else is an error.

    Raises:
        ExportError: an operator, attribute or input has no counterpart in ``opset``.
    """
    now = model.opset_imports[""]
    for node in model.graph:
        if node.domain == "":
            _lower(node, now, opset)
    model.opset_imports[""] = opset
    _drop_unread(model)


def _lower(node: ir.Node, now: int, opset: int) -> None:
    newer = defs.get_schema(node.op_type, now, "")
    try:
        older = defs.get_schema(node.op_type, opset, "")
    except defs.SchemaError:
        raise _no_counterpart(node, f"operator {node.op_type}", opset) from None
    node.version = None
    changed = _CHANGED_MEANING.get(node.op_type, 0)
    if opset < changed <= now:
        _check_last_axis(node, opset)
    if newer.since_version == older.since_version:
        return
    known = [formal.name for formal in older.inputs]
    variadic = (
        bool(older.inputs)
        and older.inputs[-1].option == defs.OpSchema.FormalParameterOption.Variadic
    )
    if not variadic:
        for index in reversed(range(len(known), len(node.inputs))):
            _to_attribute(node, index, newer.inputs[index].name, older, opset)
    for name, attribute in list(node.attributes.items()):
        if name in older.attributes:
            continue
        if name in _IRRELEVANT or _is_default(attribute, newer.attributes[name]):
            del node.attributes[name]
            continue
        raise _no_counterpart(node, f"attribute {name} of {node.op_type}", opset)


def _to_attribute(node: ir.Node, index: int, name: str, older: defs.OpSchema, opset: int) -> None:
    value = node.inputs[index]
    if value is not None:
        constant = ir.convenience.get_const_tensor(value)
        if constant is None or name not in older.attributes:
            raise _no_counterpart(node, f"input {name} of {node.op_type}", opset)
        numbers = [int(n) for n in constant.numpy().reshape(-1)]
        node.attributes[name] = ir.AttrInt64s(name, numbers)
    node.resize_inputs(index)


def _is_default(attribute: ir.Attr, schema: defs.OpSchema.Attribute) -> bool:
    default = schema.default_value
    if default.type == onnx.AttributeProto.UNDEFINED:
        return False
    value = onnx.helper.get_attribute_value(default)
    return bool(attribute.value == value)


def _check_last_axis(node: ir.Node, opset: int) -> None:
    axis = node.attributes.get_int("axis", -1)
    shape = node.inputs[0].shape if node.inputs and node.inputs[0] is not None else None
    if shape is None or axis not in (-1, len(shape) - 1):
        raise _no_counterpart(node, f"{node.op_type} over an axis other than the last", opset)
    node.attributes["axis"] = ir.AttrInt64("axis", len(shape) - 1)


def tidy(model: ir.Model) -> None:
    """Fold what depends only on weights, however large: a slice of a weight, a table of positions. Remove unused parts.

    The exporter's own optimiser is not used: it treats an epsilon of 1e-12 as zero and drops the addition.
    """
    common.InlinePass()(model)
    logger = logging.getLogger("onnxscript.optimizer._constant_folding")
    level = logger.level
    logger.setLevel(
        logging.ERROR
    )  # it reports every operator with several outputs that it does not fold
    try:
        optimizer.fold_constants(model, input_size_limit=_ANY_SIZE, output_size_limit=_ANY_SIZE)
    finally:
        logger.setLevel(level)
    for step in (
        RewritePass(_MOVES_ONLY),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        common.RemoveUnusedOpsetsPass(),
        common.IdentityEliminationPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.ShapeInferencePass(),
    ):
        step(model)


def finish(model: ir.Model, ir_version: int) -> None:
    """Keep indices in int32, remove metadata of the exporting machine, and give every node a unique name."""
    for node in model.graph:
        if node.op_type == "Gather" and node.domain == "":
            _read_int32(node)
    common.RemoveUnusedNodesPass()(model)
    common.ClearMetadataAndDocStringPass()(model)
    common.NameFixPass()(model)
    model.ir_version = ir_version
    model.producer_name, model.producer_version = "skipvit_fx", None


def _read_int32(gather: ir.Node) -> None:
    index = gather.inputs[1]
    cast = index.producer() if index is not None else None
    if cast is not None and cast.op_type == "Cast" and cast.inputs[0] is not None:
        source = cast.inputs[0]
        if source.dtype == ir.DataType.INT32:
            gather.replace_input_with(1, source)


def _drop_unread(model: ir.Model) -> None:
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]


def _no_counterpart(node: ir.Node, what: str, opset: int) -> ExportError:
    return ExportError(
        f"{what} (node {node.name!r}) has no counterpart in opset {opset}",
        hint="choose a higher opset within the target's range, or write that part of the model with simpler operators",
    )
