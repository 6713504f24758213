"""The public call: the fastest plans that a user's own images allow."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import nn

from skipvit_fx.arguments import check_flag, check_model
from skipvit_fx.capture.example import floating_like
from skipvit_fx.errors import SearchError
from skipvit_fx.graph.fingerprint import fingerprint, module_lines, state_lines
from skipvit_fx.graph.record import numbered_lines
from skipvit_fx.options import Options
from skipvit_fx.plan import Plan
from skipvit_fx.planner.costs import Costs
from skipvit_fx.planner.evaluate import Evaluator
from skipvit_fx.planner.images import Batch, contents, images_of, read_all, sample, split
from skipvit_fx.planner.quality import METRICS, Metric, MetricFunction
from skipvit_fx.planner.result import Candidate, SearchResult
from skipvit_fx.planner.running import Progress, Run
from skipvit_fx.planner.shared_graph import SharedGraph, share_graph
from skipvit_fx.planner.space import Space
from skipvit_fx.planner.study import Study, optuna
from skipvit_fx.planner.timing import milliseconds


def search(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    metric: str | MetricFunction = "agreement",
    budget: float | str | None = None,
    stages: int = 2,
    trials: int = 200,
    holdout: float = 0.5,
    storage: Any = None,
    seed: int = 0,
    labelled: bool = False,
    measure: bool = True,
    progress: Callable[[Progress], None] | None = None,
    **options: Any,
) -> SearchResult:
    """Find the plans that cost least and preserve most of a model on a user's own images.

    The model is captured once, and the layers before a plan's first stage are computed once per batch, so a plan costs
    much less than a forward pass. Ctrl-C ends the search early, and returns what was found so far.

    Args:
        model: any module that :func:`skipvit_fx.rewrite` takes. It is not changed, and is used in eval mode.
        batches: what the model is called with: a list or a loader of tensors, tuples of arguments, or dicts of them.
            It is read once, and its tensors are moved to the model's device.
        metric: ``"agreement"``: the share of images for which the highest class score is that of the model's own class;
            ``"cosine"``: between the outputs and the model's, along their features, mean over tokens; ``"accuracy"``:
            the share of images for which it is that of their label. Or a function of outputs and batch, which returns a
            number or one per image, ``[batch]``; more is better.
        budget: plans may have at most this share of the model's multiply-adds, such as 0.7; or take at most this time
            for a call with the first batch, such as ``"12ms"``. ``None``: any.
        stages: the most stages in a plan.
        trials: how many plans are evaluated in all, by all processes that share the study. The profile and published
            plans are among them, and are evaluated in any case.
        holdout: the share of the images that has no part in choosing plans, in [0, 1).
        storage: where the study is kept: ``None`` for memory; a file ending in ``.log``, or ``journal:///file``; a URL
            such as ``sqlite:///study.db`` or ``postgresql://user@host/database``; or a storage of optuna's. A search
            with the same model, images and arguments goes on with it, and may do so in several processes at once.
        seed: of the choice of images to hold out, and of the plans.
        labelled: each batch is a pair: what the model is called with, and labels, one for each image. A metric that
            is a function gets both. ``metric="accuracy"`` implies it.
        measure: rewrite and validate the plans of the front, and time them beside the model.
        progress: called after every evaluation.
        options: other arguments of :func:`skipvit_fx.rewrite` for every plan, such as ``cut`` and ``score``.

    Returns:
        The front; print it, or see :class:`skipvit_fx.SearchResult`.

    Raises:
        SearchError: an argument, the batches, the metric or the storage is not as described, or optuna is missing.
        PlanError: an option is not one of its choices.
        TypeError: ``model`` is not a module.
        TraceError, UnsupportedModelError: as :func:`skipvit_fx.rewrite` does, whatever the plan.
        ValidationError: as :func:`skipvit_fx.rewrite` does for a plan of the front.
    """
    check_model(model)
    check_flag("labelled", labelled)
    check_flag("measure", measure)
    _check_numbers(stages, trials, holdout, seed)
    share, limit = _budget(budget, measure)
    chosen, wanted = _metric(metric), _options(options)
    labelled = labelled or metric == "accuracy"
    optuna()
    device = _device(model)
    ours, held = split(read_all(batches, labelled), holdout, seed, labelled)
    example = ours[0].to(device)
    shared = share_graph(model, example.args, example.kwargs, wanted)
    shared_print = _fingerprint(model, shared)
    costs = Costs(shared)
    if limit is not None:
        share = limit / milliseconds(model, (), ours[0], {})[0]
    name = _study_name(model, shared_print, chosen, wanted, (stages, holdout, seed), ours + held)
    space = Space.of(shared, stages)
    study = Study(name, storage, seed, space)
    evaluator = Evaluator(shared, costs, chosen, ours)
    run = Run(evaluator, study, space, share * costs.baseline, trials, progress)
    with contextlib.closing(study):
        interrupted = run.to_the_end()
        front, candidates, profile = run.front(), run.candidates(), run.profile()
    if held:
        front = _held_out(Evaluator(shared, costs, chosen, held), front)
    timed = _timed(model, front, ours[0], options, limit) if measure else (None, front)
    own_time, front = timed
    known = {str(one.plan): one for one in front}
    return SearchResult(
        front=front,
        candidates=tuple(known.get(str(one.plan), one) for one in candidates),
        profile=profile,
        baseline_macs=costs.baseline,
        baseline_milliseconds=own_time,
        model=type(model).__name__,
        fingerprint=shared_print,
        metric=chosen.name,
        images=images_of(ours),
        held_out_images=images_of(held),
        batch=ours[0].images,
        device=str(device),
        budget=budget,
        options={k: v for k, v in wanted.to_dict().items() if k in options},
        seed=seed,
        study=name,
        interrupted=interrupted,
        doubts=evaluator.doubts,
        refused=shared.refused,
        left_out=run.left_out(),
    )


def _fingerprint(model: nn.Module, shared: SharedGraph) -> str:
    """Of the author's graph, modules and state; the values of weights have no part in it."""
    return fingerprint(
        numbered_lines(shared.graph), module_lines(model), state_lines(model.state_dict())
    )


