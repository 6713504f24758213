"""`torch.export` takes a rewritten model, and what Inductor compiles ahead of time from it computes the same."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from support.rewrites import assert_close, gradients, rewritten

BATCH = torch.export.Dim("batch", min=1)


@pytest.mark.parametrize("case", ["beit", "tied"])
@pytest.mark.client("torch.export", "exported, run as a program")
def test_exported(case: str) -> None:
    _, fast, x, output = rewritten(case)
    program = torch.export.export(fast, (x,))
    assert_close(program.module()(x), output)
    called = {str(node.target) for node in program.graph.nodes}
    assert not [name for name in called if "stable" in name], "most runtimes have no stable sort"


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.client("torch.export", "any batch size, strict or not")
def test_any_batch(strict: bool) -> None:
    _, fast, x, output = rewritten("fused")
    shapes = ({0: BATCH},)
    program = torch.export.export(fast, (x,), dynamic_shapes=shapes, strict=strict).module()
    for batch in (1, 2):
        assert_close(program(x[:batch]), output[:batch])


@pytest.mark.client("torch.export", "the program is trained")
def test_a_program_trains() -> None:
    _, fast, x, _ = rewritten("fused")
    fast.train()
    program = torch.export.export(fast, (x,)).module()
    wanted = gradients(fast, fast(x).square().mean())
    assert_close(gradients(program, program(x).square().mean()), wanted)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a compiler of C++")
@pytest.mark.client("AOTInductor", "compiled ahead of time and loaded")
def test_compiled_ahead_of_time(tmp_path: Path) -> None:
    _, fast, x, output = rewritten("fused")
    program = torch.export.export(fast, (x,), dynamic_shapes=({0: BATCH},))
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "m.pt2")
    )
    compiled = torch._inductor.aoti_load_package(package)
    for batch in (1, 2):
        assert_close(compiled(x[:batch]), output[:batch])
