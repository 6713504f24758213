"""``skipvit atc-check``: what is publicly known about a file and Ascend's converter, without running it."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from skipvit_fx.ascend.knowledge import LEVELS, Level, Rule, knowledge, release_key
from skipvit_fx.errors import ExportError

CANN = "8.0.0"
SOC = "Ascend310P3"

NOT_RUN = "ATC itself was not run. This is a check against public facts; only ATC and a device can confirm it."

_SHOWN = 4


@dataclass(frozen=True)
class Finding:
    """One rule that applies to the file.

    Attributes:
        rule: the rule.
        places: where it applies, one sentence each.
    """

    rule: Rule
    places: tuple[str, ...]

    @property
    def level(self) -> Level:
        """The level of the rule."""
        return self.rule.level

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        rule = self.rule
        return {
            "rule": rule.id,
            "level": rule.level,
            "title": rule.title,
            "places": list(self.places),
            "advice": rule.advice,
            "source": rule.source,
        }


@dataclass(frozen=True, repr=False)
class AtcReport:
    """What is known about a file.

    Attributes:
        path, cann, soc, opset: the checked file and its opset, and the release and chip that it was checked for.
        findings: in order of severity; none of level ``fail`` or ``slow`` means that nothing is known against the file,
            not that ATC was seen to accept it.
        attentions, layer_norms: the number of fusible patterns, and of all that are meant to be fused.
        shapes: the shapes of the inputs.
    """

    path: Path
    cann: str
    soc: str
    opset: int
    findings: tuple[Finding, ...]
    attentions: tuple[int, int]
    layer_norms: tuple[int, int]
    shapes: dict[str, tuple[int | str | None, ...]]

    def moved(self, path: Path) -> AtcReport:
        """The same report for a file that was renamed."""
        return replace(self, path=path)

    @property
    def command(self) -> str:
        """The ATC command to run."""
        return atc_command(self.path, self.soc, self.shapes)

    def of(self, level: Level) -> tuple[Finding, ...]:
        """The findings of one level."""
        return tuple(finding for finding in self.findings if finding.level == level)

    @property
    def clean(self) -> bool:
        """Whether nothing is known to fail or to be slow."""
        return not self.of("fail") and not self.of("slow")

    @property
    def verdict(self) -> str:
        """The result in one sentence."""
        if self.of("fail"):
            return "would fail"
        known = "would be slow" if self.of("slow") else "nothing is known against it"
        unknown = ", ".join(finding.rule.id for finding in self.of("unknown"))
        return f"{known}; unknown: {unknown}" if unknown else known

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "path": str(self.path),
            "cann": self.cann,
            "soc": self.soc,
            "opset": self.opset,
            "verdict": self.verdict,
            "atc_was_run": False,
            "notice": NOT_RUN,
            "findings": [finding.to_dict() for finding in self.findings],
            "attentions": {"fusible": self.attentions[0], "all": self.attentions[1]},
            "layer_norms": {"fusible": self.layer_norms[0], "all": self.layer_norms[1]},
            "atc_command": self.command,
        }

    def to_json(self) -> str:
        """Indented JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def to_sarif(self) -> str:
        """SARIF 2.1.0, for continuous integration."""
        severity = {"fail": "error", "slow": "warning", "unknown": "note", "note": "none"}
        results = [
            {
                "ruleId": finding.rule.id,
                "level": severity[finding.level],
                "message": {"text": f"{finding.level}: {finding.rule.title}: {place}"},
                "locations": [
                    {"physicalLocation": {"artifactLocation": {"uri": self.path.as_posix()}}}
                ],
            }
            for finding in self.findings
            for place in finding.places
        ]
        rules = [
            {
                "id": finding.rule.id,
                "shortDescription": {"text": finding.rule.title},
                "help": {
                    "text": f"{finding.rule.advice}. Source: {finding.rule.source}. {NOT_RUN}"
                },
            }
            for finding in self.findings
        ]
        run = {
            "tool": {"driver": {"name": "skipvit atc-check", "rules": rules}},
            "results": results,
        }
        document = {
            "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
            "version": "2.1.0",
            "runs": [run],
        }
        return json.dumps(document, indent=2)

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        lines = [f"{self.path}: opset {self.opset}, for CANN {self.cann} on {self.soc}"]
        for finding in self.findings:
            lines.append(f"{finding.level:>8}  {finding.rule.id}: {finding.rule.title}")
            lines += [f"            {place}" for place in finding.places[:_SHOWN]]
            if len(finding.places) > _SHOWN:
                lines.append(f"            and {len(finding.places) - _SHOWN} more")
            lines.append(f"            advice: {finding.rule.advice}")
            lines.append(f"            source: {finding.rule.source}")
        lines.append(f"fusible attention {_of(self.attentions)}, LayerNorm {_of(self.layer_norms)}")
        lines.append(f"verdict: {self.verdict}")
        lines.append(NOT_RUN)
        lines.append(f"to run it: {self.command}")
        return "\n".join(lines)


