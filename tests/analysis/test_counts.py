"""Samples are kept apart like tokens, and a count of tokens is never a value: refused, or exact.

The expressions stand where an author may put them: in a module that is called as a whole, in traced code, on queries
and keys, in a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import skipvit_fx as sv
from skipvit_fx.errors import TraceError, UnsupportedModelError
from support.models import scramble
from support.odd_models import DIM, Block, MixingAttention, MixingMlp, Odd, Sdpa, image
from support.reference import masked_reference, relative_error

DEPTH = 3
PLAN = "1(50%)+3"
STAGES = [(1, "0.5")]

Expression = Callable[[Tensor], Tensor]

OVER_SAMPLES: dict[str, Expression] = {
    "mean": lambda x: x - x.mean(0),
    "mean-kept": lambda x: x - x.mean(0, keepdim=True),
    "mean-negative": lambda x: x - x.mean(-x.ndim),
    "sum-of-two": lambda x: x - x.sum((0, -1), keepdim=True),
    "first-sample": lambda x: x[0:1] + x,
    "one-sample": lambda x: x[0] + x,
    "last-sample": lambda x: x.narrow(0, x.shape[0] - 1, 1) + x,
    "flip": lambda x: x.flip(0),
    "flip-two": lambda x: x.flip(-1, 0),
    "softmax": lambda x: x.softmax(0),
    "log-softmax": lambda x: F.log_softmax(x, 0),
    "softmin": lambda x: F.softmin(x, 0),
    "sort": lambda x: x.sort(0).values,
    "sort-indices": lambda x: x.sort(dim=0).indices.to(x.dtype),
    "topk": lambda x: x + x.topk(1, 0).values,
    "cumsum": lambda x: x.cumsum(0),
    "unbind": lambda x: x.unbind(0)[0] + x,
    "unbind-default": lambda x: x.unbind()[0] + x,
    "chunk": lambda x: x.chunk(x.shape[0])[0] + x,
    "shift": lambda x: torch.cat([x[1:], x[:1]], 0),
    "stacked": lambda x: torch.stack([x[-1], *x[:-1].unbind(0)]),
    "roll": lambda x: x.roll(1, 0),
    "roll-flat": lambda x: x.roll(1),
    "roll-flat-function": lambda x: torch.roll(x, 5),
    "roll-no-axes": lambda x: torch.ops.aten.roll(x, [2], []),
    "amax": lambda x: x - x.amax(0),
    "norm": lambda x: x / x.norm(dim=0, keepdim=True),
    "normalize": lambda x: F.normalize(x, dim=0),
    "var": lambda x: x * x.var(0, correction=0),
    "layer-norm": lambda x: F.layer_norm(x.transpose(0, -1), (x.shape[0],)).transpose(0, -1),
    "halves": lambda x: x.reshape(x.shape[0], -1).flip(0).reshape(x.shape),
    "outer": lambda x: x + torch.outer(x[0].flatten()[:2], x[0].flatten()[:2]).sum(),
    "gram": lambda x: x + (x.flatten(1) @ x.flatten(1).T).mean(),
    "transposed": lambda x: x.transpose(0, 1).reshape(x.shape),
    "everything": lambda x: x - x.mean(),
    "everything-max": lambda x: x / x.abs().max(),
}


def mixing(expression: Expression, place: str) -> Odd:
    """A model with the expression in its second layer."""
    odd = {
        "leaf": lambda: Block(mlp=MixingMlp(expression)),
        "traced": lambda: Block(MixingAttention(expression)),
        "query": lambda: Block(OnHeads(expression, "query")),
        "key": lambda: Block(OnHeads(expression, "key")),
    }[place]
    model = Odd([odd() if layer == 1 else Block() for layer in range(DEPTH)])
    scramble(model)
    return model.eval()


class OnHeads(Sdpa):
    """An expression of the queries or keys, ``[B, H, N, D]``, as their norms are."""

    def __init__(self, expression: Expression, of: str) -> None:
        super().__init__()
        self.expression, self.of = expression, of

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.to_q(x)), self.split(self.to_k(x)), self.split(self.to_v(x))
        if self.of == "query":
            q = self.expression(q)
        else:
            k = self.expression(k)
        return self.out(self.join(F.scaled_dot_product_attention(q, k, v)))


def refusal(model: nn.Module, plan: str = PLAN) -> UnsupportedModelError | TraceError:
    with pytest.raises((UnsupportedModelError, TraceError)) as caught:
        sv.rewrite(model, plan, example_inputs=(image(),))
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize("place", ["leaf", "traced"])
@pytest.mark.parametrize("name", OVER_SAMPLES)
@pytest.mark.slow
def test_samples_are_never_mixed(name: str, place: str) -> None:
    error = refusal(mixing(OVER_SAMPLES[name], place))
    if isinstance(error, UnsupportedModelError):
        assert error.module_path.startswith("blocks.1"), error


@pytest.mark.parametrize("place", ["query", "key"])
@pytest.mark.parametrize("name", ["mean", "flip", "softmax", "shift", "roll-flat", "first-sample"])
def test_samples_are_never_mixed_among_heads(name: str, place: str) -> None:
    refusal(mixing(OVER_SAMPLES[name], place))


@pytest.mark.slow
def test_the_refusal_names_the_samples() -> None:
    for name in ("flip", "softmax", "cumsum", "first-sample", "shift"):
        assert "mixes the samples of a batch" in str(refusal(mixing(OVER_SAMPLES[name], "leaf")))


@pytest.mark.parametrize("name", OVER_SAMPLES)
def test_they_do_mix_samples(name: str) -> None:
    """What becomes of some sample depends on the samples beside it."""
    x = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))
    expression = OVER_SAMPLES[name]
    depends = []
    for sample in range(4):
        others = x * 3 + 1
        others[sample] = x[sample]
        depends.append(relative_error(expression(others)[sample], expression(x)[sample]))
    assert max(depends) > 1e-3


class Encoder(Odd):
    """torch's encoder layers, which take the batch at the axis that they are told."""

    def __init__(self, *, batch_first: bool) -> None:
        super().__init__(
            nn.TransformerEncoderLayer(DIM, 4, 64, batch_first=batch_first, norm_first=True)
            for _ in range(DEPTH)
        )


