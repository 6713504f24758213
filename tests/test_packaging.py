"""What is declared is what is there, and what is built contains the passes."""

import ast
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
OPTIONAL = {"timm", "torchvision", "transformers", "onnx", "onnxruntime", "onnxscript", "rich"}
OPTIONAL |= {"jinja2", "matplotlib", "optuna", "PIL"}

LAYERS = [
    *(
        "errors",
        "files",
        "optional",
        "names",
        "torch_internals",
        "differences",
        "arguments",
        "plan",
        "scores",
        "options",
    ),
    "methods",
    *("ops", "author", "graph", "capture", "analysis", "rewriting", "passes"),
    *("reports", "reference", "validation", "api", "planner", "saving", "testing", "training"),
    "page",
    *("ascend", "export", "__init__", "cli", "__main__"),
]
"""Every package, and every module outside a package, from the lowest up."""


def packages_in_the_tree(root: Path) -> set[str]:
    """Every directory with Python files, under the name that it is imported by."""
    engine = {file.parent for file in (root / "skipvit_fx").rglob("*.py")}
    passes = {file.parent for file in (root / "passes").rglob("*.py")}
    link = root / "skipvit_fx" / "passes"
    names = {path.relative_to(root) for path in engine if not path.is_relative_to(link)}
    names |= {"skipvit_fx" / path.relative_to(root) for path in passes}
    return {".".join(name.parts) for name in names}


def upward_imports(root: Path) -> list[str]:
    """Every import within the package that points from a lower layer to a higher one."""
    found = []
    for file in sorted([*root.glob("skipvit_fx/**/*.py"), *root.glob("passes/**/*.py")]):
        layer = file.relative_to(root).with_suffix("").as_posix().removeprefix("skipvit_fx/")
        layer = layer.partition("/")[0]
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            match node:
                case ast.Import(names=names):
                    imported = [name.name for name in names]
                case ast.ImportFrom(module=str(module), names=names):
                    imported = [f"{module}.{name.name}" for name in names]
                case _:
                    continue
            for name in imported:
                package, _, rest = name.partition(".")
                target = rest.partition(".")[0] or "__init__"
                if package != "skipvit_fx":
                    continue
                if LAYERS.index(target) > LAYERS.index(layer):
                    found.append(f"{file.relative_to(root)}:{node.lineno}: {layer} -> {target}")
    return found


def run_python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False
    )


def test_declared_packages_are_the_tree() -> None:
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == packages_in_the_tree(ROOT)


def test_an_undeclared_package_is_seen(tmp_path: Path) -> None:
    for file in ("skipvit_fx/a.py", "skipvit_fx/deep/er/b.py", "passes/c.py", "passes/sub/d.py"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    (tmp_path / "skipvit_fx/passes").symlink_to("../passes")
    assert packages_in_the_tree(tmp_path) == {
        "skipvit_fx",
        "skipvit_fx.deep.er",
        "skipvit_fx.passes",
        "skipvit_fx.passes.sub",
    }


def test_every_package_has_an_init() -> None:
    for name in PYPROJECT["tool"]["setuptools"]["packages"]:
        assert (ROOT / name.replace(".", "/") / "__init__.py").is_file(), name


def test_passes_is_a_relative_link() -> None:
    assert os.readlink(ROOT / "skipvit_fx" / "passes") == "../passes"


def test_passes_refuse_any_other_name() -> None:
    done = run_python("import passes", ROOT)
    assert done.returncode == 1
    assert "ImportError: import the graph passes as skipvit_fx.passes, not as passes" in done.stderr


def test_imports_point_one_way() -> None:
    assert upward_imports(ROOT) == []


def test_every_unit_has_its_layer() -> None:
    units = {path.stem for path in (ROOT / "skipvit_fx").iterdir() if path.suffix != ".typed"}
    assert units - {"__pycache__"} == set(LAYERS)
    assert len(LAYERS) == len(set(LAYERS))


def test_an_upward_import_is_seen(tmp_path: Path) -> None:
    (tmp_path / "skipvit_fx" / "graph").mkdir(parents=True)
    (tmp_path / "passes").mkdir()
    graph = tmp_path / "skipvit_fx" / "graph"
    (graph / "a.py").write_text("import skipvit_fx.ops\nimport skipvit_fx.api\n")
    (graph / "b.py").write_text("from skipvit_fx import errors, analysis\n")
    (tmp_path / "passes/c.py").write_text("def f():\n    from skipvit_fx.api import rewrite\n")
    assert upward_imports(tmp_path) == [
        "passes/c.py:2: passes -> api",
        "skipvit_fx/graph/a.py:2: graph -> api",
        "skipvit_fx/graph/b.py:1: graph -> analysis",
    ]


def test_core_needs_no_optional_package() -> None:
    done = run_python("import skipvit_fx, sys; print(*sys.modules)", ROOT)
    assert done.returncode == 0, done.stderr
    assert OPTIONAL.isdisjoint(done.stdout.split())


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build reads, so that building leaves nothing in the working tree."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("skipvit_fx", "passes"):
        shutil.copytree(
            ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


def test_wheel_contains_every_package(checkout: Path) -> None:
    done = run_python("from setuptools import build_meta; build_meta.build_wheel('.')", checkout)
    assert done.returncode == 0, done.stderr
    (wheel,) = checkout.glob("*.whl")
    files = zipfile.ZipFile(wheel).namelist()
    sources = {
        str(file.relative_to(checkout))
        for file in (checkout / "skipvit_fx").rglob("*.py")
        if "passes" not in file.parts
    } | {f"skipvit_fx/{file.relative_to(checkout)}" for file in (checkout / "passes").rglob("*.py")}
    assert "skipvit_fx/passes/__init__.py" in sources
    assert {name for name in files if name.endswith(".py")} == sources
    assert "skipvit_fx/py.typed" in files
    beside = [file for file in (checkout / "skipvit_fx" / "report").rglob("*.*") if file.is_file()]
    assert {str(file.relative_to(checkout)) for file in beside} <= set(files)
    assert any(name.endswith("licenses/LICENSE") for name in files)


def test_sdist_contains_the_passes(checkout: Path) -> None:
    done = run_python("from setuptools import build_meta; build_meta.build_sdist('.')", checkout)
    assert done.returncode == 0, done.stderr
    (sdist,) = checkout.glob("*.tar.gz")
    shutil.unpack_archive(sdist, checkout / "unpacked", filter="data")
    (top,) = (checkout / "unpacked").iterdir()
    assert (top / "passes" / "__init__.py").is_file()
