"""What a rewrite did, kept with the rewritten module: names and numbers, without nodes or data."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import fx, nn

from skipvit_fx.errors import NotRewrittenError
from skipvit_fx.graph.editor import Event
from skipvit_fx.graph.module_paths import module_path
from skipvit_fx.graph.source import Source, source_of
from skipvit_fx.names import INSERTED, INSERTED_BY, OWN_CHILD, RECORD
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


class NodeRecord(NamedTuple):
    """A node at one moment of the rewrite.

    Attributes:
        name, op, target: as in ``torch.fx``; the target as a string.
        reads: names of the nodes that it reads.
        after: the node before it in the graph; empty for the first.
        module_path: the author's module in whose forward it was made, or that it calls; empty for inserted nodes.
        source: the line of the author's code that made it; ``None`` for inserted nodes.
        inserted_by: name of the pass that inserted it; ``None`` for the nodes of the captured graph.
    """

    name: str
    op: str
    target: str
    reads: tuple[str, ...]
    after: str
    module_path: str
    source: Source | None
    inserted_by: str | None


@dataclass(frozen=True)
class PassRecord:
    """What one pass did.

    Attributes:
        name: of the pass.
        events: its edits, in order; empty if it changed nothing.
        nodes: those that it inserted or rewired and that are still there, as it left them, in graph order.
    """

    name: str
    events: tuple[Event, ...]
    nodes: tuple[NodeRecord, ...]


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
        nodes: the captured graph before any pass; :meth:`graphs` has it after each of them.
        token_dims: by captured node, the dimensions of its value along which tokens lie; only where there are any.
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
    nodes: tuple[NodeRecord, ...]
    token_dims: dict[str, tuple[int, ...]]
    before: tuple[str, ...]
    computation: tuple[str, ...]
    validated: str

    @property
    def plan(self) -> Plan:
        return self.options.plan

    def graphs(self) -> Iterator[tuple[NodeRecord, ...]]:
        """The graph before the first pass and after each of them."""
        nodes = {node.name: node for node in self.nodes}
        yield tuple(nodes.values())
        for step in self.passes:
            erased = {event.node for event in step.events if event.kind == "erase"}
            order = [name for name in nodes if name not in erased]
            for node in step.nodes:
                if node.name not in nodes:
                    order.insert(order.index(node.after) + 1 if node.after else 0, node.name)
                nodes[node.name] = node
            nodes = {name: nodes[name] for name in order}
            yield tuple(nodes.values())

    def within(self, group: str) -> RewriteRecord:
        """The same record, with the inserted modules in a group of their own."""

        def moved(path: str) -> str:
            return path.replace(OWN_CHILD, f"{OWN_CHILD}.{group}", 1)

        def all_moved(nodes: tuple[NodeRecord, ...]) -> tuple[NodeRecord, ...]:
            ours = (node.op == "call_module" and node.target.startswith(INSERTED) for node in nodes)
            return tuple(
                node._replace(target=moved(node.target)) if is_ours else node
                for node, is_ours in zip(nodes, ours, strict=True)
            )

        return replace(
            self,
            stages=tuple(replace(stage, path=moved(stage.path)) for stage in self.stages),
            passes=tuple(replace(step, nodes=all_moved(step.nodes)) for step in self.passes),
            nodes=all_moved(self.nodes),
        )


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


def authors_module(node: fx.Node) -> str:
    """Path of the author's module in whose forward the node was made, or that it calls; empty for what was inserted."""
    ours = INSERTED_BY in node.meta or str(node.target).startswith(INSERTED)
    return "" if ours else module_path(node)


def node_records(graph: fx.Graph, names: Collection[str] | None = None) -> Iterator[NodeRecord]:
    """The nodes of a graph in order; all of them, or those with these names."""
    after = ""
    for node in graph.nodes:
        before, after = after, node.name
        if names is not None and node.name not in names:
            continue
        inserted_by = node.meta.get(INSERTED_BY)
        yield NodeRecord(
            node.name,
            node.op,
            printed_target(node),
            tuple(read.name for read in node.all_input_nodes),
            before,
            authors_module(node),
            source_of(node),
            inserted_by,
        )


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
