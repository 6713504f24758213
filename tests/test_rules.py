"""Every rule of the token analysis against the operator itself: what is said to keep tokens and samples apart must do so.

The operator runs on all rows, and on what is left when patches or samples have gone. Where a rule lets it pass, both must
agree, along the axes that the rule returned. What a rule refuses needlessly is no failure: ``python tests/rule_cases.py``
counts it.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from rule_cases import (
    EVERYTHING,
    KINDS,
    PATCHES,
    SELECTIONS,
    USUAL_KIND,
    Case,
    Selection,
    cases_of,
    numbers,
    overloads,
    pointwise_packets,
    ruled_packets,
)
from skipvit_fx.analysis.axes import (
    Axes,
    Batch,
    Tokens,
    axes_of,
    has_tokens,
    mark_data,
    merge_ints,
    set_axes,
    size,
    tensors_in,
)
from skipvit_fx.analysis.rules.call import RULES
from skipvit_fx.analysis.tokens import AxisMode, NodeFacts
from skipvit_fx.ops.positions import GatherPositions

INVALID = (RuntimeError, IndexError, ValueError, TypeError)
"""What an operator raises on arguments that it does not take."""
NOT_FILLED = (torch.ops.aten.empty_like, torch.ops.aten.new_empty)
"""Operators whose result holds whatever was in memory."""
WAYS = {"whole": torch.inference_mode, "taken apart": torch.no_grad}
"""In inference mode PyTorch hands composite operators to the analysis as they are, otherwise what they are made of."""


class Disagrees(Exception):  # noqa: N818 - a finding, as in the analysis
    """The operator does not do what the rule says."""


# -- rows ---------------------------------------------------------------------------------------------------------


@functools.cache
def _rows(tokens: Tokens, left: Selection) -> Tensor:
    """Rows of a token axis that each sample keeps: prefix, its patches, tail."""
    first, last = tokens.lead, tokens.lead + tokens.patches
    return torch.tensor(
        [
            [*range(first), *(first + i for i in patches), *range(last, size(tokens))]
            for patches in left.patches
        ]
    )


def _by_factor(tensor: Tensor, axes: Axes) -> tuple[Tensor, int | None, dict[int, Tokens]]:
    """A view with one dimension a factor; which one the samples are, and which ones tokens."""
    factors = [factor for dim in axes for factor in dim]
    batches = [i for i, factor in enumerate(factors) if isinstance(factor, Batch)]
    if len(batches) > 1:
        raise Disagrees("samples meet samples")
    view = tensor.reshape([size(factor) for factor in factors])
    along = {i: factor for i, factor in enumerate(factors) if isinstance(factor, Tokens)}
    return view, batches[0] if batches else None, along


@functools.cache
def _gone(tokens: Tokens, left: Selection) -> Tensor:
    """Which rows of each sample leave: booleans ``[samples, rows]``, of all samples."""
    gone = torch.zeros(len(EVERYTHING.samples), size(tokens), dtype=torch.bool)
    for sample, rows in zip(left.samples, _rows(tokens, left), strict=True):
        gone[sample] = True
        gone[sample, rows] = False
    return gone


def _broadcast(rows: Tensor, view: Tensor, batch: int | None, i: int) -> Tensor:
    """``[samples, k]`` in the view's dimensions of the samples and of factor ``i``; without samples the first row."""
    shape = [1] * view.ndim
    shape[i] = rows.shape[1]
    if batch is None:
        return rows[0].reshape(shape)
    shape[batch] = rows.shape[0]
    return (rows if batch < i else rows.mT).reshape(shape)


def take(tensor: Tensor, axes: Axes, left: Selection) -> Tensor:
    """What is left of a tensor when the others have gone: of each sample its own patches, on every token axis."""
    view, batch, along = _by_factor(tensor, axes)
    if batch is None and along and len(set(left.patches)) > 1:
        raise Disagrees("tokens without the samples that they belong to")
    if batch is not None:
        view = view.index_select(batch, torch.tensor(left.samples))
    for i, tokens in along.items():
        rows = _broadcast(_rows(tokens, left), view, batch, i)
        view = torch.take_along_dim(view, rows, i)
    sizes = iter(view.shape)
    return view.reshape([math.prod(next(sizes) for _ in dim) for dim in axes])


def mask(
    tensor: Tensor, axes: Axes, left: Selection, where: Sequence[int], value: float
) -> Tensor:
    """The whole tensor, with ``value`` at the patches that leave on these factors' axes."""
    view, batch, along = _by_factor(tensor, axes)
    for i in where:
        view = view.masked_fill(_broadcast(_gone(along[i], left), view, batch, i), value)
    return view.reshape(tensor.shape)


def _keys(axes: Axes) -> list[int]:
    """The factors that are keys of a softmax."""
    factors = [factor for dim in axes for factor in dim]
    return [i for i, factor in enumerate(factors) if isinstance(factor, Tokens) and factor.weights]


