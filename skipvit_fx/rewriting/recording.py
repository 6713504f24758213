"""The record of a finished rewrite."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from skipvit_fx.analysis.axes import tokens_of
from skipvit_fx.graph.module_paths import module_path
from skipvit_fx.graph.record import LayerRecord, NodeRecord, PassRecord, RewriteRecord, StageRecord
from skipvit_fx.names import OWN_CHILD
from skipvit_fx.rewriting.context import Context
from skipvit_fx.torch_internals import pytree


def record_rewrite(
    context: Context,
    nodes: tuple[NodeRecord, ...],
    edits: tuple[PassRecord, ...],
    before: tuple[str, ...],
    computation: tuple[str, ...],
    validated: str,
) -> RewriteRecord:
    """What was found in a model and done to it, by names and numbers; see :class:`RewriteRecord`."""
    stream, capture = context.stream, context.capture
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
    return RewriteRecord(
        model=capture.module.own.author.__name__,
        options=context.options,
        frontend=capture.frontend,
        frontend_reason=capture.frontend_reason,
        token_dim=stream.dim,
        prefix=stream.tokens.prefix,
        patches=stream.tokens.patches,
        suffix=stream.tokens.suffix,
        class_token=str(stream.class_token),
        args=_on_meta(capture.args),
        kwargs=_on_meta(capture.kwargs),
        layers=layers,
        stages=tuple(_stages(context)),
        passes=edits,
        nodes=nodes,
        token_dims=dict(_token_dims(context)),
        before=before,
        computation=computation,
        validated=validated,
    )


def _stages(context: Context) -> Iterator[StageRecord]:
    for stage in context.spans.stages:
        yield StageRecord(
            stage.index,
            stage.layer.index,
            context.spans.returns.index(stage.returns),
            f"{OWN_CHILD}.{stage.name}",
            stage.leave_after,
            stage.leave_before,
            stage.returns.before,
        )


def _token_dims(context: Context) -> Iterator[tuple[str, tuple[int, ...]]]:
    for node, facts in context.analysis.facts.items():
        if dims := tuple(d for d, dim in enumerate(facts.axes or ()) if tokens_of(dim)):
            yield node.name, dims


def _on_meta(example: Any) -> Any:
    return pytree.tree_map(
        lambda leaf: torch.empty_like(leaf, device="meta") if isinstance(leaf, Tensor) else leaf,
        example,
    )
