"""What torch does not promise stands in one file, and one operator that is gone does not break the import."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from skipvit_fx import torch_internals
from skipvit_fx.torch_internals import aten

ROOT = Path(__file__).resolve().parents[1]
INTERNALS = ROOT / "skipvit_fx" / "torch_internals.py"
PYTHONS_OWN = {"_replace", "_asdict", "_getframe", "_lru_cache_wrapper"}
"""Of named tuples, ``sys`` and ``functools``."""


def sources() -> list[Path]:
    found = [*(ROOT / "skipvit_fx").rglob("*.py"), *(ROOT / "passes").glob("*.py")]
    link = ROOT / "skipvit_fx" / "passes"
    return [path for path in found if not path.is_relative_to(link) and path != INTERNALS]


def defined_in(trees: list[ast.Module]) -> set[str]:
    names = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.Attribute(attr=name, ctx=ast.Store()) | ast.Name(id=name, ctx=ast.Store()):
                names.add(name)
    return names


def foreign_privates(tree: ast.Module, own: set[str]) -> Iterator[str]:
    """Private names that this package does not define, except operators, which may be missing."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="aten")):
                continue
            case ast.Attribute(attr=name) if name.startswith("_") and not name.startswith("__"):
                if name not in own | PYTHONS_OWN:
                    yield f"{node.lineno}: .{name}"
            case ast.ImportFrom(module=str(module), names=names) if module.startswith("torch"):
                private = "._" in module or "experimental" in module
                if private or any(name.name.startswith("_") for name in names):
                    yield f"{node.lineno}: from {module}"
            case ast.Attribute(value=ast.Attribute(attr="ops"), attr="aten"):
                yield f"{node.lineno}: torch.ops.aten"


def test_no_other_file_reaches_into_torch() -> None:
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sources()}
    own = defined_in([*trees.values()])
    found = [
        f"{path.relative_to(ROOT)}:{place}"
        for path, tree in trees.items()
        for place in foreign_privates(tree, own)
    ]
    assert found == []


@pytest.mark.parametrize(
    "code",
    [
        "tensor.untyped_storage()._cdata",
        "from torch.utils import _pytree",
        "from torch._ops import OpOverload",
        "from torch.fx.experimental.symbolic_shapes import ShapeEnv",
        "torch.ops.aten.add",
    ],
)
def test_a_file_that_does_is_seen(code: str) -> None:
    assert list(foreign_privates(ast.parse(code), set()))


def test_each_entry_says_since_when() -> None:
    text = INTERNALS.read_text(encoding="utf-8")
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            assert "Since " in (ast.get_docstring(node) or ""), node.name
    imports = text.partition("__all__")[0].split("\n\n")
    for block in imports:
        if any(line.startswith("from torch.") and "._" in line for line in block.splitlines()):
            assert "Since " in block, block


def test_all_is_what_is_used() -> None:
    code = "\n".join(path.read_text(encoding="utf-8") for path in sources())
    assert [name for name in torch_internals.__all__ if name not in code] == []


@pytest.mark.slow
def test_a_missing_operator_breaks_nothing() -> None:
    missing = aten._an_operator_of_tomorrow.default
    assert missing != aten.add.Tensor
    assert "not in torch" in repr(missing)
    code = """
import sys
import torch
gone = {"_fused_rms_norm", "_safe_softmax", "_prelu_kernel", "_scaled_dot_product_cudnn_attention"}
class Without:
    def __getattr__(self, name):
        if name in gone and sys._getframe(1).f_globals["__name__"].startswith("skipvit_fx"):
            raise AttributeError(name)
        return getattr(all_of_them, name)
all_of_them, torch.ops.aten = torch.ops.aten, Without()
import skipvit_fx
from skipvit_fx.torch_internals import aten
assert "not in torch" in repr(aten._fused_rms_norm)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
