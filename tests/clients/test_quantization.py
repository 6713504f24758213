"""Quantisers replace the layers of a rewritten model as they do those of the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support.rewrites import rewritten

pytestmark = [
    pytest.mark.every_case,
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:Please use quant_min:UserWarning"),
    pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad:UserWarning"),
]
LINEAR = torch.ao.nn.quantized.dynamic.Linear


def quantised(module: nn.Module) -> Any:
    return torch.ao.quantization.quantize_dynamic(module, {nn.Linear})


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


@torch.no_grad()
@pytest.mark.parametrize("case", ["vit", "tied"])
@pytest.mark.client("torch.ao", "quantize_dynamic")
def test_dynamic_quantisation(case: str) -> None:
    """Every linear layer, the joint projection of the last one among them, and about as exactly as in the model."""
    model, fast, x, output = rewritten(case)
    ours, theirs = quantised(fast), quantised(model)
    count = sum(isinstance(module, nn.Linear) for module in model.modules())
    assert sum(isinstance(module, LINEAR) for module in ours.modules()) == count > 0
    assert not [m for m in ours.modules() if type(m) is nn.Linear]
    assert error(ours(x), output) < 2 * error(theirs(x), model(x)) < 0.2


@pytest.mark.client("torch.ao", "prepare_qat")
def test_quantisation_aware_training() -> None:
    """Fake quantisers in every linear layer watch what they should, and gradients pass through them."""
    model, fast, x, output = rewritten("vit")
    config = torch.ao.quantization.get_default_qat_qconfig("x86")
    fast.train().qconfig = config
    torch.ao.quantization.prepare_qat(fast, inplace=True)
    fast(x).sum().backward()
    layers = [m for m in fast.modules() if isinstance(m, torch.ao.nn.qat.Linear)]
    assert len(layers) == sum(isinstance(module, nn.Linear) for module in model.modules())
    for layer in layers:
        assert (
            layer.weight_fake_quant.activation_post_process.max_val.isfinite().all()
        )  # it was called
        assert layer.weight.grad.abs().max() > 0
    assert 0 < error(fast.eval()(x), output) < 0.1


@pytest.mark.client("torchao", "PT2E, X86InductorQuantizer")
def test_pt2e() -> None:
    pt2e = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
    x86 = pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    model, fast, x, output = rewritten("vit")
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())

    def quantised_by_export(module: nn.Module) -> Any:
        prepared = pt2e.prepare_pt2e(torch.export.export(module, (x,)).module(), quantizer)
        prepared(x)
        return pt2e.convert_pt2e(prepared)

    with torch.no_grad():
        theirs = error(quantised_by_export(model)(x), model(x))
        assert 0 < error(quantised_by_export(fast)(x), output) < 2 * theirs < 0.2


@pytest.mark.client("torchao", "float8 weights")
def test_float8_weights() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    _, fast, x, output = rewritten("vit")
    quantization.quantize_(fast, quantization.Float8WeightOnlyConfig())
    with torch.no_grad():
        assert 0 < error(fast(x), output) < 0.1


@pytest.mark.filterwarnings("ignore")  # of torch.jit's tracer, at the author's branches
@pytest.mark.client(
    "NNCF",
    "quantize",
    caveat="convert to OpenVINO first; of graph modules it takes exported programs only, and not with type conversions",
)
def test_nncf() -> None:
    """Through OpenVINO: of a graph module it wants node by node what torch.export leaves out of some."""
    nncf, ov = pytest.importorskip("nncf"), pytest.importorskip("openvino")
    model, fast, x, output = rewritten("vit")

    def quantised_by_nncf(module: nn.Module) -> Any:
        data = nncf.Dataset([x.numpy()])
        made = nncf.quantize(ov.convert_model(module, example_input=x), data)
        return ov.compile_model(made, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    with torch.no_grad():
        theirs = error(torch.from_numpy(quantised_by_nncf(model)(x.numpy())[0]), model(x))
    ours = error(torch.from_numpy(quantised_by_nncf(fast)(x.numpy())[0]), output)
    assert 0 < ours < 2 * theirs
