"""Check your own rewritten model against a reference that removes no token.

The reference (:mod:`skipvit_fx.reference`) interprets the model's captured graph, before any pass, with the dropped
tokens masked and frozen. It finds a wrong edit, but cannot find a wrong layer. :func:`skipvit_fx.rewrite` validates
with the same reference; here it runs on your own inputs, with the scores of the model. (The project's own tests use a
second reference, made of hooks on the original model, which shares nothing with the compiler.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from skipvit_fx.analysis.spans import lay_plan
from skipvit_fx.author.generators import generators_kept
from skipvit_fx.capture.example import example_of
from skipvit_fx.differences import TOLERANCE as TOLERANCE
from skipvit_fx.differences import badness
from skipvit_fx.differences import relative_error as relative_error
from skipvit_fx.graph.inputs import Inputs
from skipvit_fx.graph.record import RewriteRecord, record_of
from skipvit_fx.reference import Masked, steps_of
from skipvit_fx.reports.attention import find_layers
from skipvit_fx.reports.token_report import TokenTrace
from skipvit_fx.reports.tokens import (
    Selection,
    check_skips,
    selections_noted,
    traces_of,
)
from skipvit_fx.torch_internals import BATCH_NORM


@dataclass(frozen=True)
class Check:
    """A rewritten model compared with the reference.

    Attributes:
        error: largest difference, relative to the reference's largest value, between the outputs and between the
            residual streams after the return (a class token alone does not show whether patches are in order); NaN if
            the two have non-finite values at different places.
        selections: the choice at each stage; the reference dropped the same tokens.
        traces: the same in terms of patches.
    """

    error: float
    selections: tuple[Selection, ...]
    traces: tuple[TokenTrace, ...]

    @property
    def exact(self) -> bool:
        """Whether the error is within :data:`TOLERANCE`."""
        return self.error <= TOLERANCE


class Reference:
    """The mask-and-freeze reference of one model. The model is analysed once, for any number of rewrites.

    Args:
        model: the original model, in eval mode.
        example_inputs: as for :func:`skipvit_fx.rewrite`.
        prefix_tokens: as for :func:`skipvit_fx.rewrite`.

    Raises (from the constructor):
        SkipViTError: the compiler would refuse the model.
    """

    def __init__(
        self, model: nn.Module, example_inputs: Any = None, *, prefix_tokens: int | None = None
    ) -> None:
        if model.training:
            raise ValueError("the model must be in eval mode: there is no reference for dropout")
        self._forward = model.forward
        self._findings = find_layers(model, *example_of(model, example_inputs), prefix_tokens)
        self._steps = steps_of(self._findings.capture.module.graph)

    @property
    def depth(self) -> int:
        """The number of layers found."""
        return len(self._findings.stream.layers)

    @property
    def prefix_tokens(self) -> int:
        """The number of rows before the patches."""
        return self._findings.stream.tokens.prefix

    @property
    def patches(self) -> int:
        """The number of patches in the full sequence."""
        return self._findings.stream.tokens.patches

    def run(
        self, record: RewriteRecord, selections: Sequence[Selection], *args: Any, **kwargs: Any
    ) -> tuple[Any, dict[int, Tensor]]:
        """Run the model with the dropped tokens of ``selections`` masked and frozen, by the plan of a rewrite.

        Returns:
            The model's output, and by span of the plan the residual stream where its tokens return.
        """
        findings = self._findings
        spans = lay_plan(findings.analysis, findings.stream, record.options)
        module = findings.capture.module.eval()
        parts = dict(module.named_modules(remove_duplicate=False))
        masked = Masked(self._steps, module, parts, spans, selections)
        with torch.no_grad():
            output = masked(Inputs(self._forward, args, kwargs).taken())
        return output, masked.returned

    def check(self, fast: nn.Module, *args: Any, **kwargs: Any) -> Check:
        """Compare the graph of ``fast`` with the reference on these inputs.

        Raises:
            ValueError: ``fast`` is in train mode.
            SkipViTError: skipping is switched off.
        """
        if fast.training:
            raise ValueError("the rewritten model must be in eval mode: dropout would differ")
        rewritten = check_skips(fast)
        devices = {t.device: None for t in fast.parameters()}
        rewritten.prepare(*args, **kwargs)
        # some models draw random numbers even in eval mode
        with generators_kept(devices), torch.no_grad(), selections_noted(rewritten) as noted:
            got = rewritten.graph_forward(*args, **kwargs)
        record = noted.record
        selections = tuple(s for s in noted.selections if s is not None)
        with generators_kept(devices):
            wanted, streams = self.run(record, selections, *args, **kwargs)
        error = relative_error(got, wanted)
        for span, returned in noted.returned.items():
            rows = returned.shape[
                record.token_dim
            ]  # those after the last that is read may be missing
            there = streams[span].narrow(record.token_dim, 0, rows)
            error = max(error, relative_error(returned, there), key=badness)
        return Check(error, selections, tuple(traces_of(noted)))


def check_rewrite(model: nn.Module, fast: nn.Module, *args: Any, **kwargs: Any) -> Check:
    """Compare a rewritten model with the mask-and-freeze reference on these inputs, both in eval mode.

    Raises:
        ValueError, SkipViTError: as :class:`Reference` and its ``check`` do.
    """
    example = kwargs if kwargs and not args else args
    reference = Reference(model, example, prefix_tokens=record_of(fast).options.prefix_tokens)
    return reference.check(fast, *args, **kwargs)


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Move all weights and running statistics far from their initial values, reproducibly by ``seed``.

    A fresh model hides mistakes: biases and position terms are zero, LayerScale is almost zero, norms are the identity.
    Returns the model, which is changed in place.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor, scale: float, shift: float = 0.0) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator, device="cpu") * scale + shift)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point():
                continue
            last = name.rsplit(".", 1)[-1].lower()
            if parameter.ndim >= 2 and last in ("weight", "in_proj_weight"):
                normal(parameter, parameter[0].numel() ** -0.5)
            elif parameter.ndim >= 2:  # tokens, position tables, queries
                normal(parameter, 0.7)
            elif parameter.ndim == 1 and ("weight" in last or "gamma" in last or "scale" in last):
                normal(parameter, 0.15, 0.8)
            else:
                normal(parameter, 0.3)
        for module in model.modules():
            if isinstance(module, BATCH_NORM) and module.running_var is not None:
                assert module.running_mean is not None
                normal(module.running_mean, 0.3)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model
