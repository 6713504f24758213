"""Everything in torch that this package uses and torch does not promise to keep, in one place.

Each entry says what it is for, since which release of torch it exists in the form used here, and what is lost without
it. A test makes sure that no other file uses torch's internals.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, fx, nn
from torch.nn import functional as F

# Trees of nested tuples, lists and dicts. Since 2.0; `torch.utils.pytree` is to replace it. All
# arguments and results are flattened with it.
from torch.utils import _pytree as pytree

# A context that sees every operator. Since 1.13. The token analysis and every watch over a run are based on it.
from torch.utils._python_dispatch import TorchDispatchMode

# Fake tensors: shapes without data. Since 2.0, `may_turn_const` and `from_real_tensor(make_constant=)` since 2.1.
# Nothing could be captured without them.
from torch._subclasses.fake_tensor import (  # isort: skip
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)

# The wrapper of fake tensors while `torch.export` runs. Since 2.1. Without it, a value that export
# made would be taken for the author's.
from torch._subclasses.functional_tensor import FunctionalTensor  # isort: skip

# Sizes as symbols. Since 2.1. They show whether a module computes with the number of tokens.
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv  # isort: skip

# Turns expressions of sizes, as `torch.export` leaves them, into nodes. Since 2.3. Without it,
# computations with batch sizes could not be followed.
from torch.utils._sympy.interp import sympy_interp  # isort: skip
from torch.utils._sympy.reference import PythonReferenceAnalysis  # isort: skip

# The code of graphs. Since 1.8. With it, modules are not looked up at every call.
from torch.fx import _symbolic_trace  # isort: skip
from torch.fx.graph import _format_target  # isort: skip
from torch.fx.graph_module import _forward_from_src  # isort: skip

__all__ = [
    "ASSERT",
    "BATCH_NORM",
    "COUNTER",
    "DTYPE_OF_MASK",
    "HOOKS",
    "KEEPS_ARGUMENTS",
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "FakeTensor",
    "FakeTensorMode",
    "FunctionalTensor",
    "PythonReferenceAnalysis",
    "ShapeEnv",
    "TorchDispatchMode",
    "aten",
    "buffers_of",
    "call_hooks_of",
    "children_of",
    "expression_of",
    "function_from",
    "graph_of",
    "hint_of",
    "hooks_before",
    "hooks_made",
    "is_in_fake_mode",
    "is_operator",
    "is_wrapped_by_functorch",
    "is_writing",
    "new_size",
    "overload_name",
    "parameters_of",
    "printed_target",
    "pytree",
    "schema_arguments",
    "schema_name",
    "spelled_path",
    "storage_of",
    "symbol_of",
    "symbolic_trace_module",
    "sympy_interp",
    "tensor_leaves",
]


# -- operators --------------------------------------------------------------------------------------------------------


class _Absent:
    """An operator that this torch does not have: equal to no operator that a graph could hold."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, overload: str) -> _Absent:
        if overload.startswith("__"):
            raise AttributeError(overload)
        return _Absent(f"{self.name}.{overload}")

    def __repr__(self) -> str:
        return f"aten.{self.name} (not in torch {torch.__version__})"


class _Operators:
    """``torch.ops.aten``, except that a missing operator is not an error.

    Names with an underscore come and go: `_safe_softmax` since 2.5, `_fused_rms_norm` since 2.9. A rule for a missing
    operator is never applied.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.ops.aten, name, None) or _Absent(name)


aten: Any = _Operators()


def is_operator(target: object) -> bool:
    """Whether a node's target is an operator overload. Since 1.11; exported graphs hold nothing else."""
    return isinstance(target, torch._ops.OpOverload)


def schema_arguments(operator: Any) -> list[Any]:
    """The arguments that an operator declares, with defaults and whether it writes into them. Since 1.11."""
    return list(operator._schema.arguments)


def schema_name(operator: Any) -> str:
    """Such as ``aten::add``. Since 1.11."""
    return str(operator._schema.name)


def overload_name(operator: Any) -> str:
    """Such as ``Tensor``. Since 1.11."""
    return str(operator._overloadname)


def is_writing(operator: Any) -> bool:
    """Whether an operator writes into an argument. Since 1.11; writes that a graph does not show would be lost."""
    return bool(operator._schema.is_mutable)


# -- tensors and sizes ------------------------------------------------------------------------------------------------


