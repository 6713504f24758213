"""What a rewrite did, kept with the rewritten module: names and numbers, no nodes and no data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from skipvit_fx.errors import NotRewrittenError
from skipvit_fx.ir.capture import Frontend
from skipvit_fx.ir.module import OWN_CHILD
from skipvit_fx.ir.places import module_path
from skipvit_fx.pipeline.rewriting import Rewriting
from skipvit_fx.pipeline.runner import PassRecord
from skipvit_fx.plan import Plan

RECORD = "skipvit"
"""Key of the record in ``fast.meta``."""


@dataclass(frozen=True)
class LayerRecord:
    """One layer, by names of the author's nodes in the graph; see :class:`skipvit_fx.analysis.layers.Layer`."""

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
        index, layer: of the stage and of the layer that it scores in, from 1.
        path: where its modules live in the rewritten model, e.g. ``skipvit.stage_1``.
        leave_after, leave_before: the author's modules that its tokens leave between.
        return_before: the one that they return in front of; ``None`` if they never do.
    """

    index: int
    layer: int
    path: str
    leave_after: str
    leave_before: str
    return_before: str | None


@dataclass(frozen=True)
class RewriteRecord:
    """Everything that is known of a rewrite.

    Attributes:
        model: class name of the model.
        plan, cut, score, prefix_tokens, fill_taps, eliminate_dead_tokens, multiple_of: as asked for; ``score`` by name.
        frontend, frontend_reason: how the model was captured, and why so.
        token_dim: which dimension of the residual stream carries the tokens.
        prefix, patches, tail: rows of the full sequence.
        class_token: which of them is the class token, and what tells.
        args, kwargs: the example inputs, as tensors on the meta device.
        layers, stages: what was found and inserted.
        passes: every edit, pass by pass.
        before: the captured graph before any pass, a line a node.
        validated: what was found when the rewritten graph ran beside the model, or why it did not.
    """

    model: str
    plan: Plan
    cut: str
    score: str
    prefix_tokens: int | None
    fill_taps: bool
    eliminate_dead_tokens: bool
    multiple_of: int
    frontend: Frontend
    frontend_reason: str
    token_dim: int
    prefix: int
    patches: int
    tail: int
    class_token: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    layers: tuple[LayerRecord, ...]
    stages: tuple[StageRecord, ...]
    passes: tuple[PassRecord, ...]
    before: tuple[str, ...]
    validated: str

    def within(self, group: str) -> RewriteRecord:
        """The same, where the inserted modules are in a group of their own."""
        stages = (
            replace(stage, path=stage.path.replace(OWN_CHILD, f"{OWN_CHILD}.{group}", 1))
            for stage in self.stages
        )
        return replace(self, stages=tuple(stages))


def record_of(fast: nn.Module) -> RewriteRecord:
    """The record of a rewritten module.

    Raises:
        NotRewrittenError: ``fast`` does not come from :func:`skipvit_fx.rewrite`.
    """
    record = fast.meta.get(RECORD) if isinstance(fast, fx.GraphModule) else None
    if not isinstance(record, RewriteRecord):
        raise NotRewrittenError(
            f"this {type(fast).__name__} was not made by skipvit_fx.rewrite",
            hint="pass what rewrite(model, plan) returned; unwrap it first where it was compiled or made parallel",
        )
    return record


def graph_lines(graph: fx.Graph) -> tuple[str, ...]:
    """One line a node, without user counts, so that lines of two graphs can be compared."""
    return tuple(_line(node) for node in graph.nodes)


def _line(node: fx.Node) -> str:
    if node.op == "output":
        return f"return {node.args[0]}"
    target = node._pretty_print_target(node.target)
    arguments = [repr(a) for a in node.args] + [f"{k}={v!r}" for k, v in node.kwargs.items()]
    return f"{node.name} = {node.op} {target}({', '.join(arguments)})"


def make_record(
    model: str,
    rewriting: Rewriting,
    passes: Sequence[PassRecord],
    before: tuple[str, ...],
    *,
    eliminate_dead_tokens: bool,
    validated: str,
) -> RewriteRecord:
    """The record of a finished rewrite."""
    stream, capture = rewriting.stream, rewriting.capture
    score = rewriting.score
    layers = tuple(
        LayerRecord(
            layer.index,
            layer.input.name,
            layer.cut.name,
            layer.end.name,
            layer.attention.name,
            module_path(layer.attention),
        )
        for layer in stream.layers
    )
    back = rewriting.return_before
    stages = tuple(
        StageRecord(
            stage.index,
            stage.layer.index,
            f"skipvit.{stage.name}",
            stage.leave_after,
            stage.leave_before,
            back,
        )
        for stage in rewriting.stages
    )
    return RewriteRecord(
        model=model,
        plan=rewriting.plan,
        cut=rewriting.cut,
        score=score if isinstance(score, str) else getattr(score, "__name__", "function"),
        prefix_tokens=rewriting.prefix_tokens,
        fill_taps=rewriting.fill_taps,
        eliminate_dead_tokens=eliminate_dead_tokens,
        multiple_of=rewriting.multiple_of,
        frontend=capture.frontend,
        frontend_reason=capture.frontend_reason,
        token_dim=stream.dim,
        prefix=stream.tokens.lead,
        patches=stream.tokens.patches,
        tail=stream.tokens.tail,
        class_token=str(stream.class_token),
        args=_on_meta(capture.args),
        kwargs=_on_meta(capture.kwargs),
        layers=layers,
        stages=stages,
        passes=tuple(passes),
        before=before,
        validated=validated,
    )


def _on_meta(example: Any) -> Any:
    return pytree.tree_map(
        lambda leaf: torch.empty_like(leaf, device="meta") if isinstance(leaf, Tensor) else leaf,
        example,
    )
