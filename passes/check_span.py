"""Refuse what would be wrong: every node under a drop must keep its tokens apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from skipvit_fx.analysis.apart import why_not_apart
from skipvit_fx.analysis.masks import is_causal
from skipvit_fx.analysis.tokens import carries_tokens
from skipvit_fx.errors import UnsupportedModelError
from skipvit_fx.ir.opening import OpenModules
from skipvit_fx.ir.places import module_path
from skipvit_fx.ops.mode import InTraining
from skipvit_fx.passes.fill_taps import refuse_taps
from skipvit_fx.pipeline.rewriting import Rewriting


@dataclass(frozen=True)
class CheckSpan:
    """Changes nothing; raises where a node between a drop and its return mixes or reorders tokens.

    Sound::

        cut ── norm ── mlp ── + ── attention ── return        each row on its own, or attention

    Refused::

        cut ── reshape to a grid ── convolution ── return     neighbours are gone
    """

    name: ClassVar[str] = "check-span"
    requires: ClassVar[frozenset[str]] = frozenset({"stream", "spans"})
    provides: ClassVar[frozenset[str]] = frozenset({"sound-spans"})
    invalidates: ClassVar[frozenset[str]] = frozenset()

    def run(self, rewriting: Rewriting) -> None:
        """Check every node of every span.

        Raises:
            UnsupportedModelError: a node is not sound; it is named.
            OpenModules: leaf modules are not sound as a whole, and must be looked into.
        """
        refuse_taps(rewriting)
        _refuse_causal_scores(rewriting)
        end = rewriting.stream.layers[-1].end
        leaves = []
        for node in rewriting.span_nodes():
            reason = why_unsound(rewriting, node)
            if not reason:
                continue
            facts = rewriting.analysis[node]
            if facts.pools and rewriting.return_node is None and end < node:
                continue  # a head that pools what is left
            if _can_be_opened(rewriting, node):
                leaves.append(str(node.target))
                continue
            if leaves:
                break
            layer = rewriting.active(node)[0].layer.index
            raise UnsupportedModelError(
                f"{reason}, under the drop at layer {layer}",
                node=node.name,
                module_path=module_path(node),
                hint="choose a plan that returns before this place or drops after it, or change the model there",
            )
        if leaves:
            raise OpenModules(leaves)


def _can_be_opened(rewriting: Rewriting, node: fx.Node) -> bool:
    """Whether the node is a module of the author's that tracing did not go through yet."""
    if node.op != "call_module" or str(node.target) in rewriting.capture.opened:
        return False
    module = rewriting.capture.module.get_submodule(str(node.target))
    return not isinstance(module, InTraining)


def _refuse_causal_scores(rewriting: Rewriting) -> None:
    """The attention that scores is outside the span, but no less bound to the order of tokens if it is causal."""
    for stage in rewriting.stages:
        node = stage.layer.input
        while node is not stage.layer.cut:
            if node in rewriting.analysis.facts and (reason := _causal_operand(rewriting, node)):
                raise UnsupportedModelError(
                    f"{reason}, at layer {stage.layer.index}",
                    node=node.name,
                    module_path=module_path(node),
                    hint="causal models cannot be rewritten: their tokens are not a set",
                )
            node = node.next


def why_unsound(rewriting: Rewriting, node: fx.Node) -> str:
    """Why the node may not see fewer tokens; empty if it may."""
    analysis = rewriting.analysis
    if reason := why_not_apart(analysis, node):
        return reason
    if hidden := _causal_operand(rewriting, node):
        return hidden
    tokens_come_in = [a for a in node.all_input_nodes if carries_tokens(analysis[a])]
    if analysis[node].positions and rewriting.plan.fused:
        return "a fused token has no position, but here every token needs one"
    for argument in tokens_come_in:
        if not rewriting.active(argument) and argument not in (s.cut for s in rewriting.stages):
            return f"{argument.name}, which was computed before the drop, is read again"
    return ""


def _causal_operand(rewriting: Rewriting, node: fx.Node) -> str:
    positions = rewriting.analysis[node].positions
    for argument in node.all_input_nodes:
        value = rewriting.analysis[argument].value
        if sum(p.operand is value for p in positions) == 2 and is_causal(
            rewriting.analysis, argument
        ):
            return "causal attention depends on the order of all tokens"
    return ""
