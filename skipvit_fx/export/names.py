"""Names that a reader of the file understands: modules for what the author wrote, the graph's for what was inserted."""

from __future__ import annotations

import ast
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from skipvit_fx.graph.module import SkipViTModule
from skipvit_fx.names import INSERTED_BY
from skipvit_fx.torch_internals import graph_of

if TYPE_CHECKING:
    import onnx_ir as ir

_SCOPES = "pkg.torch.onnx.name_scopes"
"""Where torch's exporter notes the modules that a node was made in, from the outermost, and its name in the program."""

_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"
"""What the exporter notes as the module of a size that it reads from an input."""

_UNUSUAL = re.compile(r"[^\w./-]")
"""What other tools may not take in a name; ATC, for one, has a meaning for the colon."""


def add_inserted(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """Add the tensors that passes inserted to the outputs, in place: pass a copy, after a call like this one.

    The exporter names values as it likes, but the outputs tell which is which; :func:`take_names` removes them again.

    Returns:
        Their names, in order; none if the module was not rewritten, or this call has a graph of its own.
    """
    if not isinstance(module, SkipViTModule):
        return []
    form = module.prepare(*args, **kwargs)
    graph = graph_of(module)
    if form.call.graph is not graph:
        return []
    output = graph.output_node()
    result = output.args[0]
    nodes = [node for node in graph.nodes if INSERTED_BY in node.meta]
    output.args = ((result, tuple(nodes)),)
    module.recompile()
    _, values = module(*args, **kwargs)
    tensors = [node for node, value in zip(nodes, values, strict=True) if isinstance(value, Tensor)]
    output.args = ((result, tuple(tensors)),)
    module.recompile()
    return [node.name for node in tensors]


def take_names(model: ir.Model, names: list[str]) -> None:
    """Give the last outputs these names, and remove them from the outputs."""
    outputs = model.graph.outputs
    first = len(outputs) - len(names)
    others = set(outputs[:first]) | set(model.graph.inputs)
    for value, name in zip(outputs[first:], names, strict=True):
        if value not in others and value.producer() is not None:
            value.name = name
            others.add(value)
    outputs[first:] = []  # `del` would leave them marked as outputs


def name_batch(model: ir.Model) -> None:
    """Call a size of the first axis of an input that is not fixed ``batch``, wherever it appears."""
    import onnx_ir as ir

    given = [value.shape[0] for value in model.graph.inputs if value.shape]
    symbols = {str(size.value) for size in given if isinstance(size, ir.SymbolicDim) and size.value}
    if not symbols:
        return
    pattern = re.compile(rf"\b(?:{'|'.join(map(re.escape, sorted(symbols)))})\b")

    def renamed(size: int | ir.SymbolicDim) -> int | ir.SymbolicDim:
        if isinstance(size, int) or not size.value:
            return size
        return ir.SymbolicDim(pattern.sub("batch", str(size.value)))

    made = [value for node in model.graph for value in node.outputs]
    for value in (*model.graph.inputs, *made):
        if value.shape is not None:
            value.shape = ir.Shape([renamed(size) for size in value.shape])


def name_by_module(model: ir.Model, inserted: list[str]) -> None:
    """Name nodes by their module and operator, as in ``blocks.0.attn/Softmax``, and the values that they make likewise.

    Values that :func:`take_names` named, inputs, weights and outputs keep their names.
    """
    graph = model.graph
    kept = {*inserted, *graph.initializers, *(str(v.name) for v in (*graph.inputs, *graph.outputs))}
    taken: Counter[str] = Counter()
    for node in graph:
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "['']"))
        modules = [scope for scope in scopes[:-1] if scope and scope != _NO_MODULE]
        module = modules[-1] if modules else ""
        name = _UNUSUAL.sub("_", f"{module}/{node.op_type}" if module else node.op_type)
        taken[name] += 1
        node.name = name if taken[name] == 1 else f"{name}_{taken[name]}"
        for i, value in enumerate(node.outputs):
            if value.name not in kept:
                value.name = node.name if len(node.outputs) == 1 else f"{node.name}.{i}"