def _of(counts: tuple[int, int]) -> str:
    return f"{counts[0]} of {counts[1]}"


def atc_check(
    path: str | PathLike[str],
    *,
    cann: str = CANN,
    soc: str = SOC,
) -> AtcReport:
    """Check any ONNX file against what is publicly known of ATC. ATC is not run.

    Args:
        path: the file.
        cann: the release of CANN, such as ``"8.0.0"`` or ``"8.0.RC3"``.
        soc: the chip, as ATC's ``--soc_version``.

    Raises:
        ExportError: the file cannot be read, or ``cann`` or ``soc`` is not known.
    """
    try:
        from skipvit_fx.ascend.checks import CHECKS, Case
        from skipvit_fx.ascend.model_facts import read_model
    except ModuleNotFoundError as error:
        raise ExportError(
            f"reading ONNX needs {error.name}", hint="pip install 'skipvit_fx[onnx]'"
        ) from error
    known = knowledge()
    check_target(cann, soc)
    facts = read_model(path)
    case = Case(facts, known, cann)
    findings = []
    for rule in known.rules:
        if rule.applies(cann):
            places = tuple(CHECKS[rule.check](case, rule))
            if places:
                findings.append(Finding(rule, places))
    findings.sort(key=lambda finding: LEVELS.index(finding.level))
    shapes = {value.name: facts.shapes.get(value.name, ()) for value in facts.inputs}
    return AtcReport(
        facts.path,
        cann,
        soc,
        facts.opset,
        tuple(findings),
        (sum(not p.broken for p in case.attentions), len(case.attentions)),
        (sum(not p.broken for p in case.layer_norms), len(case.layer_norms)),
        shapes,
    )


def atc_command(path: Path, soc: str, shapes: dict[str, tuple[int | str | None, ...]]) -> str:
    """The command line for a machine that has ATC; sizes that the file leaves open must be filled in."""
    sizes = ";".join(f"{name}:{','.join(map(_atc_size, shape))}" for name, shape in shapes.items())
    parts = [
        "atc",
        "--framework=5",
        f"--model={path}",
        f"--output={path.with_suffix('')}",
        "--input_format=NCHW",
        f"--input_shape={sizes}",
        f"--soc_version={soc}",
        "--log=error",
    ]
    return shlex.join(parts)


def _atc_size(size: int | str | None) -> str:
    return str(size) if isinstance(size, int) else f"<{size or 'size'}>"


def check_target(cann: str, soc: str) -> None:
    """Check that these are a release and a chip.

    Raises:
        ExportError: one of them is not.
    """
    release_key(cann)
    known = knowledge()
    if soc in known.socs or any(soc.startswith(family) for family in known.soc_families):
        return
    raise ExportError(
        f"{soc!r} is not a known chip",
        hint=f"write 'Ascend' and the chip name that npu-smi info shows: {', '.join(known.socs)}, Ascend910_93xx",
    )
