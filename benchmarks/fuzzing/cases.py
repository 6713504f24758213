"""A case: a model, a plan, options and a call, all drawn from one integer; and its outcome."""

from __future__ import annotations

import dataclasses
import math
import random
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import skipvit_fx
from fuzzing.compose import Built, Composition, compose
from fuzzing.named import Named, named
from skipvit_fx.errors import SkipViTError
from support.reference import (
    Layout,
    MaskedRun,
    ReferenceResult,
    physical_reference,
    plan_text,
    relative_error,
)

TOLERANCE = 1e-4
TIE = 1e-4
"""Scores closer than this may be ranked either way; the reference is then given the compiler's choice."""

FAILURES = ("wrong", "crash", "mute")
PACKAGE = str(Path(skipvit_fx.__file__).parent)


def longest(patches: Tensor) -> Tensor:
    """A score: the norm of each token."""
    return patches.norm(dim=-1)


def steepest(patches: Tensor) -> Tensor:
    """A score: how much the channels of each token differ."""
    return patches.std(-1)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"longest": longest, "steepest": steepest}


@dataclass(frozen=True)
class Case:
    """One call of `rewrite`, and one call of its result.

    Attributes:
        seed: the seed of images and of random scores.
        model: what to build.
        stages: layers and percents; return_layer, fused: the rest of the plan.
        cut, frontend, fill_taps, multiple_of, eliminate: options.
        score: a named score, or a name in :data:`FUNCTIONS`.
        given: example inputs as a ``tensor``, ``tuple`` or ``dict``.
        example, batch: the number of samples of the example and of the call.
        train, grad: whether the call is in train mode, and whether it records gradients.
    """

    seed: int
    model: Composition | Named
    stages: tuple[tuple[int, int], ...]
    return_layer: int | None = None
    fused: bool = False
    cut: str = "attention"
    score: str = "auto"
    frontend: str = "auto"
    fill_taps: bool = False
    multiple_of: int = 1
    eliminate: bool = True
    given: str = "tensor"
    example: int = 2
    batch: int = 3
    train: bool = False
    grad: bool = False

    @property
    def plan(self) -> str:
        """The plan in its notation."""
        return plan_text(
            [(at, f"{p / 100}") for at, p in self.stages], self.return_layer, self.fused
        )


def draw_case(seed: int) -> Case:
    """The case that a number stands for."""
    rng = random.Random(f"case {seed}")
    model: Composition | Named = compose(rng) if rng.random() < 0.7 else named(rng)
    depth = model.depth
    layers = sorted(
        rng.sample(range(1, depth + 1), rng.choice([1, 1, min(2, depth), min(3, depth)]))
    )
    returns = [*range(layers[-1] + 1, depth + 2), None]
    fused = isinstance(model, Named) and model.plain and rng.random() < 0.3
    case = Case(
        seed,
        model,
        tuple((layer, rng.choice([0, 10, 25, 30, 50, 50, 55, 75, 90])) for layer in layers),
        rng.choice(returns),
        fused,
        cut=rng.choice(["attention", "attention", "block"]),
        score=rng.choice(["auto", "auto", "cls", "mean", "random", *FUNCTIONS]),
        frontend=rng.choice(["auto"] * 6 + ["symbolic", "export"]),
        fill_taps=rng.random() < 0.3,
        multiple_of=1 if fused else rng.choice([1] * 6 + [2, 4, 8]),
        eliminate=rng.random() < 0.8,
        given=rng.choice(["tensor", "tensor", "tuple", "dict"]),
        example=rng.choice([1, 2, 2, 2, 3, 4]),
        batch=rng.choice([1, 2, 3, 3, 4, 5]),
        train=not fused and rng.random() < 0.25,
        grad=not fused and rng.random() < 0.3,
    )
    return _settled(case)


