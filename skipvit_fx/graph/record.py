"""What a rewrite did, kept with the rewritten module: names and numbers, without nodes or data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn

from skipvit_fx.errors import NotRewrittenError
from skipvit_fx.graph.editor import Event
from skipvit_fx.names import OWN_CHILD, RECORD
from skipvit_fx.options import Frontend, Options
from skipvit_fx.plan import Plan
from skipvit_fx.torch_internals import printed_target


@dataclass(frozen=True)
class LayerRecord:
    """One layer, by the names of the author's nodes in the graph; see :class:`skipvit_fx.analysis.layers.Layer`."""

    index: int
    input: str
    cut: str
    end: str
    attention: str
    module_path: str


@dataclass(frozen=True)
class StageRecord:
    """One stage of the plan.

    Attributes:
        index, layer: the numbers of the stage, from 1, and of the layer that it scores in.
        span: which of the plan's spans it is in, from 0.
        path: where its modules are in the rewritten model, e.g. ``skipvit.stage_1``.
        leave_after, leave_before: the author's modules between which its tokens leave.
        return_before: the one before which they return; ``None`` if they never do.
    """

    index: int
    layer: int
    span: int
    path: str
    leave_after: str
    leave_before: str
    return_before: str | None


@dataclass(frozen=True)
class PassRecord:
    """What one pass did.

    Attributes:
        name: of the pass.
        events: its edits, in order; empty if it changed nothing.
    """

    name: str
    events: tuple[Event, ...]


@dataclass(frozen=True)
class RewriteRecord:
    """Everything that is known about a rewrite.

    Attributes:
        model: class name of the model.
        options: what was asked for.
        frontend, frontend_reason: how the model was captured, and why.
        token_dim: which dimension of the residual stream carries the tokens.
        prefix, patches, suffix: numbers of rows of the full sequence.
        class_token: which row is the class token, and how that was told.
        args, kwargs: the example inputs, as tensors on the meta device.
        layers, stages: the layers found and the stages inserted.
        passes: every edit, pass by pass.
        before: the captured graph before any pass, one line per node.
        computation: the same with nodes by number, independent of torch's names.
        validated: what was found when the rewritten graph ran beside the model, or why it did not run.
    """

    model: str
    options: Options
    frontend: Frontend
    frontend_reason: str
    token_dim: int
    prefix: int
    patches: int
    suffix: int
    class_token: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    layers: tuple[LayerRecord, ...]
    stages: tuple[StageRecord, ...]
    passes: tuple[PassRecord, ...]
    before: tuple[str, ...]
    computation: tuple[str, ...]
    validated: str

    @property
    def plan(self) -> Plan:
        return self.options.plan

    def within(self, group: str) -> RewriteRecord:
        """The same record, with the inserted modules in a group of their own."""
        stages = (
            replace(stage, path=stage.path.replace(OWN_CHILD, f"{OWN_CHILD}.{group}", 1))
            for stage in self.stages
        )
        return replace(self, stages=tuple(stages))


def find_record(module: nn.Module) -> RewriteRecord | None:
    """The record of a rewritten module; ``None`` for any other."""
    record = module.meta.get(RECORD) if isinstance(module, fx.GraphModule) else None
    return record if isinstance(record, RewriteRecord) else None


def record_of(fast: nn.Module) -> RewriteRecord:
    """The record of a rewritten module.

    Raises:
        NotRewrittenError: ``fast`` does not come from :func:`skipvit_fx.rewrite`.
    """
    record = find_record(fast)
    if record is None:
        raise NotRewrittenError(
            f"this {type(fast).__name__} was not made by skipvit_fx.rewrite",
            hint="pass what rewrite(model, plan) returned; unwrap it first if it was compiled or made parallel",
        )
    return record


def graph_lines(graph: fx.Graph) -> tuple[str, ...]:
    """One line per node, without user counts, so that lines of two graphs can be compared."""
    return tuple(_line(node) for node in graph.nodes)


def numbered_lines(graph: fx.Graph) -> tuple[str, ...]:
    """One line per node, with nodes by number: the same for graphs that differ only in names."""
    numbers = {node: _Number(i) for i, node in enumerate(graph.nodes)}
    lines = []
    for node in graph.nodes:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), numbers.__getitem__)
        target = getattr(node.target, "__qualname__", str(node.target))
        lines.append(f"{numbers[node]} = {node.op} {target}{args} {kwargs}")
    return tuple(lines)


class _Number(int):
    def __repr__(self) -> str:
        return f"%{int(self)}"

    __str__ = __repr__


def _line(node: fx.Node) -> str:
    if node.op == "output":
        return f"return {node.args[0]}"
    target = printed_target(node)
    arguments = [repr(a) for a in node.args] + [f"{k}={v!r}" for k, v in node.kwargs.items()]
    return f"{node.name} = {node.op} {target}({', '.join(arguments)})"