# -- what the rule says -------------------------------------------------------------------------------------------


class Verdict(NamedTuple):
    """What the analysis found at one call: why it is refused, or the outputs' axes and the operands to gather."""

    refused: str
    labels: tuple[Axes | None, ...]
    gathers: tuple[Any, ...]
    softmax: bool


def judge(case: Case, kind: str, way: str) -> Verdict:
    """Run the call on labelled operands under the analysis."""
    tensors = [numbers(o, kind, seed).clone() for seed, o in enumerate(case.operands)]
    for i, (operand, tensor) in enumerate(zip(case.operands, tensors, strict=True)):
        if operand.expanded:
            tensors[i] = tensor[:1].expand(tensor.shape)
        if operand.labelled:
            set_axes(tensor, operand.axes)
            mark_data(tensor)
    with WAYS[way](), AxisMode() as mode:
        result = case.call(tensors, EVERYTHING, kind)
    labels = tuple(axes_of(out) for out in tensors_in(result))
    return verdict_of(mode.facts, labels, tensors)


def verdict_of(
    facts: NodeFacts, labels: tuple[Axes | None, ...], tensors: Sequence[Tensor]
) -> Verdict:
    """The facts of one node, as the passes use them: where an operand can be gathered, it will be."""
    if facts.mixing:
        return Verdict(facts.mixing, labels, (), False)
    gathers = []
    for i, tensor in enumerate(tensors):
        meets = [p for p in facts.positions if p.operand is tensor]
        if not meets:
            continue
        first = meets[0]
        if first.batch_dim is None or any(p.per_sample and p.repeat > 1 for p in meets):
            return Verdict("an operand cannot be gathered per sample", labels, (), False)
        dims = {p.dim: (p.dim, p.tokens.lead, p.tokens.tail) for p in meets}
        rows = tuple(dims[d] for d in sorted(dims))
        gathers.append(
            (i, rows, first.rank, first.batch_dim, first.per_sample, first.repeat),
        )
    if any(all(p.operand is not tensor for tensor in tensors) for p in facts.positions):
        return Verdict("an operand of fixed token length is made inside", labels, (), False)
    return Verdict("", labels, tuple(gathers), facts.softmax_over is not None)


# -- what the operator does ---------------------------------------------------------------------------------------


