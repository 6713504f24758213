"""What the compiler finds in a model without a plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from skipvit_fx.analysis.layers import Stream, find_stream
from skipvit_fx.analysis.tokens import TokenAnalysis
from skipvit_fx.arguments import check_model, check_prefix_tokens
from skipvit_fx.capture.capture import Capture
from skipvit_fx.capture.example import example_of
from skipvit_fx.capture.fakes import TracelessFakeMode
from skipvit_fx.capture.opening import OpenModules, with_capture
from skipvit_fx.capture.watch import watch_calls
from skipvit_fx.errors import SkipViTError
from skipvit_fx.reports.attention_report import AttentionReport, Progress, between_layers


@dataclass(frozen=True)
class Findings:
    """A captured model, and what every rewrite of it starts from."""

    capture: Capture
    analysis: TokenAnalysis
    stream: Stream


def find_attention(
    model: nn.Module, *, example_inputs: Any = None, prefix_tokens: int | None = None
) -> AttentionReport:
    """Analyse ``model`` as :func:`skipvit_fx.rewrite` would, without a plan and without changing anything.

    Args:
        model: any module.
        example_inputs: as for ``rewrite``; by default made from the model's configuration.
        prefix_tokens: as for ``rewrite``.

    Returns:
        What was found. A model that the compiler refuses also gets a report: its ``refusal`` is the error.

    Raises:
        PlanError: ``prefix_tokens`` is not a number of tokens.
        TraceError: there are no example inputs, or the model does not run on them.
        TypeError: ``model`` is not a module.
    """
    check_model(model)
    check_prefix_tokens(prefix_tokens)
    args, kwargs = example_of(model, example_inputs)
    mode = TracelessFakeMode(model)
    with mode.surroundings.kept():
        calls = watch_calls(model, mode, args, kwargs)
    return AttentionReport(model, calls, _find(model, args, kwargs, prefix_tokens))


def find_layers(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    prefix_tokens: int | None = None,
) -> Findings:
    """Capture ``model`` and find its layers.

    Raises:
        SkipViTError: it is refused.
    """
    found = _find(model, args, kwargs, prefix_tokens)
    if found.refusal is not None:
        raise found.refusal
    assert found.capture is not None
    assert found.analysis is not None
    assert found.stream is not None
    return Findings(found.capture, found.analysis, found.stream)


def _find(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], prefix_tokens: int | None
) -> Progress:
    best = Progress()

    def work(capture: Capture) -> Progress:
        nonlocal best
        best = Progress(capture)
        analysis = TokenAnalysis(capture)
        best = Progress(capture, analysis)
        best = Progress(capture, analysis, find_stream(analysis, prefix_tokens))
        if leaves := _mixing_leaves(best):
            raise OpenModules(leaves)
        return best

    try:
        return with_capture(model, args, kwargs, work)
    except OpenModules:
        return best
    except SkipViTError as error:
        if best.stream is not None:  # a leaf could not be opened: earlier findings still hold
            return best
        return Progress(best.capture, best.analysis, None, error)


def _mixing_leaves(found: Progress) -> list[str]:
    """Leaves between the layers that mix tokens; they are opened to find out what does so inside."""
    assert found.capture
    assert found.analysis
    assert found.stream
    leaves = []
    for node in between_layers(found.stream, found.capture.module.graph):
        facts = found.analysis[node]
        if node.op == "call_module" and (facts.mixing or facts.positions):
            leaves.append(str(node.target))
    return [path for path in leaves if path not in found.capture.opened]
