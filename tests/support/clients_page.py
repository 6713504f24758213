"""Writes docs/clients.md out of the tests that are marked with what they show: a row for each client and use.

`python -m pytest -m client --clients-page=docs/clients.md` runs all of them and writes the page.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from skipvit_fx.reports.environment import hardware, versions

HEAD = """# Does it work with ...?

What people do with a Vision Transformer, done with a rewritten one and with the author's. Each row is a test: "works"
says that both agree, within rounding, where nothing is skipped, and that the rewritten one computes with skipping where
it should. Small models with random weights, on the CPU.
"""


@dataclass
class Row:
    """A use of a client.

    Attributes:
        shows: what the test shows where it passes.
        caveat: what to know besides.
        outcomes: of all cases, by name: passed, failed or why it was skipped.
    """

    shows: str
    caveat: str
    outcomes: list[str] = field(default_factory=list)

    @property
    def result(self) -> str:
        """In a word."""
        if "failed" in self.outcomes:
            return "**fails**"
        others = [outcome for outcome in self.outcomes if outcome != "passed"]
        return f"not run: {others[0]}" if others else self.shows


class ClientsPage:
    """Collects the outcomes of marked tests."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[tuple[str, str], Row] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: Any) -> Any:
        report = yield
        marks = list(item.iter_markers("client"))
        if marks and (report.when == "call" or report.outcome != "passed"):
            mark = marks[0]
            spec = getattr(item, "callspec", None)
            what = mark.args[1].format(case=spec.id if spec else "")
            caveat = mark.kwargs.get("caveat", "")
            if isinstance(caveat, dict):
                caveat = caveat.get(spec.id if spec else "", "")
            new = Row(mark.kwargs.get("shows", "works"), caveat)
            row = self.rows.setdefault((mark.args[0], what), new)
            skipped = report.outcome == "skipped" and isinstance(report.longrepr, tuple)
            row.outcomes.append(report.longrepr[2] if skipped else report.outcome)
        return report

    def pytest_sessionfinish(self) -> None:
        lines = [HEAD, "| client | what was done | result | to know |", "|---|---|---|---|"]
        lines += [
            f"| {client} | {what} | {row.result} | {row.caveat} |"
            for (client, what), row in sorted(
                self.rows.items(), key=lambda item: item[0][0].lower()
            )
        ]
        lines += ["", f"{hardware()}; {versions(*TOOLS)}.", ""]
        lines += ["Written by `python -m pytest -m client --clients-page=docs/clients.md`.", ""]
        self.path.write_text("\n".join(lines), encoding="utf-8")


TOOLS = (
    "timm",
    "transformers",
    "peft",
    "accelerate",
    "lightning",
    "torchao",
    "bitsandbytes",
    "nncf",
    "openvino",
    "open_clip_torch",
    "skipvit_fx",
)
"""Distributions whose versions stand on the page."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--clients-page", type=Path, help="write what tests marked client show to this page"
    )


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("clients_page", None)
    if path is not None:
        config.pluginmanager.register(ClientsPage(path))