def _held_out(evaluator: Evaluator, front: Iterable[Candidate]) -> tuple[Candidate, ...]:
    """The same plans with their quality on images that had no part in choosing them."""
    scored = []
    for one in front:
        found = evaluator.evaluate(one.plan)
        assert found is not None
        _, quality = found
        scored.append(replace(one, held_out=quality.mean, held_out_spread=quality.spread))
    return tuple(scored)


def _timed(
    model: nn.Module,
    front: tuple[Candidate, ...],
    batch: Batch,
    options: dict[str, Any],
    limit: float | None,
) -> tuple[float, tuple[Candidate, ...]]:
    """The model's own time, and the same plans with theirs, in ms; none that takes longer than the limit."""
    own_time, *times = milliseconds(model, [one.plan for one in front], batch, options)
    timed = (replace(one, milliseconds=ms) for one, ms in zip(front, times, strict=True))
    return own_time, tuple(
        one for one in timed if limit is None or (one.milliseconds or 0.0) <= limit
    )


def _study_name(
    model: nn.Module,
    shared_print: str,
    metric: Metric,
    options: Options,
    numbers: tuple[Any, ...],
    batches: Iterable[Batch],
) -> str:
    """A name that is the same only for the same model, weights, images and arguments."""
    digest = hashlib.sha256(shared_print.encode())
    digest.update(repr((metric.name, options.to_dict(), numbers)).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + sample(tensor))
    for content in contents(batches):
        digest.update(content)
    return f"skipvit-{type(model).__name__}-{digest.hexdigest()[:16]}"


# -- arguments --------------------------------------------------------------------------------------------------------


def _check_numbers(stages: Any, trials: Any, holdout: Any, seed: Any) -> None:
    for name, value, least in (("stages", stages, 1), ("trials", trials, 0), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise SearchError(
                f"{name} must be an integer of {least} or more, got {value!r}",
                hint=f"pass a larger {name}" if isinstance(value, int) else f"pass {name}={least}",
            )
    if isinstance(holdout, bool) or not isinstance(holdout, int | float) or not 0 <= holdout < 1:
        raise SearchError(
            f"holdout must be a share in [0, 1), got {holdout!r}",
            hint="pass 0.5 to hold out half of the images, or 0 for none",
        )


def _device(model: nn.Module) -> torch.device:
    device = floating_like(model).device
    if device.type == "meta":
        raise SearchError(
            "the model is on the meta device", hint="plans are tried: load its weights first"
        )
    return device


def _budget(value: Any, measure: bool) -> tuple[float, float | None]:
    """The share of multiply-adds, and the milliseconds, that a budget allows."""
    if value is None:
        return math.inf, None
    if isinstance(value, str) and value.strip().endswith("ms"):
        number = value.strip().removesuffix("ms")
        try:
            limit = float(number)
        except ValueError:
            limit = math.nan
        if 0 < limit < math.inf and not measure:
            raise SearchError(
                "a budget in milliseconds needs measured times", hint="pass measure=True"
            )
        if 0 < limit < math.inf:
            return math.inf, limit
    elif isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1:
        return float(value), None
    raise SearchError(
        f"budget must be a share of the model's multiply-adds in (0, 1], or milliseconds, got {value!r}",
        hint="pass budget=0.7 or budget='12ms'",
    )


def _metric(value: Any) -> Metric:
    if callable(value) or value in METRICS:
        return Metric(value)
    raise SearchError(
        f"metric must be one of {', '.join(map(repr, METRICS))}, or a function, got {value!r}",
        hint="pass one of these, or a function of outputs and batch that returns a number or one per image",
    )


def _options(given: dict[str, Any]) -> Options:
    known = {field.name for field in fields(Options)} - {"plan", "train_only"}
    if unknown := sorted(given.keys() - known):
        raise TypeError(f"search() got an unexpected keyword argument {unknown[0]!r}")
    return Options(Plan(), **given)
