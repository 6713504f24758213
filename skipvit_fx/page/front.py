"""Writes the report of a search: its front as a plot, and what each plan of it does to some images."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from skipvit_fx.api import rewrite
from skipvit_fx.arguments import check_model
from skipvit_fx.capture.example import floating_like
from skipvit_fx.errors import ReportError
from skipvit_fx.files import check_folder
from skipvit_fx.graph.module import SkipViTModule
from skipvit_fx.graph.record import record_of
from skipvit_fx.page.answers import Answer
from skipvit_fx.page.data import map_data, pictures_of, plan_data
from skipvit_fx.page.front_plot import plots_of
from skipvit_fx.page.front_summary import (
    front_rows,
    plan_figures,
    search_figures,
    sensitivity,
    validated_by,
)
from skipvit_fx.page.inputs import Inputs, inputs_of
from skipvit_fx.page.runs import run
from skipvit_fx.page.summary import Figure, spans_in_words, unit_of
from skipvit_fx.page.writing import page_template, write
from skipvit_fx.planner.result import MEANS, Candidate, SearchResult
from skipvit_fx.reports.environment import device_name, versions
from skipvit_fx.reports.inspection import inspect

SCRIPTS = ("patches.js", "copy.js", "front.js")
STYLES = ("page.css", "patches.css", "front.css")
SHOWN_FIRST = 0.75
"""Without a budget, the page opens with the best plan that has at most this share of the multiply-adds."""


@dataclass(frozen=True)
class ShownPlan:
    """One plan of the front on the images of the page.

    Attributes:
        plan: in its notation.
        call: the call that makes it.
        words: what it does.
        figures: what is known of it.
        answers: one per image.
        data: its stages, and for each image what they kept.
    """

    plan: str
    call: str
    words: list[str]
    figures: tuple[Figure, ...]
    answers: tuple[Answer, ...]
    data: dict[str, Any]


def report_search(
    result: SearchResult,
    model: nn.Module,
    images: Any,
    path: str | os.PathLike[str],
    *,
    title: str | None = None,
    note: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write what a search found as one HTML file to look at in a browser: choose a plan, and see it on these images.

    It shows what was searched; quality over multiply-adds and over measured time, with the standard errors and the
    quality on the images held out; for every plan of the front its notation, its figures, and which patches of each
    image are kept at every stage; and the sensitivity of the layers. Nothing is loaded from elsewhere.

    Each plan is rewritten once more, with the options of the search, run on the images, and thrown away. It is not
    validated again if the search did so, and the page says which.

    Args:
        result: what :func:`skipvit_fx.search` returned.
        model: the model that it was called with, with the same weights. It is used in eval mode, and is not changed.
        images: as for :func:`skipvit_fx.report`. A few are enough: they show what the plans do, and change no figure of
            the search.
        path: of the file. It appears complete or not at all.
        title: name of the model; by default that of its class.
        note: a sentence for whoever reads it, such as where the weights are from.
        progress: called after each plan with the number done and their total.

    Returns:
        The path.

    Raises:
        ReportError: the front is empty, a plan has other multiply-adds than in the search, so that the model or the
            size of the images is another one, or something is as for :func:`skipvit_fx.report`.
        PlanError: the search was made with a score that is a function and is not registered.
        TypeError: ``model`` is not a module, ``result`` not the result of a search, or ``images`` is not as there.
        SkipViTError: the model does not run on the images.
    """
    _check(result, model)
    target = Path(path)
    check_folder(target, ReportError)
    template = page_template("front.html.j2", styles=STYLES, scripts=SCRIPTS)
    inputs = inputs_of(model, images)
    shown: list[ShownPlan] = []
    where: dict[str, Any] = {}
    for number, one in enumerate(result.front, start=1):
        fast = _rewritten(result, one, model, inputs)
        shown.append(_shown(result, one, fast, inputs, where))
        if progress is not None:
            progress(number, len(result.front))
    html = template.render(
        title=title or result.model,
        note=note,
        means=MEANS,
        result=result,
        figures=search_figures(result),
        plots=plots_of(result),
        rows=front_rows(result),
        sensitivity=sensitivity(result),
        unit=unit_of(result.baseline_macs)[1],
        plans=shown,
        first=_first(result),
        validated=validated_by(result),
        inputs=inputs,
        pictures=pictures_of(model, inputs.image, len(inputs.names)),
        map=where,
        data={"map": where, "plans": [one.data for one in shown], "first": _first(result)},
        made_on=device_name(floating_like(model).device),
        made_with=versions("timm", "transformers", "skipvit_fx"),
    )
    write(target, html)
    return target


def _check(result: Any, model: Any) -> None:
    if not isinstance(result, SearchResult):
        raise TypeError(f"result must be what search() returned, got {type(result).__name__}")
    check_model(model)
    if not result.front:
        raise ReportError(
            "the front of the search is empty, so there is no plan to show",
            hint="search with more trials or a larger budget",
        )


def _rewritten(
    result: SearchResult, one: Candidate, model: nn.Module, inputs: Inputs
) -> SkipViTModule:
    options = dict(result.options)
    if validated_by(result):
        options["validate"] = False
    fast = rewrite(model, one.plan, example_inputs=inputs.call, **options)
    assert isinstance(fast, SkipViTModule)
    return fast


def _shown(
    result: SearchResult, one: Candidate, fast: SkipViTModule, inputs: Inputs, where: dict[str, Any]
) -> ShownPlan:
    """What a plan does to the images. The first one tells where the patches are."""
    record, inspection = record_of(fast), inspect(fast)
    if inspection.macs != one.macs:
        raise ReportError(
            f"with the plan {str(one.plan)!r} this {record.model} has {inspection.macs} multiply-adds for one of these "
            f"images, and had {one.macs} in the search on a {result.model}",
            hint="pass the model that was searched on, and images of the same size",
        )
    runs = run(fast, inputs, rounds=0)
    if not where:
        where |= map_data(record, inputs, runs.grid)
    return ShownPlan(
        str(one.plan),
        _call(result, one),
        spans_in_words(record, inspection, runs),
        plan_figures(result, one, inspection, runs),
        runs.answers,
        plan_data(record, inputs, runs),
    )


def _call(result: SearchResult, one: Candidate) -> str:
    options = "".join(f", {name}={value!r}" for name, value in result.options.items())
    return f'fast = sv.rewrite(model, "{one.plan}"{options})'


def _first(result: SearchResult) -> int:
    """Which plan the page opens with: quality rises along the front."""
    limit = SHOWN_FIRST if result.budget is None else 1.0
    fitting = [one for one in result.front if one.macs <= limit * result.baseline_macs]
    return max(len(fitting) - 1, 0)
