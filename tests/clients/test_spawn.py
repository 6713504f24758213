"""A rewritten model is handed to a process that is spawned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import multiprocessing, nn

from support.client_models import fast_vit, pixels


def _call(_: int, fast: nn.Module, path: str) -> None:
    with torch.no_grad():
        torch.save(fast(pixels()), path)


@pytest.mark.slow  # the process imports everything again
@pytest.mark.client("Python", "multiprocessing, spawned")
def test_spawned(tmp_path: Path) -> None:
    fast = fast_vit()
    result = tmp_path / "result.pt"
    multiprocessing.spawn(_call, args=(fast, str(result)), nprocs=1)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        torch.testing.assert_close(torch.load(result), fast(pixels()))
