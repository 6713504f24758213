"""OpenVINO converts a rewritten model as it does the author's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from support.client_models import classifier, pixels, rewritten, vit

ov = pytest.importorskip("openvino")
pytestmark = pytest.mark.filterwarnings("ignore")  # of torch.jit's tracer, at the author's branches


@pytest.mark.every_case
@pytest.mark.parametrize("make", [vit, classifier])
@pytest.mark.client("OpenVINO", "convert_model")
def test_convert_model(make: Callable[[], Any]) -> None:
    fast = rewritten(make())
    converted = ov.convert_model(fast, example_input=pixels(3))
    run = ov.compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    with torch.no_grad():
        wanted = fast(pixels(3))
    got = torch.from_numpy(run(pixels(3).numpy())[0])
    torch.testing.assert_close(got, getattr(wanted, "logits", wanted), rtol=1e-4, atol=1e-5)