@pytest.mark.filterwarnings("ignore:.*nested tensor")
@pytest.mark.slow
def test_attention_over_the_samples_is_refused() -> None:
    model = Encoder(batch_first=False)
    scramble(model)
    error = refusal(model.eval())
    assert "samples" in str(error)
    sv.rewrite(Encoder(batch_first=True).eval(), PLAN, example_inputs=(image(),))


# -- counts -----------------------------------------------------------------------------------------------------------

COUNTS: dict[str, Expression] = {
    "scalar-tensor": lambda x: x * torch.tensor(float(x.shape[-2])) / 9,
    "full": lambda x: x * torch.full((1, 1), x.shape[-2]) / 9,
    "full-like": lambda x: x * torch.full_like(x, x.shape[-2]) / 9,
    "new-full": lambda x: x * x.new_full((1,), x.shape[-2]) / 9,
    "new-tensor": lambda x: x * x.new_tensor(x.shape[-2]) / 9,
    "ones-sum": lambda x: x * torch.ones(x.shape[-2]).sum() / 9,
    "ones-like-sum": lambda x: x * torch.ones_like(x).sum(-2, keepdim=True) / 9,
    "arange-mean": lambda x: x * torch.arange(x.shape[-2]).float().mean() / 9,
    "arange-len": lambda x: x * len(torch.arange(x.shape[-2])) / 9,
    "shape-tensor": lambda x: x * torch.tensor(x.shape)[-2] / 9,
    "branch": lambda x: x * (1.0 if x.shape[-2] > 12 else 0.3),
    "branch-equal": lambda x: x * (1.0 if x.shape[-2] == 21 else 0.3),
    "minimum": lambda x: x * min(x.shape[-2], 16) / 9,
    "floor": lambda x: x * (x.shape[-2] // 8),
    "ratio": lambda x: x * (x.shape[-2] / 10),
    "root": lambda x: x * x.shape[-2] ** 0.5 / 9,
    "added": lambda x: x + x.size(-2) / 10,
    "numel": lambda x: x * (x.numel() / x.shape[0] / 100),
    "length": lambda x: x * len(x[0]) / 9 if x.ndim == 3 else x * (x.shape[-2] / 9),
    "linspace": lambda x: x * torch.linspace(0, 1, x.shape[-2]).mean(),
    "clamped": lambda x: x.clamp(max=x.shape[-2] / 20),
    "channels-by-count": lambda x: torch.cat(
        [x[..., : x.shape[-2] % 8] * 2, x[..., x.shape[-2] % 8 :]], -1
    ),
    "roll-by-count": lambda x: x.roll(x.shape[-2], -1),
    "range": lambda x: x * sum(1.0 for _ in range(x.shape[-2])) / 9,
    "zeros-nonzero": lambda x: x * (1 + torch.zeros(x.shape[-2]).cos().sum() / 9),
    "eye-trace": lambda x: x * torch.eye(x.shape[-2]).trace() / 9,
    "dropout-rate": lambda x: F.dropout(x, 0.0 * x.shape[-2]) * (x.shape[-2] / 9),
    "repeat-sum": lambda x: x * x[..., :1, :].expand(x.shape).sum(-2, keepdim=True).sign() * 0.5,
}


def assert_exact_or_refused(model: Odd, plan: str = PLAN, **how: Any) -> None:
    """Refused with a reason, or equal to the reference at other batch sizes than the example's, too."""
    try:
        fast = sv.rewrite(model, plan, example_inputs=(image(),), **how)
    except (UnsupportedModelError, TraceError) as error:
        refused = error
    else:
        refused = None
    if refused is not None:
        assert refused.hint
        return
    for batch in (1, 3):
        x = image(batch=batch)
        with torch.no_grad():
            wanted = masked_reference(model, x, model.layout(), stages=STAGES, return_layer=3)
            assert relative_error(fast(x), wanted.output) < 1e-4


@pytest.mark.parametrize("place", ["leaf", "traced", "query"])
@pytest.mark.parametrize("name", COUNTS)
def test_a_count_is_the_authors_or_refused(name: str, place: str) -> None:
    assert_exact_or_refused(mixing(COUNTS[name], place))


class CountingHead(nn.Module):
    """Reads the class token, and how many tokens there are."""

    def __init__(self, factor: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.factor = factor
        self.fc = nn.Linear(DIM, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(x[:, 0] * self.factor(x))
        return out


HEADS: dict[str, Callable[[Tensor], Any]] = {
    "size": lambda x: x.shape[1] / 9,
    "branch": lambda x: 1.0 if x.shape[1] > 12 else 0.3,
    "numel": lambda x: x.numel() / x.shape[0] / 500,
    "length": lambda x: len(x[0]) / 9,
    "ones": lambda x: torch.ones(x.shape[1]).sum() / 9,
    "arange": lambda x: torch.arange(x.shape[1]).float().mean() / 9,
    "stride": lambda x: x[:1].numel() / 500,
    "last": lambda x: x[:, -1].sign(),
}


class OwnHead(Odd):
    """The head is a module that takes the whole sequence, or the same code in the model's forward."""

    def __init__(self, factor: Callable[[Tensor], Any], *, leaf: bool) -> None:
        super().__init__([Block() for _ in range(DEPTH)])
        self.counting = CountingHead(factor)
        self.leaf = leaf

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos
        x = self.norm(self.layers(x))
        if self.leaf:
            return self.counting(x)
        out: Tensor = self.counting.fc(x[:, 0] * self.counting.factor(x))
        return out


@pytest.mark.parametrize("leaf", [True, False])
@pytest.mark.parametrize("name", HEADS)
def test_a_head_sees_the_authors_count(name: str, leaf: bool) -> None:
    """Rows that nothing reads are left out before it."""
    model = OwnHead(HEADS[name], leaf=leaf)
    scramble(model)
    assert_exact_or_refused(model.eval())


def test_a_count_after_tokens_left_for_good_is_refused() -> None:
    model = OwnHead(HEADS["size"], leaf=False)
    error = refusal(model.eval(), "1(50%)")
    assert "left for good" in str(error)


# -- weights ----------------------------------------------------------------------------------------------------------

AFTER_SOFTMAX: dict[str, tuple[Expression, bool]] = {
    "minus-mean": (lambda w: w - 1 / 21, False),
    "minus-live-mean": (lambda w: w - 1 / w.shape[-1], False),
    "clamped": (lambda w: w.clamp(min=0.01), False),
    "exponential": (lambda w: w.exp(), False),
    "softmax-again": (lambda w: w.softmax(-1), False),
    "ones": (lambda w: torch.ones_like(w), False),
    "inverse": (lambda w: 1 - w, False),
    "filled": (lambda w: w.masked_fill(w < 0.01, 0.5), False),
    "doubled": (lambda w: w * 2, True),
    "sum-of-two": (lambda w: w + 0.5 * w, True),
    "dropout": (lambda w: F.dropout(w, 0.0), True),
    "relu": (lambda w: w.relu(), True),
    "divided": (lambda w: w / 3, True),
    "small-ones-left-out": (lambda w: w.masked_fill(w < 0.01, 0.0), True),
    "column": (lambda w: w * w[..., :1], False),
    "one-key": (lambda w: w * w[..., 0, None], False),
}


class Spelled(Sdpa):
    """Attention spelled out, with something done to its weights."""

    def __init__(self, expression: Expression) -> None:
        super().__init__()
        self.expression = expression

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.to_q(x)), self.split(self.to_k(x)), self.split(self.to_v(x))
        weights = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
        return self.out(self.join(self.expression(weights) @ v))


@pytest.mark.parametrize("name", AFTER_SOFTMAX)
def test_what_is_done_to_weights_must_keep_zeros(name: str) -> None:
    """A token that has gone has no weight; where none would become some, the sum with the values is another."""
    expression, sound = AFTER_SOFTMAX[name]
    model = Odd(Block(Spelled(expression) if layer == 1 else None) for layer in range(DEPTH))
    scramble(model)
    model.eval()
    if not sound:
        refusal(model)
        return
    fast = sv.rewrite(model, PLAN, example_inputs=(image(),))
    with torch.no_grad():
        wanted = masked_reference(model, image(3), model.layout(), stages=STAGES, return_layer=3)
        assert relative_error(fast(image(3)), wanted.output) < 1e-4
