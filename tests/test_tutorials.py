"""What docs/writing-a-rule.md and docs/writing-a-pass.md show is what happens."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import skipvit_fx.analysis.rules.shape
import support.tiny
from analysis.test_rules import check
from skipvit_fx import UnsupportedModelError
from skipvit_fx.analysis.rules.call import RULES
from skipvit_fx.options import Options
from skipvit_fx.passes import passes_for
from skipvit_fx.rewriting.passes import Pass
from support import rule_cases

DOCS = Path(__file__).resolve().parents[1] / "docs"
OPERATOR = torch.ops.aten.unfold


def blocks(page: str) -> list[str]:
    """The Python code of a page."""
    return re.findall(r"```python\n(.*?)```", shown(page), re.DOTALL)


def shown(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def run(code: str, module: Any) -> None:
    """Run code as if it stood at the end of a module."""
    exec(code, dict(vars(module)))


@pytest.fixture
def without_rule() -> Iterator[None]:
    """The rule of the page's operator, and its cases, are as they were afterwards."""
    assert OPERATOR not in RULES, "the page needs another operator that has no rule"
    yield
    RULES.pop(OPERATOR, None)
    rule_cases.SPECIAL.pop(OPERATOR, None)


def outcomes() -> list[Any]:
    return [found for case in rule_cases.cases_of(OPERATOR) if (found := check(case))]


@pytest.mark.usefixtures("without_rule")
@pytest.mark.slow
def test_a_rule(capsys: pytest.CaptureFixture[str]) -> None:
    page = shown("writing-a-rule.md")
    script, wrong, right, cases, entry = blocks("writing-a-rule.md")
    with pytest.raises(UnsupportedModelError) as refused:
        exec(script, {"__name__": "script"})
    assert all(line.strip() in page for line in str(refused.value).splitlines())
    run(wrong, skipvit_fx.analysis.rules.shape)
    failures = [str(found) for found in outcomes() if found.failure]
    told = [line[1:].strip() for line in page.splitlines() if line.startswith("E  ")]
    assert told
    assert all(any(line.startswith(failure) for failure in failures) for line in told)
    run(right, skipvit_fx.analysis.rules.shape)
    assert not any(found.failure for found in outcomes())
    run(cases + entry, rule_cases)
    counts = Counter(found.verdict for found in outcomes())
    assert f"{OPERATOR} {' '.join(f'{k} {n}' for k, n in sorted(counts.items()))}\n" in page
    exec(script, {"__name__": "script"})
    assert capsys.readouterr().out.splitlines()[1] in page


@pytest.mark.slow
def test_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    file, tests = blocks("writing-a-pass.md")
    module = ModuleType("skipvit_fx.passes.cancel_transposes")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(file, vars(module))

    def with_it(options: Options) -> tuple[Pass, ...]:
        *others, last = passes_for(options)
        return (*others, module.CancelTransposes(), last)

    monkeypatch.setattr(support.tiny, "passes_for", with_it)
    of_the_page = ModuleType("test_cancel_transposes")
    exec(tests, vars(of_the_page))
    found = [test for name, test in vars(of_the_page).items() if name.startswith("test_")]
    assert f"{len(found)} passed" in shown("writing-a-pass.md")
    for test in found:
        test()
