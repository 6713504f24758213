"""Every rule of the token analysis against the operator itself: what is said to keep tokens apart must do so.

The operator runs on all rows, and on what is left when patches or samples have gone. Where a rule lets it pass, both
must agree, along the axes that the rule returned. What a rule refuses needlessly is no failure;
``python tests/analysis/test_rules.py`` lists it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from skipvit_fx.analysis import tokens
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
from skipvit_fx.analysis.rules import find_rule
from skipvit_fx.analysis.rules.call import RULES, Rule
from skipvit_fx.analysis.tokens import AxisMode, NodeFacts
from skipvit_fx.graph.attention_ops import AttentionArguments
from skipvit_fx.ops.positions import GatherPositions
from support.rule_cases import (
    EVERYTHING,
    KINDS,
    LAYOUTS,
    SELECTIONS,
    USUAL_KIND,
    Case,
    Operand,
    Selection,
    cases_of,
    fixed,
    numbers,
    overloads,
    pointwise_packets,
    ruled_packets,
)

pytestmark = pytest.mark.every_case

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
    first, last = tokens.prefix, tokens.prefix + tokens.patches
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
    for i, factor in along.items():
        rows = _broadcast(_rows(factor, left), view, batch, i)
        view = torch.take_along_dim(view, rows, i)
    sizes = iter(view.shape)
    return view.reshape([math.prod(next(sizes) for _ in dim) for dim in axes])


def mask(tensor: Tensor, axes: Axes, left: Selection, where: Sequence[int], value: float) -> Tensor:
    """The whole tensor, with ``value`` at the patches that leave on these factors' axes."""
    view, batch, along = _by_factor(tensor, axes)
    for i in where:
        view = view.masked_fill(_broadcast(_gone(along[i], left), view, batch, i), value)
    return view.reshape(tensor.shape)


def _keys(axes: Axes) -> list[int]:
    """The factors that are keys of a softmax, of which those that are gone have no weight."""
    factors = [factor for dim in axes for factor in dim]
    return [
        i
        for i, factor in enumerate(factors)
        if isinstance(factor, Tokens) and factor.weights and not factor.nonzero
    ]


# -- what the rule says -------------------------------------------------------------------------------------------


class Verdict(NamedTuple):
    """What the analysis found at one call: why it is refused, or the outputs' axes and the operands to gather."""

    refused: str
    labels: tuple[Axes | None, ...]
    gathers: tuple[Any, ...]
    softmax: bool


def labelled(operands: Sequence[Operand], kind: str) -> list[Tensor]:
    """The operands as the analysis sees them."""
    tensors = []
    for seed, operand in enumerate(operands):
        tensor = numbers(operand, kind, seed).clone()
        if operand.expanded:
            tensor = tensor[:1].expand(tensor.shape)
        if operand.labelled:
            set_axes(tensor, operand.axes)
            mark_data(tensor)
        tensors.append(tensor)
    return tensors


def judge(case: Case, kind: str, way: str) -> Verdict:
    """Run the call on labelled operands under the analysis."""
    tensors = labelled(case.operands, kind)
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
        dims = {p.dim: (p.dim, p.tokens.prefix, p.tokens.suffix) for p in meets}
        rows = tuple(dims[d] for d in sorted(dims))
        gathers.append(
            (i, rows, first.rank, first.batch_dim, first.per_sample, first.repeat),
        )
    if any(all(p.operand is not tensor for tensor in tensors) for p in facts.positions):
        return Verdict("an operand of fixed token length is made inside", labels, (), False)
    return Verdict("", labels, tuple(gathers), facts.softmax_over is not None)


# -- what the operator does ---------------------------------------------------------------------------------------


def what_stays(
    operands: Sequence[Operand], tensors: Sequence[Tensor], verdict: Verdict, left: Selection
) -> list[Tensor]:
    """The operands when others have left; of those that the analysis was not told of, samples and positions."""
    stays = []
    for operand, tensor in zip(operands, tensors, strict=True):
        axes = operand.axes
        if not operand.labelled:
            axes = tuple(tuple(size(f) if isinstance(f, Tokens) else f for f in d) for d in axes)
        stays.append(take(tensor, axes, left))
    for i, *gather in verdict.gathers:
        stays[i] = GatherPositions(*gather)(stays[i], torch.tensor(left.patches))
    return stays


