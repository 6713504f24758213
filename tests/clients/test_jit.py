"""`torch.jit.trace` takes a rewritten model, and what is saved and loaded computes the same."""

from __future__ import annotations

import io
import warnings

import pytest
import torch

from support.rewrites import assert_close, gradients, rewritten

pytestmark = [
    pytest.mark.every_case,
    pytest.mark.filterwarnings("ignore:`torch.jit"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


def saved_and_loaded(traced: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    return torch.jit.load(file)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "batch"), [("vit", 1), ("fused", 2), ("beit", 2), ("torchvision", 2), ("tied", 2)]
)
@pytest.mark.client(
    "torch.jit",
    "traced, saved and loaded",
    caveat="a trace is for one size of image; retrace for another",
)
def test_traced_saved_and_loaded(case: str, batch: int) -> None:
    """For any batch size, whatever the one was that it was traced with."""
    _, fast, x, output = rewritten(case)
    loaded = saved_and_loaded(torch.jit.trace(fast, x[:batch]))
    assert_close(loaded(x), output)
    assert_close(loaded(torch.cat([x, x.flip(0)])), torch.cat([output, output.flip(0)]))


@pytest.mark.client("torch.jit", "a trace is trained")
def test_a_trace_trains() -> None:
    _, fast, x, _ = rewritten("fused")
    fast.train()
    loaded = saved_and_loaded(torch.jit.trace(fast, x))
    wanted = gradients(fast, fast(x).square().mean())
    assert_close(gradients(loaded, loaded(x).square().mean()), wanted)


@pytest.mark.slow
def test_what_is_inserted_decides_without_a_warning() -> None:
    _, fast, x, _ = rewritten("beit")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.jit.trace(fast, x)
    assert not [w for w in caught if "skipvit_fx" in w.filename]
