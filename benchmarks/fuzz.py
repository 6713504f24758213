"""Search at random for a model, a plan and a call for which a rewrite is silently wrong.

`python benchmarks/fuzz.py --cases 10000 --jobs 2 --out docs/results/fuzz.md` runs cases 0 to 9999. Each depends only on
its number, and must be refused or equal the reference of the tests; otherwise it is a failure. Results are kept beside
the page as jsonl, so that an interrupted run continues where it stopped. Failures are shrunk and printed as tests.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fuzzing.cases import FAILURES, Case, Outcome, as_test, draw_case, run, shrink
from skipvit_fx.reports.environment import hardware, versions

TIMEOUT = 60
"""Seconds allowed for a case, which takes well under a second."""

KINDS = ("exact", "refused", "guard", "wrong", "crash", "mute", "invalid", "unjudged", "timeout")
PER_PROCESS = 500
"""Cases after which a process is replaced, as every rewrite makes classes that stay in memory."""


class TimeIsUpError(BaseException):
    """Not an Exception, so that nothing between the alarm and :func:`record` catches it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run, write the page, print failures as tests; return 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="number of the first case")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--out", type=Path, help="the page to write; rows are kept beside it")
    parser.add_argument("--shrink", type=int, default=10, help="failures to shrink and print")
    args = parser.parse_args(argv)
    seeds = range(args.seed, args.seed + args.cases)
    log = args.out.with_suffix(".jsonl") if args.out else None
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    rows = {row["seed"]: row for row in _kept(log) if row["seed"] in seeds}
    if log is not None:  # without a line at which an earlier run was cut off
        log.write_text("".join(json.dumps(row) + "\n" for row in rows.values()), encoding="utf-8")
    try:
        for row in _progress(
            run_all([s for s in seeds if s not in rows], args.jobs), rows, len(seeds)
        ):
            rows[row["seed"]] = row
            if log is not None:
                with log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
    except KeyboardInterrupt:
        print("interrupted; run it again to continue", file=sys.stderr)
    done = [rows[seed] for seed in sorted(rows)]
    text = page(done)
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    else:
        print(text)
    failed = [row["seed"] for row in done if row["outcome"] in FAILURES]
    _quiet()
    for seed in failed[: args.shrink]:
        print(as_test(shrink(draw_case(seed))), flush=True)
    return 1 if failed else 0


def _kept(log: Path | None) -> Iterator[dict[str, Any]]:
    if log is not None and log.exists():
        for line in log.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:  # the line at which a run was cut off
                continue


def _progress(
    new: Iterable[dict[str, Any]], kept: dict[int, dict[str, Any]], total: int
) -> Iterator[dict[str, Any]]:
    """The rows as they arrive, with a progress bar on stderr."""
    count = Counter(row["outcome"] for row in kept.values())
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=total, completed=len(kept))
        for row in new:
            count[row["outcome"]] += 1
            said = ", ".join(f"{count[kind]} {kind}" for kind in KINDS if count[kind])
            progress.update(task, advance=1, description=said)
            yield row


# -- running --------------------------------------------------------------------------------------------------------


def record(seed: int) -> dict[str, Any]:
    """Run a case, and return a row with its outcome."""
    case = draw_case(seed)
    before = signal.signal(signal.SIGALRM, _alarm)
    signal.alarm(TIMEOUT)
    try:
        outcome = run(case)
    except TimeIsUpError:
        outcome = Outcome("timeout", f"more than {TIMEOUT} s")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return row_of(case, outcome)


def row_of(case: Case, outcome: Outcome) -> dict[str, Any]:
    """The row that is kept for a case."""
    kept = {"seed": case.seed, "model": case.model.kind, "outcome": outcome.kind}
    return kept | {"reason": outcome.reason, "error": outcome.error}


def _alarm(_signal: int, _frame: FrameType | None) -> None:
    raise TimeIsUpError


def _quiet() -> None:
    """Use one thread per process, and suppress warnings of models that are odd on purpose."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)


def run_all(seeds: Sequence[int], jobs: int) -> Iterator[dict[str, Any]]:
    """Rows, in order of completion."""
    if jobs < 2:
        _quiet()
        yield from map(record, seeds)
        return
    waiting = list(reversed(seeds))
    while waiting:
        yield from _pool(waiting, jobs)


def _pool(waiting: list[int], jobs: int) -> Iterator[dict[str, Any]]:
    """Rows of some of the waiting seeds, until all are done or a process dies, and then those that ran in it."""
    context = multiprocessing.get_context("spawn")
    running: dict[Future[dict[str, Any]], int] = {}
    with ProcessPoolExecutor(
        jobs, mp_context=context, initializer=_quiet, max_tasks_per_child=PER_PROCESS
    ) as pool:
        while waiting or running:
            while waiting and len(running) < 2 * jobs:
                seed = waiting.pop()
                running[pool.submit(record, seed)] = seed
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                seed = running.pop(future)
                try:
                    yield future.result()
                except BrokenProcessPool:
                    yield _died(seed)
                    waiting += running.values()
                    return


def _died(seed: int) -> dict[str, Any]:
    """The row of a case whose process ended; it may not be the cause, so it is run again on its own."""
    process = multiprocessing.get_context("spawn").Process(target=record, args=(seed,))
    process.start()
    process.join()
    if process.exitcode == 0:
        return record(seed)
    return row_of(draw_case(seed), Outcome("crash", f"the process ended with {process.exitcode}"))


# -- the page -------------------------------------------------------------------------------------------------------


def page(rows: Sequence[dict[str, Any]]) -> str:
    """Outcomes by kind of model, refusals by reason."""
    kinds = sorted({row["model"] for row in rows})
    count = Counter((row["model"], row["outcome"]) for row in rows)
    shown = [
        kind for kind in KINDS if any(row["outcome"] == kind for row in rows) or kind == "wrong"
    ]
    seeds = f"{rows[0]['seed']} to {rows[-1]['seed']}" if rows else "none"
    lines = [
        "# Fuzzing",
        "",
        "Random models, plans, options and calls, each drawn from one number. A case is exact (equal to the reference",
        "of the tests, which shares no code with the compiler), refused by name, or stopped by a guard when it is",
        "called. Wrong would be a result that differs silently, crash an exception that is not a refusal, mute a",
        "refusal without a hint. Invalid are models that do not run on their own, unjudged those that the reference",
        "cannot run.",
        "",
        _line(["model", *shown, "all"]),
        _line(["---"] + ["---:"] * (len(shown) + 1)),
    ]
    for kind in kinds:
        counts = [count[kind, outcome] for outcome in shown]
        lines.append(_line([kind, *counts, sum(counts)]))
    totals = [sum(count[kind, outcome] for kind in kinds) for outcome in shown]
    lines.append(_line(["all", *totals, sum(totals)]))
    worst = max((row["error"] for row in rows if row["outcome"] == "exact"), default=0.0)
    lines += ["", f"Largest relative error of exact cases: {worst:.1g}.", ""]
    for outcome in [kind for kind in shown if kind != "exact"]:
        reasons = Counter(row["reason"] for row in rows if row["outcome"] == outcome)
        if reasons:
            lines += [f"## {outcome.capitalize()}", "", _line(["reason", "cases"]), "|---|---:|"]
            ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
            lines += [_line([reason.replace("|", "\\|"), n]) for reason, n in ordered]
            lines.append("")
    made = f"Seeds {seeds}. {hardware()}; {versions('timm', 'transformers', 'skipvit_fx')}."
    return "\n".join([*lines, made, "", "Written by `python benchmarks/fuzz.py`.", ""])


def _line(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    sys.exit(main())