def _settled(case: Case) -> Case:
    """The case without combinations for which there is no reference."""
    if isinstance(case.model, Composition):
        between = any(p.place == "between" for p in case.model.placed)
        if between and case.cut == "block":  # does what is between two blocks belong to the first?
            case = replace(case, cut="attention")
        spec = case.model
        plain_prefix = spec.prefix in (("cls",), ())
        told = plain_prefix or (spec.cls is not None and spec.head in ("first", "hidden", "dict"))
        if case.score == "auto" and not told:
            case = replace(case, score="mean")
        if case.score == "cls" and (not told or spec.cls is None):
            case = replace(case, score="mean")
    if case.fused and case.score not in ("auto", "cls", "mean"):
        case = replace(case, score="auto")
    return case


@dataclass(frozen=True)
class Outcome:
    """The outcome of a case.

    Attributes:
        kind: ``exact``, ``refused``, ``guard`` (a call was refused), ``wrong``, ``crash`` (an exception that is not a
            refusal), ``mute`` (a refusal without a hint), ``invalid`` (the model does not run) or ``unjudged`` (the
            reference does not).
        reason: the class of the error and its first words, or what is wrong.
        error: the relative error, if exact or wrong.
    """

    kind: str
    reason: str = ""
    error: float = 0.0

    @property
    def failed(self) -> bool:
        """Whether the compiler is at fault."""
        return self.kind in FAILURES


class Difference(Exception):  # noqa: N818 - what a check found
    """The rewritten model is not what it should be."""

    def __init__(self, reason: str, error: float = math.inf) -> None:
        super().__init__(reason)
        self.error = error


class NoReferenceError(Exception):
    """The reference has no answer."""


def run(case: Case) -> Outcome:
    """Rewrite, call, and compare."""
    torch.manual_seed(case.seed)
    try:
        built = case.model.build()
        x = case.model.image(case.batch, case.seed)
        with torch.set_grad_enabled(case.grad):
            plain = _answer(built, x, case.train)
    except Exception as error:
        return Outcome("invalid", _words(error))
    if not all(t.isfinite().all() for t in tree_leaves(plain) if isinstance(t, Tensor)):
        return Outcome("invalid", "not finite")
    try:
        fast = _rewritten(case, built.model)
    except SkipViTError as error:
        return Outcome("refused" if error.hint else "mute", _words(error))
    except Exception as error:
        return Outcome("crash", _where(error))
    try:
        return _compared(case, built, fast, x, plain)
    except Difference as difference:
        return Outcome("wrong", str(difference), difference.error)
    except NoReferenceError as error:
        return Outcome("unjudged", str(error))
    except SkipViTError as error:
        return Outcome("guard" if error.hint else "mute", _words(error))
    except ValueError as error:
        documented = _raised_by_package(error)
        return Outcome("guard", _words(error)) if documented else Outcome("crash", _where(error))
    except Exception as error:
        return Outcome("crash", _where(error))


def _answer(built: Built, x: Tensor, train: bool) -> Any:
    """The output of model and twin; in-place operators may write into their inputs."""
    model, twin = built.model.train(train), built.twin.train(train)
    answer, same = model(x.clone()), twin(x.clone())
    model.eval(), twin.eval()
    if relative_error(_plain(same), _plain(answer)) > TOLERANCE:
        raise RuntimeError("the model is not its twin")
    return answer


def _plain(value: Any) -> Any:
    """Outputs as containers that the reference can compare."""
    if isinstance(value, (Tensor, type(None))):
        return value
    if hasattr(value, "items"):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value]


def _rewritten(case: Case, model: nn.Module) -> Any:
    x = case.model.image(case.example, case.seed + 1)
    hugging_face = isinstance(case.model, Named) and case.model.kind == "hugging face"
    name = "pixel_values" if hugging_face else "image"
    timm = isinstance(case.model, Named) and case.model.kind == "timm"
    inputs: Any = x
    if case.given == "dict" and not timm:
        inputs = {name: x}
    elif case.given != "tensor":
        inputs = (x,)
    score: Any = FUNCTIONS.get(case.score, case.score)
    return skipvit_fx.rewrite(
        model,
        case.plan,
        validate=False,  # the fuzzer should find what the rules let through
        example_inputs=inputs,
        frontend=case.frontend,  # type: ignore[arg-type]
        cut=case.cut,  # type: ignore[arg-type]
        score=score,
        fill_taps=case.fill_taps,
        multiple_of=case.multiple_of,
        eliminate_dead_tokens=case.eliminate,
    )


