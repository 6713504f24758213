"""Lets tests import the helpers that lie beside them, whatever pytest's import mode, and keeps the quick run quick."""

from __future__ import annotations

import sys
from collections.abc import Hashable
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS), str(TESTS.parent / "benchmarks")]

pytest_plugins = ["support.clients_page"]

QUICK_CASES = 2
"""So many cases of a parametrised test run where slow tests do not, spread over all of them; the others are slow.

Tests of few milliseconds a case run all of them: ``pytestmark = pytest.mark.every_case``.
"""


@pytest.hookimpl(tryfirst=True)  # before slow tests are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    cases: dict[Hashable, list[pytest.Function]] = {}
    for item in items:
        if isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            if item.get_closest_marker("every_case") or item.get_closest_marker("slow"):
                continue
            cases.setdefault((item.path, item.cls, item.originalname), []).append(item)
    for group in cases.values():
        if len(group) > QUICK_CASES:
            step = (len(group) - 1) / (QUICK_CASES - 1)
            quick = {round(i * step) for i in range(QUICK_CASES)}
            for i, item in enumerate(group):
                if i not in quick:
                    item.add_marker(pytest.mark.slow)