def untold(full: Tensor, left: Selection) -> Iterator[Tensor]:
    """What may be left of a result without axes: samples may go, alone or merged with others; tokens may not."""
    yield full
    every = len(EVERYTHING.samples)
    for d, length in enumerate(full.shape):
        rest, uneven = divmod(length, every)
        for own in ((Batch(every), rest), (rest, Batch(every))):
            if not uneven:
                yield take(
                    full, tuple((s,) if at != d else own for at, s in enumerate(full.shape)), left
                )


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
            given = what_stays(self.case.operands, self.tensors, verdict, left)
            parts = self.execute(given, left)
        except INVALID as error:
            reason = str(error).splitlines()[0]
            raise Disagrees(f"does not run on what is left: {reason}") from error
        if len(parts) != len(whole):
            raise Disagrees(f"{len(whole)} results become {len(parts)}")
        for i, (label, full, part) in enumerate(zip(verdict.labels, whole, parts, strict=True)):
            if label is None:
                if not any(self.same(part, want) for want in untold(full, left)):
                    raise Disagrees(f"result {i} has no axes, and changes with what is left")
                continue
            if [math.prod(map(size, dim)) for dim in label] != list(full.shape):
                raise Disagrees(f"result {i} of shape {list(full.shape)} has the axes {label}")
            if not self.same(part, take(full, label, left)):
                raise Disagrees(f"result {i} is not the rows at its axes")
            if keys := _keys(label):
                weighs = full != 0
                if not torch.equal(weighs, mask(weighs, label, left, keys, False)):
                    raise Disagrees(f"result {i} gives weight to keys that had none")

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
    return None if trial is None else outcome_of(trial)


def outcome_of(trial: Trial) -> Outcome:
    """Judge what was executed."""
    case = trial.case
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


PACKETS = [*ruled_packets(), *pointwise_packets()]


