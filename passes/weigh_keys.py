"""A token of several patches counts as several keys."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from skipvit_fx.analysis.axes import Axes, Batch, size, tokens_of
from skipvit_fx.errors import UnsupportedModelError
from skipvit_fx.graph.attention_ops import SDPA, AttentionArguments
from skipvit_fx.graph.module_paths import module_path
from skipvit_fx.ops.merge import LogSizes, weighed
from skipvit_fx.rewriting.conditions import KEYS_WEIGHED, MERGING, POSITIONS_GATHERED
from skipvit_fx.rewriting.context import Context
from skipvit_fx.rewriting.passes import Condition


@dataclass(frozen=True)
class WeighKeys:
    """In every attention over merged tokens, the logarithm of a token's size is added to its logit.

    Before::

        getitem_4 = blocks_1_q[:, None]                         # under a merge
        scaled_dot_product_attention_1 = scaled_dot_product_attention(getitem_4, getitem_5, getitem_6)

    After::

        getitem_4 = blocks_1_q[:, None]
        stage_1_log_sizes = skipvit.stage_1.log_sizes_1(stage_1_sizes, getitem_4)
        scaled_dot_product_attention_1 = scaled_dot_product_attention(getitem_4, getitem_5, getitem_6, stage_1_log_sizes)

    With a mask the two are added, as are the logits of an attention that is spelled out. What has the same layout in
    many layers is computed once per stage.
    """  # noqa: E501 - a line of the graph as it is

    name: ClassVar[str] = "weigh-keys"
    requires: ClassVar[tuple[Condition, ...]] = (MERGING, POSITIONS_GATHERED)
    ensures: ClassVar[tuple[Condition, ...]] = (KEYS_WEIGHED,)

    def run(self, context: Context) -> None:
        """Let every attention under a merge know the sizes of its keys.

        Raises:
            UnsupportedModelError: a batch is not the first factor of an axis of the attention.
        """
        made: dict[Any, fx.Node] = {}
        for node in list(context.spans.nodes()):
            if context.spans.weighs(node):
                if node.target in SDPA:
                    _weigh_fused(context, node, made)
                else:
                    _weigh_softmax(context, node, made)


def _weigh_fused(context: Context, node: fx.Node, made: dict[Any, fx.Node]) -> None:
    given = AttentionArguments(*node.args, **node.kwargs)
    mask = _log_sizes(context, node, given.query, made)
    if given.attn_mask is not None:
        mask = context.editor.insert_call(
            weighed, (given.attn_mask, mask), before=node, name=f"{node.name}_mask"
        )
    args = node.args
    kwargs = {name: value for name, value in node.kwargs.items() if name != "attn_mask"}
    if len(args) >= 3:
        context.editor.set_args(node, (*args[:3], mask, *args[4:]), kwargs)
    else:
        context.editor.set_args(node, args, {**kwargs, "attn_mask": mask})


def _weigh_softmax(context: Context, node: fx.Node, made: dict[Any, fx.Node]) -> None:
    logits = node.all_input_nodes[0]
    added = _log_sizes(context, node, logits, made)
    sums = context.editor.insert_call(
        weighed, (logits, added), before=node, name=f"{node.name}_logits"
    )
    context.editor.rewire(node, logits, sums)


def _log_sizes(context: Context, node: fx.Node, like: fx.Node, made: dict[Any, fx.Node]) -> fx.Node:
    """What is added to the logits of an attention: one node for all that are alike."""
    stage = context.spans.active(node)[-1]
    sizes, keys = context.skips[stage.index].sizes, context.analysis[node].softmax_over
    axes, key_dim = _logits(context, node)
    assert sizes is not None
    assert keys is not None
    batch_dim = next(d for d, dim in enumerate(axes) if any(isinstance(f, Batch) for f in dim))
    samples, *heads = axes[batch_dim]
    if not isinstance(samples, Batch):
        raise UnsupportedModelError(
            "the samples are not the first factor of the batch axis of this attention",
            node=node.name,
            module_path=module_path(node),
            hint="pass proportional_attention=False, with which sizes do not count",
        )
    op = LogSizes(
        (len(axes), batch_dim, key_dim), math.prod(map(size, heads)), keys.prefix, keys.suffix
    )
    key = stage.index, str(op), keys, context.analysis[like].value.dtype
    if key not in made:
        made[key] = context.editor.insert_module(
            f"{stage.name}.log_sizes_{len(made) + 1}",
            op,
            (sizes, like),
            after=sizes,
            name=f"{stage.name}_log_sizes",
        )
    return made[key]


def _logits(context: Context, node: fx.Node) -> tuple[Axes, int]:
    """The axes of an attention's logits, and which of them is that of the keys; that of the queries may be another."""
    fused = node.target in SDPA
    axes = context.analysis.axes(
        AttentionArguments(*node.args, **node.kwargs).key if fused else node
    )
    assert axes is not None
    if fused:
        return (*axes[:-2], (), axes[-2]), len(axes) - 1
    return axes, next(d for d, dim in enumerate(axes) if (t := tokens_of(dim)) and t.weights)
