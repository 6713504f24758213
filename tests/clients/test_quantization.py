"""Quantisers replace the layers of a rewritten model as they do those of the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewrites import rewritten

pytestmark = [
    pytest.mark.every_case,
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning"),
]
LINEAR = torch.ao.nn.quantized.dynamic.Linear


def quantised(module: nn.Module) -> Any:
    return torch.ao.quantization.quantize_dynamic(module, {nn.Linear})


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


@torch.no_grad()
@pytest.mark.parametrize("case", ["vit", "tied"])
def test_dynamic_quantisation(case: str) -> None:
    """Every linear layer, the joint projection of the last one among them, and about as exactly as in the model."""
    model, fast, x, output = rewritten(case)
    ours, theirs = quantised(fast), quantised(model)
    count = sum(isinstance(module, nn.Linear) for module in model.modules())
    assert sum(isinstance(module, LINEAR) for module in ours.modules()) == count > 0
    assert not [m for m in ours.modules() if type(m) is nn.Linear]
    assert error(ours(x), output) < 2 * error(theirs(x), model(x)) < 0.2
