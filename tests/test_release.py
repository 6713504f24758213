"""What a release is made of agrees with itself."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

import skipvit_fx
from readme_example import first_example

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = set(PROJECT["optional-dependencies"])
GITHUB = ROOT / ".github"
WORKFLOWS = sorted(GITHUB.glob("workflows/*.yml"))
PAGES = sorted((ROOT / "docs").rglob("*.md"))


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def parsed(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def commands(workflow: Any) -> str:
    """Everything that its jobs run, with the values of their matrix."""
    said: list[str] = []
    for job in workflow["jobs"].values():
        targets = job.get("strategy", {}).get("matrix", {}).get("target", [""])
        runs = [step.get("run", "") for step in job["steps"]]
        said += [run.replace("${{ matrix.target }}", target) for run in runs for target in targets]
    return "\n".join(said)


def in_navigation(index: str) -> set[str]:
    """The pages that the tables of contents of the site name, and the index."""
    trees = re.findall(r"```\{toctree\}\n(.*?)```", index, re.DOTALL)
    lines = [line for tree in trees for line in tree.splitlines()]
    lines = [line for line in lines if line and not line.startswith(":")]
    return {"index"} | {re.sub(r".*<(.*)>", r"\1", line) for line in lines}


def named_extras(text: str) -> set[str]:
    """The extras in ``skipvit_fx[a,b]`` and ``.[a,b]``, but for what make fills in."""
    found = re.findall(r"(?:skipvit_fx|(?<=['\" ])\.)\[([a-z, -]+)\]", text)
    return {extra.strip() for names in found for extra in names.split(",")}


def test_the_changelog_knows_the_version() -> None:
    assert re.search(
        rf"^## \[{re.escape(PROJECT['version'])}\]", read("CHANGELOG.md"), re.MULTILINE
    )


def test_the_citation_is_of_this_version() -> None:
    citation = parsed(ROOT / "CITATION.cff")
    assert citation["version"] == PROJECT["version"] == skipvit_fx.__version__
    assert citation["license"] == PROJECT["license"]
    assert citation["repository-code"] == PROJECT["urls"]["Homepage"]


def test_every_extra_that_is_named_exists() -> None:
    sources = [*PAGES, ROOT / "README.md", ROOT / "Makefile", ROOT / "pyproject.toml"]
    sources += [*(ROOT / "skipvit_fx").rglob("*.py")]
    named = {path: named_extras(path.read_text(encoding="utf-8")) for path in sources}
    assert named_extras("pip install 'skipvit_fx[a,b]' '.[c]' x[d] skipvit_fx[:2]") == {
        "a",
        "b",
        "c",
    }
    assert set().union(*named.values()) >= {"timm", "onnx", "cli"}
    assert {str(path): extras - EXTRAS for path, extras in named.items() if extras - EXTRAS} == {}


def test_every_extra_is_described() -> None:
    rows = re.findall(r"^\| `([a-z]+)` \|", read("docs/support.md"), re.MULTILINE)
    assert set(rows) == EXTRAS


def test_the_oldest_is_the_floor() -> None:
    """What `make test-oldest` installs is what pyproject.toml allows."""
    lines = [line for line in read("tests/oldest.txt").splitlines() if not line.startswith("#")]
    oldest = dict(line.split("==") for line in lines)
    required = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["demo"]]
    for requirement in map(Requirement, required):
        if requirement.name in oldest:
            floor = str(requirement.specifier).removeprefix(">=")
            assert oldest.pop(requirement.name).removesuffix(".0") == floor
            assert f"{requirement.name} {floor}" in re.sub(r" \| ", " ", read("docs/support.md"))
    assert not oldest


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_what_a_person_runs(path: Path) -> None:
    run = commands(parsed(path))
    assert re.search(r"^make test$", run, re.MULTILINE)
    targets = set(re.findall(r"^([a-z][a-z-]*):", read("Makefile"), re.MULTILINE))
    assert set(re.findall(r"make ([a-z-]+)", run)) <= targets
    assert "make test-oldest" in run or "make dist" in run


def test_pythons_that_are_claimed_are_tested() -> None:
    pythons = parsed(GITHUB / "workflows" / "test.yml")["jobs"]["test"]["strategy"]["matrix"]
    prefix = "Programming Language :: Python :: "
    claimed = [
        c.removeprefix(prefix) for c in PROJECT["classifiers"] if c.startswith(prefix + "3.")
    ]
    assert pythons["python"] == claimed
    assert PROJECT["requires-python"] == f">={claimed[0]}"


def test_other_files_are_yaml() -> None:
    files = [*GITHUB.glob("ISSUE_TEMPLATE/*.yml"), GITHUB / "dependabot.yml"]
    files.append(ROOT / ".pre-commit-config.yaml")
    assert len(files) == 5
    assert all(parsed(path) for path in files)
    assert "skipvit sites" in (GITHUB / "ISSUE_TEMPLATE" / "refused-model.yml").read_text("utf-8")


def test_every_page_is_in_the_navigation() -> None:
    pages = {path.relative_to(ROOT / "docs").with_suffix("").as_posix() for path in PAGES}
    assert in_navigation(read("docs/index.md")) == pages
    assert in_navigation("```{toctree}\n:hidden:\n\na\nShort <b/c>\n```\nd\n") == {
        "index",
        "a",
        "b/c",
    }


def test_every_public_name_is_in_the_reference() -> None:
    shown = re.findall(
        r"^\.\. (?:auto\w+|py:data):: skipvit_fx\.(\w+)$", read("docs/api.md"), re.MULTILINE
    )
    assert set(shown) - {"testing"} == set(skipvit_fx.__all__)


def test_the_example_of_a_wheel_is_the_first() -> None:
    code = first_example(read("README.md"))
    assert code.startswith("import timm\n")
    assert "sv.rewrite(" in code
    compile(code, "README.md", "exec")
