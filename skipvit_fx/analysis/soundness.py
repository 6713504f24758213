"""Refuse unsound plans: every node under a drop must keep its tokens apart."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from skipvit_fx.analysis.apart import why_not_apart
from skipvit_fx.analysis.masks import is_causal
from skipvit_fx.analysis.residual import is_softmax
from skipvit_fx.analysis.spans import Spans
from skipvit_fx.analysis.tokens import TokenAnalysis, carries_tokens
from skipvit_fx.errors import UnsupportedModelError
from skipvit_fx.graph.module_paths import module_path
from skipvit_fx.ops.mode import InTraining

_ANOTHER_PLAN = "choose a plan that returns before this place or drops after it"


def mixing_leaves(spans: Spans, opened: Iterable[str]) -> list[str]:
    """Check every node of every span. Sound::

        cut ── norm ── mlp ── + ── attention ── return        each row on its own, or attention

    Refused::

        cut ── reshape to a grid ── convolution ── return     neighbours are gone

    Args:
        spans: the plan on the captured graph.
        opened: paths of the modules that were traced through.

    Returns:
        Paths of leaf modules that are not sound as a whole and must be traced through to be judged.

    Raises:
        UnsupportedModelError: a node is not sound; it is named.
    """
    _refuse_taps(spans)
    _refuse_causal_scores(spans)
    opened = frozenset(opened)
    leaves = []
    for node in spans.nodes():
        reason = span_refusal(spans, node)
        if not reason or (spans.analysis[node].pools and spans.is_after_the_layers(node)):
            continue  # a head may pool the remaining tokens
        if _can_be_opened(spans.analysis, node, opened):
            leaves.append(str(node.target))
        elif not leaves:
            layer = spans.active(node)[0].layer.index
            raise UnsupportedModelError(
                f"{reason}, under the drop at layer {layer}",
                node=node.name,
                module_path=module_path(node),
                hint=f"{_ANOTHER_PLAN}, or change the model there",
            )
        else:
            break
    return leaves


def span_refusal(spans: Spans, node: fx.Node) -> str:
    """Why the node may not see fewer tokens; empty if it may."""
    analysis = spans.analysis
    if reason := why_not_apart(analysis, node) or _causal_operand(analysis, node):
        return reason
    if spans.weighs(node) and not is_softmax(analysis, node):
        return "attention inside a module or function, in which the sizes of merged tokens do not count"
    if analysis[node].positions and any(s.returns.span.fused for s in spans.active(node)):
        return "a fused token has no position, but here every token needs one"
    cuts = [stage.cut for stage in spans.stages]
    for argument in node.all_input_nodes:
        early = not spans.active(argument) and argument not in cuts
        if early and carries_tokens(analysis[argument]):
            return f"{argument.name}, which was computed before the drop, is read again"
    return ""


def _can_be_opened(analysis: TokenAnalysis, node: fx.Node, opened: frozenset[str]) -> bool:
    """Whether the node is an author's module that was not traced through yet."""
    if node.op != "call_module" or str(node.target) in opened:
        return False
    return not isinstance(analysis.module.get_submodule(str(node.target)), InTraining)


def _refuse_causal_scores(spans: Spans) -> None:
    """Refuse a scoring attention that is causal: it is outside the span, but depends on the order of tokens as well."""
    for stage in spans.stages:
        node = stage.layer.input
        while node is not stage.layer.cut:
            if reason := _causal_operand(spans.analysis, node):
                raise UnsupportedModelError(
                    f"{reason}, at layer {stage.layer.index}",
                    node=node.name,
                    module_path=module_path(node),
                    hint="causal models cannot be rewritten: their tokens are not a set",
                )
            node = node.next


def _causal_operand(analysis: TokenAnalysis, node: fx.Node) -> str:
    positions = analysis[node].positions
    for argument in node.all_input_nodes if positions else ():
        value = analysis[argument].value
        if sum(p.operand is value for p in positions) == 2 and is_causal(analysis, argument):
            return "causal attention depends on the order of all tokens"
    return ""


def _refuse_taps(spans: Spans) -> None:
    """Refuse taps that were not asked to be filled, and those that have no state to be filled with."""
    for node, (reader, *_) in spans.taps.items():
        if not spans.options.fill_taps:
            reason = f"is read there, off the path to its return, by {reader.name}"
            hint = (
                f"{_ANOTHER_PLAN}; or pass fill_taps=True, which returns the dropped tokens as they were when they "
                "left"
            )
            raise _tapped(spans, node, reason, hint)
        if not _is_state(spans, node):
            reason = "is read there, and is not the residual stream, so dropped tokens have no value in it"
            raise _tapped(spans, node, f"{reason}, by {reader.name}", _ANOTHER_PLAN)
    for reader in spans.analysis.module.graph.nodes if spans.options.fill_taps else ():
        if reader.op == "output" or spans.active(reader):
            continue
        for node in reader.all_input_nodes:
            shorter = spans.active(node) and carries_tokens(spans.analysis[node])
            tapped = reader in spans.taps.get(node, ())
            if shorter and not tapped and not spans.returning(node):
                reason = f"is read together with a filled tap, by {reader.name}"
                raise _tapped(spans, node, reason, "choose a plan that returns before this place")


def _tapped(spans: Spans, node: fx.Node, reason: str, hint: str) -> UnsupportedModelError:
    layer = next(s.layer.index for s in spans.stages if node in s.nodes or node is s.cut)
    return UnsupportedModelError(
        f"{node.name} is under the drop at layer {layer}, and {reason}",
        node=node.name,
        module_path=module_path(node),
        hint=hint,
    )


def _is_state(spans: Spans, node: fx.Node) -> bool:
    return any(node in (layer.input, layer.cut, layer.end) for layer in spans.stream.layers)
