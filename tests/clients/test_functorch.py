"""`torch.func` on a rewritten model: a batch of batches, gradients a sample, and an ensemble."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from support.models import scramble
from support.rewrites import assert_close, gradients, rewritten

pytestmark = pytest.mark.filterwarnings(
    "ignore:There is a performance drop.*scaled_dot_product:UserWarning"
)


@pytest.mark.parametrize("case", ["vit", "fused", "beit", "torchvision", "tied"])
@pytest.mark.client("torch.func", "vmap")
@pytest.mark.slow
def test_a_batch_of_batches(case: str) -> None:
    _, fast, x, output = rewritten(case)
    with torch.no_grad():
        got = vmap(fast)(torch.stack([x, x.flip(0)]))
    assert_close(got, torch.stack([output, output.flip(0)]))


@pytest.mark.parametrize(("case", "training"), [("vit", False), ("fused", True), ("beit", True)])
@pytest.mark.client("torch.func", "gradients per sample")
def test_gradients_a_sample(case: str, training: bool) -> None:
    _, fast, x, _ = rewritten(case)
    fast.train(training)
    parameters = dict(fast.named_parameters())

    def loss(values: dict[str, Tensor], image: Tensor) -> Tensor:
        out: Tensor = functional_call(fast, values, (image.unsqueeze(0),))
        return out.square().mean()

    found = vmap(grad(loss), (None, 0))(parameters, x)
    for i, image in enumerate(x):
        wanted = gradients(fast, loss(parameters, image))
        assert_close({name: found[name][i] for name in wanted}, wanted)


@pytest.mark.client("torch.func", "an ensemble of models")
def test_an_ensemble() -> None:
    """Each member chooses its own patches."""
    _, fast, x, output = rewritten("vit")
    other = copy.deepcopy(fast)
    scramble(other, seed=1)
    theirs = dict(other.named_parameters())
    both = {name: torch.stack([p, theirs[name]]) for name, p in fast.named_parameters()}
    with torch.no_grad():
        got = vmap(lambda values: functional_call(fast, values, (x,)))(both)
        assert_close(got, torch.stack([output, other(x)]))
