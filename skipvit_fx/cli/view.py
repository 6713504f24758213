"""The command ``skipvit view``."""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

import skipvit_fx
from skipvit_fx.cli.models import SpecError
from skipvit_fx.cli.options import (
    Cut,
    Depth,
    ImgSize,
    Json,
    KeepDead,
    Model,
    PlanText,
    PrefixTokens,
    Pretrained,
    Score,
    Validate,
    build,
    rewritten,
    show,
)
from skipvit_fx.plan import Plan
from skipvit_fx.reports.inspection_report import Inspection
from skipvit_fx.reports.model_explorer import write_json

Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="write the JSON here and open nothing", show_default=False),
]


def view(
    model: Model,
    plan: PlanText,
    out: Out = None,
    img_size: ImgSize = None,
    depth: Depth = None,
    pretrained: Pretrained = False,
    prefix_tokens: PrefixTokens = None,
    cut: Cut = "attention",
    score: Score = "auto",
    keep_dead_tokens: KeepDead = False,
    validate: Validate = True,
    as_json: Json = False,
) -> None:
    """Open a rewritten graph in Google's Model Explorer, or write or print the JSON that it reads."""
    wanted = Plan.parse(plan)
    explorer = _explorer() if out is None and not as_json else None
    built = build(model, img_size, depth, pretrained)
    fast = rewritten(built, wanted, prefix_tokens, cut, score, keep_dead_tokens, validate)
    report = skipvit_fx.inspect(fast)
    files = [] if out is None else _write(report, out)
    if files or as_json:
        said = "\n".join(f"written to {file}" for file in files)
        show(report.to_model_explorer(), said, as_json)
    if explorer is not None:
        _open(explorer, report)


def _explorer() -> ModuleType:
    """Model Explorer.

    Raises:
        SpecError: it is not installed.
    """
    try:
        return importlib.import_module("model_explorer")
    except ModuleNotFoundError as error:
        raise SpecError(
            f"the graph is shown by ai-edge-model-explorer, and {error.name} is not installed",
            hint="pip install 'skipvit_fx[view]', or write the file that it reads with --out FILE",
        ) from error


def _open(explorer: ModuleType, report: Inspection) -> None:
    """Show the graph until the command is interrupted; the files are only for the server, which reads them."""
    with tempfile.TemporaryDirectory(prefix="skipvit-") as folder:
        graph, *data = _write(report, Path(folder) / f"{report.model}.json")
        config = explorer.config().add_model_from_path(str(graph))
        for file in data:
            config.add_node_data_from_path(str(file))
        explorer.visualize_from_config(config)


def _write(report: Inspection, path: Path) -> list[Path]:
    """Write the graph, and beside it the data of its nodes, each in a file of its own."""
    written = {path: report.to_model_explorer()}
    for name, data in report.model_explorer_data().items():
        written[path.with_name(f"{path.stem}.{name.replace(' ', '-')}.json")] = data
    for file, content in written.items():
        write_json(content, file)
    return list(written)