class Trial:
    """One case, executed without the analysis.

    Attributes:
        whole: the results on all rows.
        random: whether the call draws numbers; then results are compared in shape only.
    """

    def __init__(self, case: Case, kind: str) -> None:
        self.case, self.kind = case, kind
        self.tensors = [numbers(o, kind, seed) for seed, o in enumerate(case.operands)]
        self.whole = self.execute(self.tensors, EVERYTHING)
        self.random = False
        if torch.Tag.nondeterministic_seeded in case.func.tags:
            again = self.execute(self.tensors, EVERYTHING, seed=1)
            self.random = not all(map(torch.equal, self.whole, again))

    def execute(
        self, tensors: Sequence[Tensor], left: Selection, seed: int | None = None
    ) -> list[Tensor]:
        """The results on other operands."""
        if torch.Tag.nondeterministic_seeded in self.case.func.tags:
            torch.manual_seed(seed or 0)
        with torch.no_grad():
            results = tensors_in(self.case.call([t.clone() for t in tensors], left, self.kind))
        if self.case.func.overloadpacket in NOT_FILLED:
            return [torch.ones_like(result) for result in results]
        return results

    def same(self, got: Tensor, want: Tensor) -> bool:
        """Equal, up to the last bits where sums are taken in another order."""
        if got.shape != want.shape or got.dtype != want.dtype:
            return False
        if self.random or torch.equal(got, want):
            return True
        return torch.allclose(got, want, rtol=1e-9, atol=1e-12, equal_nan=True)

    def compare(self, verdict: Verdict, left: Selection) -> None:
        """Leaving out before the call must be leaving out after it.

        Raises:
            Disagrees: it is not.
        """
        whole = self._with_weights_of_what_stays(verdict, left)
        try:
            parts = self.execute(self._what_stays(verdict, left), left)
        except INVALID as error:
            reason = str(error).splitlines()[0]
            raise Disagrees(f"does not run on what is left: {reason}") from error
        if len(parts) != len(whole):
            raise Disagrees(f"{len(whole)} results become {len(parts)}")
        for i, (label, full, part) in enumerate(zip(verdict.labels, whole, parts, strict=True)):
            if label is None:
                self._compare_untold(i, full, part, left)
                continue
            if [math.prod(map(size, dim)) for dim in label] != list(full.shape):
                raise Disagrees(f"result {i} of shape {list(full.shape)} has the axes {label}")
            if not self.same(part, take(full, label, left)):
                raise Disagrees(f"result {i} is not the rows at its axes")
            if keys := _keys(label):
                weighs = full != 0
                if not torch.equal(weighs, mask(weighs, label, left, keys, False)):
                    raise Disagrees(f"result {i} gives weight to keys that had none")

    def _what_stays(self, verdict: Verdict, left: Selection) -> list[Tensor]:
        """The operands when others have left; of those that the analysis was not told of, samples and positions."""
        stays = []
        for operand, tensor in zip(self.case.operands, self.tensors, strict=True):
            axes = operand.axes
            if not operand.labelled:
                axes = tuple(tuple(size(f) if isinstance(f, Tokens) else f for f in dim) for dim in axes)
            stays.append(take(tensor, axes, left))
        for i, *gather in verdict.gathers:
            stays[i] = GatherPositions(*gather)(stays[i], torch.tensor(left.patches))
        return stays

    def _with_weights_of_what_stays(self, verdict: Verdict, left: Selection) -> list[Tensor]:
        """The results on all rows, where attention gives no weight to the keys that leave."""
        masked = list(self.tensors)
        for i, operand in enumerate(self.case.operands):
            if not operand.labelled:
                continue
            keys = _keys(operand.axes)
            if keys:
                masked[i] = mask(masked[i], operand.axes, left, keys, 0)
            if verdict.softmax:
                becomes = verdict.labels[0]
                if becomes is None or len(becomes) != len(operand.axes):
                    raise Disagrees("the keys of a softmax are not marked")
                fresh = [k for k in _keys(becomes) if k not in keys]
                masked[i] = mask(masked[i], operand.axes, left, fresh, float("-inf"))
        if all(map(operator.is_, masked, self.tensors)):
            return self.whole
        return self.execute(masked, EVERYTHING)

    def _compare_untold(self, i: int, full: Tensor, part: Tensor, left: Selection) -> None:
        """A result without axes may have samples, on their own axis or merged with others; tokens it may not have."""
        every, samples = len(EVERYTHING.samples), len(left.samples)
        for d in range(full.ndim):
            rest, uneven = divmod(full.shape[d], every)
            if part.ndim == full.ndim and part.shape[d] == rest * samples and not uneven:
                for own in ((Batch(every), rest), (rest, Batch(every))):
                    axes = tuple((s,) if at != d else own for at, s in enumerate(full.shape))
                    if self.same(part, take(full, axes, left)):
                        return
        if not self.same(part, full):
            raise Disagrees(f"result {i} has no axes, and changes with what is left")

    def failure(self, verdict: Verdict) -> str:
        """What disagrees with the verdict, or nothing."""
        for name, selections in SELECTIONS.items():
            for left in selections:
                try:
                    self.compare(verdict, left)
                except Disagrees as error:
                    return f"{error} ({name} left out)"
        return ""

    def guess(self) -> Verdict:
        """That nothing mixes, and results have the axes that the operands' sizes suggest."""
        known = {
            s: dim
            for operand, tensor in zip(self.case.operands, self.tensors, strict=True)
            for s, dim in zip(tensor.shape, operand.axes, strict=True)
            if operand.labelled
        }
        axes = [tuple(known.get(s, merge_ints((s,))) for s in full.shape) for full in self.whole]
        labels = tuple(own if has_tokens(own) else None for own in axes)
        return Verdict("", labels, (), False)


# -- one call -----------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What became of one case.

    ``verdict`` is apart, gathered, attention, refused, or needless for a refusal of what keeps apart after all;
    ``failure`` says in what the operator disagrees.
    """

    case: Case
    verdict: str
    failure: str = ""

    def __str__(self) -> str:
        return f"{self.case}: {self.failure}"


_last_kind: dict[Any, str] = {}


def trial_of(case: Case) -> Trial | None:
    """The case on numbers of a kind that the operator takes; ``None`` for arguments that do not go together."""
    usual = USUAL_KIND.get(case.func.overloadpacket, KINDS[0])
    for kind in dict.fromkeys((_last_kind.get(case.func, usual), *KINDS)):
        try:
            trial = Trial(case, kind)
        except INVALID:
            continue
        _last_kind[case.func] = kind
        return trial
    return None


def check(case: Case) -> Outcome | None:
    """Judge and execute one case; ``None`` if the operator does not take it."""
    trial = trial_of(case)
    if trial is None:
        return None
    verdicts: list[Verdict] = []
    for way in WAYS:
        try:
            verdict = judge(case, trial.kind, way)
        except Exception as error:  # whatever a rule breaks on is a finding
            return Outcome(case, "crash", f"{type(error).__name__}: {error}")
        if not verdict.refused and verdict not in verdicts and (failure := trial.failure(verdict)):
            return Outcome(case, "apart", f"{failure}, {way}")
        verdicts.append(verdict)
    first = verdicts[0]
    if first.refused:
        return Outcome(case, "refused" if trial.failure(trial.guess()) else "needless")
    if first.softmax:
        return Outcome(case, "attention")
    return Outcome(case, "gathered" if first.gathers else "apart")
