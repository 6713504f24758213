"""Does a node keep tokens apart? What is left of the question when no plan is known yet."""

from __future__ import annotations

from torch import fx

from skipvit_fx.analysis.tokens import TokenAnalysis, carries_tokens


def why_not_apart(analysis: TokenAnalysis, node: fx.Node) -> str:
    """Why ``node`` may not see fewer tokens than the author gave it; empty if each row goes its own way."""
    facts = analysis[node]
    if facts.mixing:
        return facts.mixing
    if node.op != "call_module" or not takes_tokens(analysis, node):
        return ""
    if facts.positions:
        return "a module holds values of fixed token length"
    if reason := analysis.in_other_mode(node):
        return f"a module behaves otherwise in train than in eval mode: {reason}"
    return analysis.counts_tokens(node)


def takes_tokens(analysis: TokenAnalysis, node: fx.Node) -> bool:
    """Whether any input of the node has a token axis."""
    return any(carries_tokens(analysis[argument]) for argument in node.all_input_nodes)
