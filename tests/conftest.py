"""Lets tests import the helpers that lie beside them, whatever pytest's import mode, and keeps the quick run quick."""

from __future__ import annotations

import gc
import sys
import zlib
from collections.abc import Hashable
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS), str(TESTS.parent / "benchmarks")]

pytest_plugins = ["support.browser", "support.clients_page"]


def pytest_collection_finish() -> None:
    """All libraries are loaded now: spare Python's garbage collector from looking through them all the time."""
    gc.set_threshold(50_000, 20, 20)


@pytest.hookimpl(tryfirst=True)  # before slow tests are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a parametrised test one case runs where slow tests do not, the others are slow.

    Which one it is depends on the test's name, so that the tests of one family of cases together try most of them.
    Tests of a few milliseconds per case run all: ``pytestmark = pytest.mark.every_case``.
    """
    items.sort(
        key=lambda item: item.path.name != "test_readme.py"
    )  # the longest, not to be waited for at the end
    cases: dict[Hashable, list[pytest.Function]] = {}
    for item in items:
        if isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            if item.get_closest_marker("every_case") or item.get_closest_marker("slow"):
                continue
            cases.setdefault((item.path, item.cls, item.originalname), []).append(item)
    for group in cases.values():
        quick = zlib.crc32(group[0].originalname.encode()) % len(group)
        for i, item in enumerate(group):
            if i != quick:
                item.add_marker(pytest.mark.slow)