def storage_of(tensor: Tensor) -> int:
    """A number that is equal for tensors that share memory, even fake ones, which have no address. Since 2.0."""
    return int(tensor.untyped_storage()._cdata)


def expression_of(number: Any) -> Any:
    """The sympy expression of a symbolic size, number or guard; ``None`` for a plain one. Since 2.1."""
    if isinstance(number, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        number = number.node
    return getattr(number, "expr", None)


def symbol_of(size: Any) -> Any:
    """The sympy symbol that a size was made with, whatever became known about it since. Since 2.1."""
    return size.node._expr


def new_size(env: ShapeEnv, kind: str, hint: int) -> Any:
    """A symbolic size of which only the example's value is known. Since 2.1."""
    from torch._dynamo.source import ConstantSource  # takes a second to import

    source = ConstantSource(f"{kind}_{len(env.source_to_var)}")
    symbol = env.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC)
    return env.create_symintnode(symbol, hint=hint, source=source)


def hint_of(size: Any) -> int:
    """A size as a number; a symbolic one as in the example. Since 2.1."""
    hint: Any = size.node.hint if isinstance(size, torch.SymInt) else size
    return int(hint)


def is_in_fake_mode() -> bool:
    """Whether a tool is tracing with fake tensors: ``torch.compile``, ``torch.export``. Since 2.1."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def is_wrapped_by_functorch(tensor: Tensor) -> bool:
    """Whether a transform of ``torch.func`` holds the tensor. Since 2.0."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


DTYPE_OF_MASK = (F, "_none_or_dtype")
"""What ``F.multi_head_attention_forward`` asks of its masks, replaced if they are proxies. Since 1.13."""


# -- modules ----------------------------------------------------------------------------------------------------------


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """The dict of a module's children itself, not a copy. Since 0.1; changes to it are noticed."""
    return module._modules


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The dict of a module's own parameters itself, not a copy. Since 0.1."""
    return module._parameters


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """The dict of a module's own buffers itself, not a copy. Since 0.1."""
    return module._buffers


def hooks_before(module: nn.Module) -> dict[int, Any]:
    """The dict of hooks that run before every call itself, not a copy. Since 1.0."""
    return module._forward_pre_hooks


def call_hooks_of(module: nn.Module) -> tuple[dict[int, Any], ...]:
    """All hooks that run with a call or its gradients, by kind. Since 2.0."""
    return (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )


HOOKS = tuple(name for name in vars(nn.Module()) if name.startswith(("_forward", "_backward")))
"""Attributes of a module that hold hooks of its calls, in this release of torch."""


def hooks_made() -> int:
    """The number of hooks ever registered in this process: unchanged if no hook is new. Since 1.0."""
    from torch.utils.hooks import RemovableHandle

    return RemovableHandle.next_id


KEEPS_ARGUMENTS: Any = getattr(torch.utils.checkpoint, "_NoopSaveInputs", None)
"""With which a checkpoint keeps its arguments. Up to 2.11; without it, models that recompute are refused there."""

BATCH_NORM = nn.modules.batchnorm._BatchNorm
"""The base class of all batch norms. Since 0.4; their running statistics are state that a run must leave alone."""


# -- graphs -----------------------------------------------------------------------------------------------------------

ASSERT = torch._assert
"""An assertion that tracing keeps as a node. Since 1.8; nothing reads it, but it must stay."""

COUNTER = "# COUNTER: "
"""The mark that ``torch.fx`` puts before the code of every node and removes again. Since 2.1; recomputed regions are
found by it."""


symbolic_trace_module = _symbolic_trace
"""Where ``torch.fx`` keeps the functions that it replaces while it traces. Since 1.8; hidden from other threads."""


def tensor_leaves(tree: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists, dicts and registered classes, in order. Since 2.0."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def graph_of(module: fx.GraphModule) -> fx.Graph:
    """The current graph of a graph module, bypassing a subclass's ``graph`` property. Since 1.8."""
    return module._graph


def spelled_path(base: str, target: str) -> str:
    """A module's path as spelled in the code of a graph, such as ``getattr(self.blocks, "0")``. Since 1.8."""
    return _format_target(base, target)


def function_from(source: str, names: dict[str, Any]) -> Any:
    """The ``forward`` that some code defines, whose lines tracebacks can show. Since 1.8."""
    return _forward_from_src(source, names)


def printed_target(node: fx.Node) -> str:
    """A node's target as ``torch.fx`` prints it. Since 1.8; only for people."""
    return str(node._pretty_print_target(node.target))