def _compared(case: Case, built: Built, fast: Any, x: Tensor, plain: Any) -> Outcome:
    """Exact, or a :class:`Difference`; with skipping on, then off.

    Raises:
        Difference: something differs.
    """
    _refuse_gone_counts(case, fast)
    fast.train(case.train)
    with torch.set_grad_enabled(case.grad):
        torch.manual_seed(case.seed)
        got = fast(x.clone())
        torch.manual_seed(case.seed)
        traces = skipvit_fx.trace_tokens(fast, x.clone())
        error = _error_to_reference(case, built, x, traces, got, plain)
        skipvit_fx.set_skipping(fast, False)
        off = _error(_plain(fast.graph_forward(x.clone())), _plain(plain))
    built.model.eval(), built.twin.eval()
    if off > TOLERANCE:
        raise Difference("with skipping off, the graph is not the model", off)
    return Outcome("exact", error=error)


def _refuse_gone_counts(case: Case, fast: Any) -> None:
    """The reference's head counts the remaining tokens, an exported graph has the author's count; either may be right.

    Raises:
        NoReferenceError: the head counts tokens of which some never return.
    """
    placed = case.model.placed if isinstance(case.model, Composition) else ()
    counts = any(p.place in ("normed", "pooled") and p.operator.kind == "count" for p in placed)
    gone = case.return_layer is None and case.stages
    if counts and gone and skipvit_fx.inspect(fast).frontend == "export":
        raise NoReferenceError("the head counts tokens, of which some never return")


def _error(got: Any, wanted: Any) -> float:
    """The relative error of outputs of any structure.

    Raises:
        Difference: the structures or shapes differ.
    """
    try:
        return relative_error(got, wanted)
    except AssertionError as error:
        raise Difference(f"a different form of output: {error}") from error


def _error_to_reference(
    case: Case, built: Built, x: Tensor, traces: Sequence[Any], got: Any, plain: Any
) -> float:
    """The error of the output against the reference's, which drops the same tokens by the same scores.

    Raises:
        Difference: it is too large for every mark at which the tokens of a layer may leave.
    """
    differences = []
    for at in built.marks:
        wanted, run = _wanted(case, built, at, x, traces)
        try:
            error = _error(_plain(got), _plain(wanted.output))
            if error > TOLERANCE:
                raise Difference("the output differs", error)
            _same_tokens(traces, wanted, ranked=run.choices is None)
            if case.grad:
                _same_gradients(built, got, wanted.output, plain)
        except Difference as difference:
            differences.append(difference)
        else:
            return error
    raise differences[0]


def _wanted(
    case: Case, built: Built, at: str, x: Tensor, traces: Sequence[Any]
) -> tuple[ReferenceResult, Run]:
    """The reference's output with tokens leaving at a mark, and the run that gave it."""
    run = Run(case, built.twin, built.layout(at))
    wanted = _by_reference(case, built, run, x)
    if (
        run.choices is None and any(stage.margin < TIE for stage in wanted.stages)
    ) or case.score == "random":
        run.choices = {t.layer: t.dropped for t in traces}
    if run.choices is not None and not case.fused:
        wanted = _by_reference(case, built, run, x)
    return wanted, run


def _by_reference(case: Case, built: Built, run: Run, x: Tensor) -> ReferenceResult:
    stages = [(layer, Fraction(percent, 100)) for layer, percent in case.stages]
    if case.fused:
        score = None if case.score == "auto" else case.score
        return physical_reference(
            built.model,
            x,
            stages=stages,
            return_layer=case.return_layer,
            fused=True,
            cut=case.cut,  # type: ignore[arg-type]
            score=score,  # type: ignore[arg-type]
        )
    built.twin.train(case.train)
    try:
        return run.start()(x.clone())
    except Exception as error:
        raise NoReferenceError(_words(error)) from error
    finally:
        built.twin.eval()


