"""Score the patches in every stage's layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx, nn

from skipvit_fx.analysis.axes import Tokens, tokens_of
from skipvit_fx.analysis.layers import AttentionSite
from skipvit_fx.analysis.operands import heads_of
from skipvit_fx.analysis.spans import StageSpan
from skipvit_fx.errors import UnsupportedModelError
from skipvit_fx.graph.attention_ops import AttentionArguments
from skipvit_fx.graph.module_paths import module_path
from skipvit_fx.ops.score import ScoreAtRandom, ScoreByFunction, ScoreByQuery, ScoreByWeights
from skipvit_fx.rewriting.conditions import SCORED, SIZES_FOLLOW
from skipvit_fx.rewriting.context import Context
from skipvit_fx.rewriting.passes import Condition


@dataclass(frozen=True)
class InsertScore:
    """Compute one row of the layer's attention beside it; the attention itself is unchanged, fused or not.

    Before::

        scaled_dot_product_attention = scaled_dot_product_attention(getitem_1, getitem_2, getitem_3)
        squeeze = scaled_dot_product_attention.squeeze(1)

    After::

        scaled_dot_product_attention = scaled_dot_product_attention(getitem_1, getitem_2, getitem_3)
        stage_1_scores = skipvit.stage_1.score(getitem_1, getitem_2)
        squeeze = scaled_dot_product_attention.squeeze(1)
    """

    name: ClassVar[str] = "insert-score"
    requires: ClassVar[tuple[Condition, ...]] = (SIZES_FOLLOW,)
    ensures: ClassVar[tuple[Condition, ...]] = (SCORED,)

    def run(self, context: Context) -> None:
        """Insert one score node per site.

        Raises:
            UnsupportedModelError: ``score="cls"`` on a model without a class token, ``score="auto"`` where it cannot be
                told whether there is one, or an attention whose axes the score does not know.
        """
        scored = [s for s in context.spans.stages if not s.returns.span.merged]
        asking = _asking_row(context, scored)
        for stage in scored:
            scores = context.scores[stage.index] = {}
            if callable(context.options.score) or context.options.score == "random":
                scores[None] = _score_stream(context, stage)
                continue
            if stage.layer.index == 0:
                raise UnsupportedModelError(
                    f"score={context.options.score!r} needs an attention, and none has run in front of layer 1",
                    node=stage.cut.name,
                    module_path=module_path(stage.cut),
                    hint="pass score='random' or a score function, or drop at layer 1 or later",
                )
            if stage.layer.unclear:
                raise UnsupportedModelError(
                    f"the attention of layer {stage.layer.index} cannot score: {stage.layer.unclear}",
                    node=stage.layer.cut.name,
                    module_path=module_path(stage.layer.cut),
                    hint="drop at another layer, or use score='random' or a score function",
                )
            for i, site in enumerate(stage.layer.sites):
                path = f"{stage.name}.score" if i == 0 else f"{stage.name}.score_{i + 1}"
                op, args = _score_of(context, site, asking)
                scores[site] = context.editor.insert_module(
                    path, op, args, after=site.node, name=f"{stage.name}_scores"
                )


def _asking_row(context: Context, scored: list[StageSpan]) -> int | None:
    """The row of the sequence whose attention scores; ``None`` for the mean of all."""
    token = context.stream.class_token
    if context.options.score == "auto" and token.ambiguous and scored:
        raise UnsupportedModelError(
            token.ambiguous,
            hint="pass score='cls' if the first row is the class token, score='mean' if there is none, or "
            "prefix_tokens=N if the prefix has fewer rows",
        )
    if context.options.score == "cls" and token.row is None and not token.ambiguous:
        raise UnsupportedModelError(
            f"score='cls' needs a class token, and the sequence has none ({token.reason})",
            hint="score='auto' or score='mean' lets the mean query score the patches",
        )
    if context.options.score == "cls" and token.ambiguous:
        return 0
    return token.row if context.options.score in ("auto", "cls") else None


def _score_stream(context: Context, stage: StageSpan) -> fx.Node:
    stream = context.stream
    prefix, suffix = stream.tokens.prefix, stream.tokens.suffix
    op: nn.Module
    if callable(context.options.score):
        op = ScoreByFunction(context.options.score, stream.dim, prefix, suffix)
    else:
        op = ScoreAtRandom(stream.dim, prefix, suffix)
    return context.editor.insert_module(
        f"{stage.name}.score", op, (stage.cut,), after=stage.cut, name=f"{stage.name}_scores"
    )


def _score_of(
    context: Context, site: AttentionSite, asking: int | None
) -> tuple[nn.Module, tuple[Any, ...]]:
    if site.fused:
        given = AttentionArguments.of(site.node)
        query, key, mask = given.query, given.key, given.attn_mask
        axes = context.analysis.axes(query)
        keys = context.analysis.axes(key)
        assert axes is not None
        assert keys is not None
        row = None if asking is None else _query_row(context, site, axes[-2], asking)
        heads = heads_of(site, axes[:-2])
        prefix, suffix = site.keys.prefix, site.keys.suffix
        args = (query, key) if mask is None else (query, key, mask)
        return ScoreByQuery(row, prefix, suffix, heads, given.scale), args
    weights = context.analysis.axes(site.node)
    assert weights is not None
    dims = [d for d, dim in enumerate(weights) if tokens_of(dim)]
    key_dim = next(d for d in dims if weights[d] == (site.keys._replace(weights=True),))
    query_dim = next(d for d in dims if d != key_dim)
    heads = heads_of(site, tuple(dim for d, dim in enumerate(weights) if d not in dims))
    row = None if asking is None else _query_row(context, site, weights[query_dim], asking)
    source = site.node.all_input_nodes[0] if asking is None else site.node
    rank = len(weights)
    op = ScoreByWeights(
        row, query_dim - rank, key_dim - rank, site.keys.prefix, site.keys.suffix, heads
    )
    return op, (source,)


def _query_row(context: Context, site: AttentionSite, dim: Any, asking: int) -> int:
    """The index of the class token among the queries, counted from the end if it is after the patches."""
    tokens, full = tokens_of(dim), context.stream.tokens
    assert isinstance(tokens, Tokens)
    row, first, last = asking + tokens.prefix - full.prefix, 0, tokens.prefix
    if asking >= full.prefix:
        row, first, last = asking - full.prefix - full.patches - tokens.suffix, -tokens.suffix, 0
    if not first <= row < last:
        raise UnsupportedModelError(
            "the class token is not among the queries of this attention",
            node=site.node.name,
            module_path=site.module_path,
            hint="use score='mean'",
        )
    return row
