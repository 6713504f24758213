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
from skipvit_fx.ops.operands import OperandLayout
from skipvit_fx.ops.score import (
    Asking,
    ScoreAtRandom,
    ScoreByFunction,
    ScoreByQuery,
    ScoreByWeights,
)
from skipvit_fx.rewriting.conditions import SCORED, SIZES_FOLLOW
from skipvit_fx.rewriting.context import Context
from skipvit_fx.rewriting.operands import layouts_of
from skipvit_fx.rewriting.passes import Condition
from skipvit_fx.scores import OF_ATTENTION


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
        """Insert one score node per site, or one that reads the stream.

        Raises:
            UnsupportedModelError: ``score="cls"`` on a model without a class token, a score for which it cannot be told
                whether there is one, or an attention whose axes the score does not know.
        """
        scored = [s for s in context.spans.stages if not s.returns.span.merged]
        asking = _asking(context) if scored else "mean"
        by_attention = context.options.score in OF_ATTENTION
        for stage in scored:
            if context.options.score_asks:
                _refuse_without_attention(context, stage)
            context.scores[stage.index] = (
                _attention(context, stage, asking, "score")
                if by_attention
                else {None: _score_stream(context, stage, asking)}
            )


def _asking(context: Context) -> Asking:
    """Who pays the attention that scores; a row is one of the sequence."""
    score, token = context.options.score, context.stream.class_token
    if score == "received":
        return "all"
    if score == "mean" or "attention" not in context.options.score_asks:
        return "mean"
    if score != "cls" and token.ambiguous:
        alone = "pass score='cls' if the first row is the class token, score='mean' if there is none, or "
        raise UnsupportedModelError(
            token.ambiguous,
            hint=f"{alone if score == 'auto' else 'pass '}prefix_tokens=N if the prefix has fewer rows",
        )
    if score == "cls" and token.row is None and not token.ambiguous:
        raise UnsupportedModelError(
            f"score='cls' needs a class token, and the sequence has none ({token.reason})",
            hint="score='auto' or score='mean' lets the mean query score the patches",
        )
    if score == "cls" and token.ambiguous:
        return 0
    return "mean" if token.row is None else token.row


def _refuse_without_attention(context: Context, stage: StageSpan) -> None:
    """Refuse a score that reads an attention where there is none to read."""
    score = context.options.score
    if stage.layer.index == 0:
        what = f"score={score!r}" if isinstance(score, str) else "the score function"
        raise UnsupportedModelError(
            f"{what} needs an attention, and none has run in front of layer 1",
            node=stage.cut.name,
            module_path=module_path(stage.cut),
            hint="pass score='random' or a function of the tokens alone, or drop at layer 1 or later",
        )
    if stage.layer.unclear:
        raise UnsupportedModelError(
            f"the attention of layer {stage.layer.index} cannot score: {stage.layer.unclear}",
            node=stage.layer.cut.name,
            module_path=module_path(stage.layer.cut),
            hint="drop at another layer, or use score='random' or a function of the tokens alone",
        )


def _attention(
    context: Context, stage: StageSpan, asking: Asking, what: str, *, each_head: bool = False
) -> dict[AttentionSite | None, fx.Node]:
    """Insert what is paid to every patch beside each attention of a stage's layer."""
    nodes: dict[AttentionSite | None, fx.Node] = {}
    for i, site in enumerate(stage.layer.sites):
        path = f"{stage.name}.{what}" if i == 0 else f"{stage.name}.{what}_{i + 1}"
        op, args = _score_of(context, site, asking, each_head)
        name = f"{stage.name}_{what}" + ("" if each_head else "s")
        nodes[site] = context.editor.insert_module(path, op, args, after=site.node, name=name)
        context.beside.setdefault(site.node, []).append(nodes[site])
    return nodes


def _score_stream(context: Context, stage: StageSpan, asking: Asking) -> fx.Node:
    """Insert a score of the patch tokens after a stage's cut."""
    function = context.options.score_function
    op: nn.Module = ScoreAtRandom(*context.place)
    nodes: list[fx.Node] = []
    if function is not None:
        operands: list[tuple[str, OperandLayout | None]] = []
        for name in context.options.score_asks:
            if name == "attention":
                read = [*_attention(context, stage, asking, name, each_head=True).values()]
                operands += [(name, None)] * len(read)
            else:
                found = [of_site.named(name) for of_site in stage.operands]
                read = [operand.node for operand in found]
                operands += [(name, layout) for layout in layouts_of(context, stage, name, found)]
            nodes += read
        op = ScoreByFunction(function, *context.place, tuple(operands))
    return context.editor.insert_module(
        f"{stage.name}.score", op, (stage.cut, *nodes), after=stage.cut, name=f"{stage.name}_scores"
    )


def _score_of(
    context: Context, site: AttentionSite, asking: Asking, each_head: bool
) -> tuple[nn.Module, tuple[Any, ...]]:
    prefix, suffix = site.keys.prefix, site.keys.suffix
    if site.fused:
        given = AttentionArguments.of(site.node)
        query, key, mask = given.query, given.key, given.attn_mask
        axes = context.analysis.axes(query)
        assert axes is not None
        row = _query_row(context, site, axes[-2], asking) if isinstance(asking, int) else asking
        heads = heads_of(site, axes[:-2])
        args = (query, key) if mask is None else (query, key, mask)
        return ScoreByQuery(row, prefix, suffix, heads, given.scale, each_head), args
    weights = context.analysis.axes(site.node)
    assert weights is not None
    dims = [d for d, dim in enumerate(weights) if tokens_of(dim)]
    key_dim = next(d for d in dims if weights[d] == (site.keys._replace(weights=True),))
    query_dim = next(d for d in dims if d != key_dim)
    heads = heads_of(site, tuple(dim for d, dim in enumerate(weights) if d not in dims))
    asked = weights[query_dim]
    row = _query_row(context, site, asked, asking) if isinstance(asking, int) else asking
    source = site.node.all_input_nodes[0] if asking == "mean" else site.node
    rank = len(weights)
    op = ScoreByWeights(row, query_dim - rank, key_dim - rank, prefix, suffix, heads, each_head)
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