class Run(MaskedRun):
    """The masked reference, with options that it lacks: other scores, and multiples of a number.

    Attributes:
        choices: patches to drop, by layer, in place of those of the score.
    """

    def __init__(self, case: Case, model: nn.Module, layout: Layout) -> None:
        score: Any = case.score if case.score in ("cls", "mean") else None
        stages = [(layer, Fraction(percent, 100)) for layer, percent in case.stages]
        super().__init__(
            model,
            layout,
            stages=stages,
            return_layer=case.return_layer,
            cut=case.cut,  # type: ignore[arg-type]
            score=score,
        )
        self.case = case
        self.wanted = dict(stages)
        self.choices: dict[int, Tensor] | None = None

    def start(self) -> Run:
        """Ready for another run."""
        self.layer = self.count = 0
        self.gone = self.frozen = None
        self.seen, self.results = [], []
        self.stages = dict(self.wanted)
        return self

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(
            self.case.model, Named
        ):  # its marks are passed at once, and their layers continue
            super()._leave(module, args, output)

    def _decide(self, layer: int, state: Tensor) -> None:
        assert self.gone is not None
        first, last = self.layout.prefix, self.gone.shape[1] - self.layout.suffix
        here = ~self.gone[:, first:last]
        present = int(here[0].sum())
        others = first + self.layout.suffix
        stay = present - math.floor(self.wanted[layer] * present) + others
        stay = -(-stay // self.case.multiple_of) * self.case.multiple_of
        self.stages[layer] = Fraction(max(0, present + others - stay), present)
        if self.choices is not None:
            patches = torch.zeros_like(here, dtype=torch.float32)
            patches = patches.scatter(1, self.choices[layer], -1.0)
            self.seen = [_among(patches, first, self.gone)]
        elif self.case.score in FUNCTIONS:
            tokens = state.transpose(0, 1) if self.layout.token_dim == 0 else state
            scores = FUNCTIONS[self.case.score](tokens[:, first:last].detach())
            self.seen = [_among(scores, first, self.gone)]
        super()._decide(layer, state)


def _among(patches: Tensor, first: int, like: Tensor) -> Tensor:
    """Scores of the patches placed among all tokens; the others have none."""
    whole = torch.zeros(like.shape, dtype=patches.dtype)
    whole[:, first : first + patches.shape[1]] = patches
    return whole


def _same_tokens(traces: Sequence[Any], wanted: ReferenceResult, *, ranked: bool) -> None:
    if [t.layer for t in traces] != [stage.layer for stage in wanted.stages]:
        raise Difference("different stages")
    for mine, theirs in zip(traces, wanted.stages, strict=True):
        fused = mine.fused_kept is not None
        for name in ("kept", "dropped"):
            a, b = getattr(mine, name).sort(1).values, getattr(theirs, name)
            if not fused and not torch.equal(a, b):
                raise Difference(f"different tokens {name}")
        if ranked and not fused:
            error = _error(mine.scores, theirs.scores.detach())
            if error > TOLERANCE:
                raise Difference("different scores", error)


def _same_gradients(built: Built, got: Any, wanted: Any, plain: Any) -> None:
    """Compare the gradients of all parameters, of a sum with random weights."""
    try:
        _gradients(built.model, plain)
        expected = _gradients(built.twin, wanted)
    except RuntimeError as error:  # a model that cannot be trained because of in-place operators
        raise NoReferenceError(_words(error)) from error
    scale = max((float(g.abs().max()) for g in expected if g is not None), default=0.0)
    for mine, theirs in zip(_gradients(built.model, got), expected, strict=True):
        zero = torch.zeros(())
        a, b = (zero if g is None else g for g in (mine, theirs))
        error = float((a - b).abs().max()) / max(scale, 1e-30)
        if error > 10 * TOLERANCE:
            raise Difference("the gradients differ", error)


def _gradients(module: nn.Module, output: Any) -> Sequence[Tensor | None]:
    leaves = [t for t in tree_leaves(_plain(output)) if isinstance(t, Tensor) and t.requires_grad]
    parameters = [p for p in module.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(0)
    total = sum((leaf * torch.randn(leaf.shape, generator=generator)).mean() for leaf in leaves)
    return torch.autograd.grad(total, parameters, allow_unused=True, retain_graph=True)  # type: ignore[arg-type]


# -- words ----------------------------------------------------------------------------------------------------------


def _words(error: BaseException) -> str:
    """The class of an error and its first words, without names and numbers."""
    text = str(error).partition("\n")[0]
    text = re.sub(r"'[^']*'|\"[^\"]*\"", "...", text)
    text = re.sub(r"\(node .*", "", text)
    text = re.sub(r"\b\w*\d+\w*\b", "N", text)
    return f"{type(error).__name__}: {text[:90].strip()}"


def _frames(error: BaseException) -> Iterator[traceback.FrameSummary]:
    yield from reversed(traceback.extract_tb(error.__traceback__))


def _raised_by_package(error: BaseException) -> bool:
    return next(_frames(error)).filename.startswith(PACKAGE)


def _where(error: BaseException) -> str:
    """The words, and the innermost place in this package."""
    ours = (f for f in _frames(error) if f.filename.startswith(PACKAGE))
    place = next((f"{Path(f.filename).name}:{f.name}" for f in ours), "in the graph")
    return f"{_words(error)} [{place}]"


# -- smaller --------------------------------------------------------------------------------------------------------

PLAIN: dict[str, Any] = {
    "frontend": "auto",
    "cut": "attention",
    "score": "auto",
    "fill_taps": False,
    "multiple_of": 1,
    "given": "tensor",
    "train": False,
    "grad": False,
    "fused": False,
    "example": 2,
    "batch": 2,
    "eliminate": True,
}


def smaller(case: Case) -> Iterator[Case]:
    """Cases that are one step simpler, the boldest first."""
    for model in case.model.smaller():
        depth = model.depth
        stages = tuple((min(layer, depth), percent) for layer, percent in case.stages)
        stages = tuple(dict(stages).items())
        back = case.return_layer and max(min(case.return_layer, depth + 1), stages[-1][0] + 1)
        yield replace(case, model=model, stages=stages, return_layer=back)
    if len(case.stages) > 1:
        for i in range(len(case.stages)):
            yield replace(case, stages=case.stages[:i] + case.stages[i + 1 :])
    for name, value in PLAIN.items():
        if getattr(case, name) != value:
            yield replace(case, **{name: value})
    if case.stages != tuple((layer, 50) for layer, _ in case.stages):
        yield replace(case, stages=tuple((layer, 50) for layer, _ in case.stages))
    depth = case.model.depth
    if case.return_layer != depth + 1:
        yield replace(case, return_layer=depth + 1)


def _alike(outcome: Outcome, before: Outcome) -> bool:
    return (outcome.kind, outcome.reason) == (before.kind, before.reason)


def shrink(case: Case, tries: int = 120) -> Case:
    """The smallest case found that fails in the same way."""
    before = run(case)
    changed = True
    while changed and tries:
        changed = False
        for other in smaller(case):
            tries -= 1
            if _settled(other) == other and _alike(run(other), before):
                case, changed = other, True
                break
            if not tries:
                break
    return case


HEAD = """
from fuzzing.cases import Case, run  # with benchmarks/ on the path
from fuzzing.compose import Composition, Placed
from fuzzing.named import Named
from fuzzing.operators import Operator
"""


def as_test(case: Case) -> str:
    """A pytest test that fails as the case does; the source of a composed model is a comment above it."""
    fields = ", ".join(f"{f.name}={getattr(case, f.name)!r}" for f in dataclasses.fields(case))
    source = case.model.source() if isinstance(case.model, Composition) else ""
    comment = "".join(f"# {line}".rstrip() + "\n" for line in source.splitlines())
    return (
        f"{HEAD}\n{comment}\n"
        f"def test_case_{case.seed}() -> None:\n"
        f"    outcome = run(Case({fields}))\n"
        "    assert not outcome.failed, outcome\n"
    )
