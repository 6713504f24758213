"""What is known about ATC, read from ``atc_rules.json``: rules and the operator table."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from skipvit_fx.errors import ExportError

Level = Literal["fail", "slow", "unknown", "note"]
LEVELS: tuple[Level, ...] = ("fail", "slow", "unknown", "note")


@dataclass(frozen=True)
class Rule:
    """One known fact.

    Attributes:
        id: stable name.
        level: ``fail``, ``slow``, ``unknown`` (no public fact decides it) or ``note`` (advice).
        title, advice: what is wrong, and what helps.
        source: where it is documented.
        check: name of the function that checks for it.
        below: the rule holds for CANN releases before this one; ``None`` for all.
        params: parameters of the check.
    """

    id: str
    level: Level
    title: str
    advice: str
    source: str
    check: str
    below: str | None = None
    params: dict[str, Any] = field(default_factory=dict)

    def applies(self, cann: str) -> bool:
        """Whether the rule is known to hold for this release."""
        return self.below is None or release_key(cann) < release_key(self.below)


@dataclass(frozen=True)
class Support:
    """What the table says about one operator at one opset and release.

    Attributes:
        answer: ``yes``, ``no``, ``none`` (no plugin in any release), ``between`` (the nearest releases before and after
            accept it, nothing is public about this one) or ``unknown``.
        why: the facts, in words.
    """

    answer: Literal["yes", "no", "none", "between", "unknown"]
    why: str


@dataclass(frozen=True)
class Knowledge:
    """Everything in the file."""

    about: str
    releases: tuple[str, ...]
    socs: tuple[str, ...]
    soc_families: tuple[str, ...]
    rules: tuple[Rule, ...]
    operators: dict[str, dict[str, Any]]

    def support(self, operator: str, opset: int, cann: str) -> Support:
        """Whether release ``cann`` accepts ``operator`` in a model of ``opset``, as far as this is public."""
        entry = self.operators.get(operator)
        if entry is None:
            return Support("unknown", "not in the table")
        if "none" in entry:
            return Support("none", entry["none"])
        table: dict[str, str | None] = entry["opsets"]
        range_ = table.get(cann)
        if range_ is not None:
            inside = opset in opsets_in(range_)
            return Support("yes" if inside else "no", f"CANN {cann} takes opsets {range_}")
        public = {release: text for release, text in table.items() if text is not None}
        before = [r for r in public if release_key(r) < release_key(cann)][-1:]
        after = [r for r in public if release_key(r) > release_key(cann)][:1]
        if not before + after:
            return Support("unknown", "no release that was read says so")
        facts = f"nothing public for CANN {cann}; " + ", ".join(
            f"{release} takes opsets {public[release]}" for release in before + after
        )
        taken = all(opset in opsets_in(public[release]) for release in before + after)
        return Support("between" if before and after and taken else "unknown", facts)


@cache
def knowledge() -> Knowledge:
    """The facts in this package's file, sorted by release."""
    text = files("skipvit_fx.ascend").joinpath("atc_rules.json").read_text(encoding="utf-8")
    data = json.loads(text)
    rules = []
    for entry in data["rules"]:
        entry["below"] = entry.pop("cann", {}).get("below")
        rules.append(Rule(**entry))
    for operator in data["operators"].values():
        table = operator["opsets"]
        operator["opsets"] = {r: table[r] for r in sorted(table, key=release_key)}
    return Knowledge(
        data["about"],
        tuple(data["releases"]),
        tuple(data["socs"]),
        tuple(data["soc_families"]),
        tuple(rules),
        data["operators"],
    )


def release_key(release: str) -> tuple[tuple[int, ...], int, int]:
    """Orders CANN releases: 8.0.RC3 before 8.0.0, 9.2.0-beta.2 before 9.2.0.

    Raises:
        ExportError: that is not a release.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)*)(?:[.-](RC|alpha|beta)\.?(\d+(?:\.\d+)*))?", release)
    if match is None:
        raise ExportError(
            f"{release!r} is not a CANN release", hint="write it like 8.0.0, 8.0.RC3 or 9.1.0"
        )
    numbers = tuple(int(n) for n in match[1].split("."))
    numbers += (0,) * (4 - len(numbers))
    stage = {None: 9, "alpha": 0, "beta": 1, "RC": 2}[match[2]]
    return numbers, stage, int((match[3] or "0").split(".")[0])


def opsets_in(text: str) -> frozenset[int]:
    """The opsets in ``"8-13"`` or ``"9,11,12"``."""
    found: set[int] = set()
    for part in text.split(","):
        low, _, high = part.partition("-")
        found.update(range(int(low), int(high or low) + 1))
    return frozenset(found)