@pytest.mark.parametrize("packet", PACKETS, ids=str)
def test_what_is_said_to_keep_apart_does(packet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a rule has one answer for each result."""
    trials = [trial for case in cases_of(packet) if (trial := trial_of(case))]
    outcomes = [outcome_of(trial) for trial in trials]
    met = {outcome.case.func for outcome in outcomes}
    assert [f for f in overloads(packet) if f not in met] == [], "say how to call it: rule_cases"
    assert met or packet not in RULES
    failures = [str(outcome) for outcome in outcomes if outcome.failure]
    assert not failures, "\n".join([f"{len(failures)} of {len(outcomes)}", *failures[:20]])
    refused = ("refused", "needless")
    passed = [t for t, o in zip(trials, outcomes, strict=True) if o.verdict not in refused]
    assert_one_answer_for_each_result(passed, monkeypatch)


def assert_one_answer_for_each_result(
    trials: Sequence[Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three calls of each overload."""
    answered: list[Tensor] = []

    def note(tensor: Tensor, axes: Axes | None) -> None:
        answered.append(tensor)
        set_axes(tensor, axes)

    monkeypatch.setattr(tokens, "set_axes", note)
    tried: Counter[Any] = Counter()
    for trial in trials:
        if tried[trial.case.func] == 3:
            continue
        tried[trial.case.func] += 1
        answered.clear()
        judge(trial.case, trial.kind, "whole")
        # a composite has inner results, too
        assert len(answered) >= len(trial.whole), str(trial.case)


def test_cases_are_many_and_of_every_form() -> None:
    cases = [case for packet in PACKETS for case in cases_of(packet)]
    assert len(cases) >= 10_000
    assert sum(case.keyword for case in cases) > 4_000
    specs = {operand.spec for case in cases for operand in case.operands}
    assert set(LAYOUTS) <= specs
    dims = [case.given.get("dim", case.given.get("dims")) for case in cases]
    for form in (-3, -1, 0, 2, None, [], [0], [-1, 0], [0, 1]):
        assert form in dims


# -- the check itself ---------------------------------------------------------------------------------------------


def _as_if(func: Any) -> Rule:
    """A rule that takes every call for one of another operator."""
    return lambda call: find_rule(func)(dataclasses.replace(call, func=func))  # type: ignore[misc]


aten = torch.ops.aten
KEEPS_AXES = _as_if(aten.alias.default)
BROKEN = {
    "mixes tokens": (
        aten.flip,
        KEEPS_AXES,
        Case(aten.flip.default, {"self": Operand("B N C"), "dims": [1]}, False),
        "result 0 is not the rows at its axes (patches",
    ),
    "mixes samples": (
        aten.flip,
        KEEPS_AXES,
        Case(aten.flip.default, {"self": Operand("B N C"), "dims": [0]}, False),
        "result 0 is not the rows at its axes (samples",
    ),
    "moves the axis": (
        aten.transpose,
        KEEPS_AXES,
        Case(aten.transpose.int, {"self": Operand("B N C"), "dim0": 1, "dim1": 2}, False),
        "the rule of",
    ),
    "drops a position": (
        aten.mul,
        _as_if(aten.zeros_like.default),
        Case(aten.mul.Tensor, {"self": Operand("B N C"), "other": fixed("N C")}, False),
        "does not run on what is left",
    ),
    "does not mark keys": (
        aten._softmax,
        KEEPS_AXES,
        Case(
            aten._softmax.default,
            {"self": Operand("B H N N"), "dim": -1, "half_to_float": False},
            False,
        ),
        "result 0 is not the rows at its axes (patches",
    ),
    "gives weight to all keys": (
        aten.exp,
        KEEPS_AXES,
        Case(aten.exp.default, {"self": Operand("B H N W")}, False),
        "gives weight to keys that had none",
    ),
    "sees no tokens": (
        aten.sum,
        _as_if(aten.new_zeros.default),
        Case(aten.sum.dim_IntList, {"self": Operand("B N C"), "dim": [1]}, True),
        "changes with what is left",
    ),
    "has one answer for two results": (
        aten.sort,
        lambda call: KEEPS_AXES(call)[:1],
        Case(aten.sort.default, {"self": Operand("B N C")}, False),
        "the rule of",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packet, rule, case, failure = BROKEN[name]
    before = check(case)
    assert before is not None
    assert before.failure == ""
    monkeypatch.setitem(RULES, packet, rule)
    after = check(case)
    assert after is not None
    assert after.failure
    assert failure in after.failure


# -- attention ----------------------------------------------------------------------------------------------------

Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
BETWEEN: dict[str, tuple[bool, Callable[[Tensor], Tensor]]] = {
    "nothing": (True, lambda w: w),
    "a factor": (True, lambda w: w * 0.5),
    "dropout": (True, lambda w: F.dropout(w, 0.0)),
    "relu": (True, F.relu),
    "square": (True, torch.square),
    "reshape": (True, lambda w: w.view(-1, *w.shape[-2:]).view(w.shape)),
    "talking heads": (True, lambda w: torch.stack([w[:, 0] - w[:, 1], w[:, 0] + w[:, 1]], 1)),
    "exp": (False, torch.exp),
    "a term": (False, lambda w: w + 0.1),
    "softmax again": (False, lambda w: w.softmax(-1)),
    "softmax over heads": (False, lambda w: w.softmax(1)),
    "what is left over": (False, lambda w: 1 - w),
    "a bound": (False, lambda w: w.clamp_min(0.05)),
    "ones": (False, torch.ones_like),
    "ranks": (False, lambda w: w.argsort(1).to(w.dtype)),
    "transposed": (False, lambda w: w.mT),
}
"""What may happen between a softmax and the sum with the values: whether it must pass, and what it is."""


def _by_parts(between: Callable[[Tensor], Tensor]) -> Attention:
    def attention(
        q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, hide: Tensor | None
    ) -> Tensor:
        logits = q @ k.mT / 3
        for term in (bias, hide):
            logits = logits if term is None else logits + term
        return between(logits.softmax(-1)) @ v

    return attention


def _fused(causal: bool) -> Attention:
    def attention(
        q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, hide: Tensor | None
    ) -> Tensor:
        if causal:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        terms = [term for term in (bias, hide) if term is not None]
        return F.scaled_dot_product_attention(q, k, v, sum(terms) if terms else None)

    return attention


def _hide(keys: Operand, left: Selection) -> Tensor:
    """What is added to the logits of the keys that leave."""
    axes = keys.axes[:-1]
    rows = torch.zeros([math.prod(map(size, dim)) for dim in axes], dtype=torch.float64)
    factors = [factor for dim in axes for factor in dim]
    where = [i for i, f in enumerate(factors) if isinstance(f, Tokens) and f in axes[-1]]
    where = where if keys.labelled else []
    return mask(rows, axes, left, where, float("-inf")).unsqueeze(-2)


def _attention_failure(attention: Attention, operands: list[Operand], verdict: Verdict) -> str:
    """In what masking the keys that leave differs from leaving them out."""
    full = [numbers(o, "float", seed) for seed, o in enumerate(operands)]
    (label,) = verdict.labels
    for left in itertools.chain.from_iterable(SELECTIONS.values()):
        whole = attention(*_four(full), _hide(operands[1], left))
        try:
            part = attention(*_four(what_stays(operands, full, verdict, left)), None)
            wanted = untold(whole, left) if label is None else [take(whole, label, left)]
        except (*INVALID, Disagrees) as error:
            return str(error)
        if not any(
            part.shape == want.shape and torch.allclose(part, want, rtol=1e-9, atol=1e-12)
            for want in wanted
        ):
            return f"masking is not leaving out: {left}"
    return ""


def _four(operands: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    q, k, v, *bias = operands
    return q, k, v, bias[0] if bias else None


ATTENTIONS: dict[str, tuple[bool, list[Operand]]] = {
    "batch, heads": (True, [Operand("B H N D")] * 3),
    "heads in the batch": (True, [Operand("BH N D")] * 3),
    "one head": (True, [Operand("B N C")] * 3),
    "patches only": (True, [Operand("B H P D")] * 3),
    "fixed queries": (True, [fixed("B H 2 D"), Operand("B H N D"), Operand("B H N D")]),
    "wide values": (True, [Operand("B H N D"), Operand("B H N D"), Operand("B H N K")]),
    "bias": (True, [*[Operand("B H N D")] * 3, fixed("H N N")]),
    "bias of keys": (True, [*[Operand("B H N D")] * 3, fixed("N")]),
    "bias of samples": (True, [*[Operand("B H N D")] * 3, fixed("B 1 N N")]),
    "bias of data": (True, [*[Operand("B H N D")] * 3, Operand("B 1 1 N")]),
    "bias of pairs": (True, [*[Operand("B H N D")] * 3, Operand("B H N N")]),
    "bias, heads in the batch": (True, [*[Operand("BH N D")] * 3, fixed("1 N N")]),
    "tokens first": (False, [Operand("N B C")] * 3),
    "tokens first, heads": (False, [Operand("N H B D")] * 3),
    "heads of each token": (False, [Operand("B N H D")] * 3),
    "channels": (False, [Operand("B C N")] * 3),
    "samples of each head": (False, [Operand("H N B D")] * 3),
    "out of step": (False, [Operand("B H N D"), Operand("B H N D"), Operand("B H Q D")]),
    "fixed values": (False, [Operand("B H N D"), Operand("B H N D"), fixed("B H N D")]),
    "fixed keys": (False, [Operand("B H N D"), fixed("B H N D"), fixed("B H N D")]),
    "other order of heads": (False, [Operand("BH N D"), Operand("HB N D"), Operand("BH N D")]),
    "tokens of all samples": (False, [Operand("H BN D")] * 3),
    "bias out of step": (False, [*[Operand("B H N D")] * 3, Operand("B 1 1 Q")]),
}
"""Operands of an attention, and whether it must pass."""


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("form", ["parts", "fused", "causal"])
def test_masking_is_leaving_out(name: str, form: str) -> None:
    passes, operands = ATTENTIONS[name]
    if form == "causal" and len(operands) == 4:
        return
    tensors = labelled(operands, "float")
    if form == "parts":
        attention = _by_parts(lambda w: w)
        with torch.no_grad(), AxisMode() as mode:
            out = attention(*_four(tensors), None)
        facts = mode.facts
        made_inside = {id(tensor) for tensor in tensors}
        facts.positions = [p for p in facts.positions if id(p.operand) in made_inside]
    else:
        attention = _fused(form == "causal")
        facts = tokens._attention(AttentionArguments(*_four(tensors), is_causal=form == "causal"))
        out = facts.value
    verdict = verdict_of(facts, (axes_of(out),), tensors)
    assert not (passes and verdict.refused and form != "causal")
    if not verdict.refused:
        assert _attention_failure(attention, operands, verdict) == ""
        attends = facts.softmax_over is not None
        assert attends or not passes
        assert facts.sums_weights == attends


@pytest.mark.parametrize("name", BETWEEN)
@pytest.mark.parametrize("layout", ["B H N D", "BH N D"])
def test_what_has_no_weight_keeps_none(name: str, layout: str) -> None:
    passes, between = BETWEEN[name]
    if "heads" in name and layout != "B H N D":
        layout = "B H P D"
    operands = [Operand(layout)] * 3
    tensors = labelled(operands, "float")
    attention = _by_parts(between)
    with torch.no_grad(), AxisMode() as mode:
        out = attention(*_four(tensors), None)
    verdict = verdict_of(mode.facts, (axes_of(out),), tensors)
    assert not (passes and verdict.refused)
    if not verdict.refused:
        assert _attention_failure(attention, operands, verdict) == ""


def _report() -> None:
    """How many cases of each operator are refused, and how many needlessly."""
    for packet in PACKETS:
        found = [outcome for case in cases_of(packet) if (outcome := check(case))]
        counts = Counter("failed" if outcome.failure else outcome.verdict for outcome in found)
        print(packet, *(f"{verdict} {count}" for verdict, count in sorted(counts.items())))
        for outcome in found:
            if outcome.failure or outcome.verdict == "needless":
                print(f"    {outcome.verdict}: {outcome}")


if __name__ == "__main__":
    _report()
