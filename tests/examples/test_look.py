"""The example notebook, run from its first cell to its last."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOK = EXAMPLES / "look.ipynb"


def shown(notebook: Any) -> list[list[str]]:
    """Of every cell of code, the kinds of what it shows."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [sorted(kind for out in cell.outputs for kind in out.get("data", {})) for cell in cells]


def read() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)  # type: ignore[no-untyped-call]


def test_it_was_executed() -> None:
    notebook = read()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [kind for part in shown(notebook) for kind in part]
    assert kinds.count("text/html") == 3
    assert kinds.count("image/png") == 2
    assert NOTEBOOK.stat().st_size < 500_000


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_it_runs(tmp_path: Path) -> None:
    shutil.copytree(EXAMPLES / "images", tmp_path / "images")
    stored, notebook = read(), read()
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    assert shown(notebook) == shown(stored)
    assert (tmp_path / "report.html").stat().st_size > 50_000
