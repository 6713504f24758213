"""Refusals say what is true of the model, in words that a reader who has not seen our code understands."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel

import skipvit_fx
from skipvit_fx import SkipViTError, TraceError, UnsupportedModelError
from support.models import REFUSED
from support.odd_models import BAD, DIM, Block, Mlp, Odd, Sdpa, image

INTERNALS = re.compile(
    r"_Witness|Proxy|FakeTensor|FakeParameter|_LeafCall|skipvit_fixed|object at 0x"
)
ISOTROPIC = "only models with one sequence of tokens"


@dataclass(frozen=True)
class Case:
    """A model that is refused.

    Attributes:
        build: makes it.
        shape: of its input.
        says: patterns, all of which its reason matches.
        hint: a pattern of the hint.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    says: tuple[str, ...]
    hint: str = ISOTROPIC


def _hugging_face(kind: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: AutoModel.from_config(AutoConfig.for_model(kind, **options)).eval()


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=10, **options).eval()


DEPTH = 2
IMAGES = (2, 3, 64, 64)
FOUR = {
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [16, 16, 32, 32],
    "num_attention_heads": [1, 1, 2, 2],
}
OLD = {r.name: r.build for r in REFUSED}
WINDOWS = r"runs in windows"
CASES: dict[str, Case] = {
    "swin": Case(
        OLD["swin"],
        IMAGES,
        (r"\[16, 16, 24\]", WINDOWS, r"shrinks from 16 x 16 x 24 to 8 x 8 x 48"),
    ),
    "swinv2": Case(OLD["swinv2"], IMAGES, (r"\[16, 16, 24\]", WINDOWS, "shrinks")),
    "swin-transformers": Case(
        _hugging_face(
            "swin", image_size=64, embed_dim=24, depths=[1, 1], num_heads=[2, 2], window_size=4
        ),
        IMAGES,
        (r"sees 16 keys, and there are 256 tokens", "shrinks from 256 x 24 to 64 x 48"),
    ),
    "pvt-v2": Case(OLD["pvt-v2"], IMAGES, (r"sees 4 keys, and there are 256", "pooled", "shrinks")),
    "pvt-transformers": Case(
        _hugging_face("pvt", image_size=64, **FOUR),
        IMAGES,
        (r"pooled", "shrinks from 256 x 16 to 64 x 16"),
    ),
    "segformer": Case(
        _hugging_face("segformer", **FOUR), IMAGES, ("pooled", "shrinks from 256 x 16 to 64 x 16")
    ),
    "hiera": Case(OLD["hiera"], IMAGES, (r"sees 64 keys", "shrinks from 256 x 32 to 64 x 64")),
    "mvitv2": Case(OLD["mvitv2"], IMAGES, (r"sees 16 keys, and there are 256 tokens", "shrinks")),
    "convit": Case(
        OLD["convit"], IMAGES, (r"'blocks\.0\.attn' writes into a part",), r"torch\.cat"
    ),
    "xcit": Case(OLD["xcit"], IMAGES, ("weighs channels, not tokens",)),
    "timesformer": Case(
        _hugging_face(
            "timesformer",
            image_size=32,
            patch_size=16,
            num_frames=2,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
        ),
        (2, 2, 3, 32, 32),
        (r"sees 2 keys, and there are 9 tokens",),
    ),
    "patchtst": Case(
        _hugging_face(
            "patchtst",
            num_input_channels=3,
            context_length=32,
            patch_length=4,
            patch_stride=4,
            d_model=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            ffn_dim=32,
        ),
        (2, 32, 3),
        (r"not a plain one over the tokens of a sequence", "batch_norm"),
    ),
    "pit": Case(
        _timm("pit_ti_224", img_size=64, depth=(1, 1, 1)),
        IMAGES,
        (
            r"layer 2 has a different sequence of tokens from layer 1: it is 17 x 128, and was 50 x 64",
        ),
    ),
}


def refusal_of(
    build: Callable[[], nn.Module], x: Tensor, plan: str = "1(50%)+2", **options: Any
) -> SkipViTError:
    torch.manual_seed(0)
    with pytest.raises(SkipViTError) as caught:
        skipvit_fx.rewrite(build(), plan, example_inputs=(x,), **options)
    return caught.value


def assert_plain(error: SkipViTError) -> None:
    """Names none of our internals, and says what to do."""
    assert not INTERNALS.search(str(error)), str(error)
    assert error.hint


SLOW = ("mvitv2",)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in CASES]
)
def test_the_reason_is_true_and_the_hint_helps(name: str) -> None:
    case = CASES[name]
    error = refusal_of(case.build, torch.randn(*case.shape))
    assert_plain(error)
    if "keys" in str(error):  # so do the parts: none of them could be rewritten alone
        assert "put it back" not in error.hint
    for pattern in case.says:
        assert re.search(pattern, str(error)), str(error)
    assert re.search(case.hint, error.hint)
    assert "prefix_tokens" not in str(error), "which cannot help here"
    if isinstance(error, UnsupportedModelError):
        assert error.node
        assert error.module_path


@pytest.mark.parametrize("name", ["swin-transformers", "xcit", "pvt-v2"])
@pytest.mark.slow
def test_the_report_says_the_same(name: str) -> None:
    case = CASES[name]
    report = skipvit_fx.find_attention(case.build(), example_inputs=(torch.randn(*case.shape),))
    assert report.refusal is not None
    assert_plain(report.refusal)
    assert re.search(case.says[0], str(report.refusal))
    assert not INTERNALS.search(str(report))


@pytest.mark.parametrize("refused", [r for r in REFUSED if r.name not in CASES], ids=str)
def test_refused_families(refused: Any) -> None:
    assert_plain(refusal_of(refused.build, refused.input()))


@pytest.mark.parametrize("example", BAD, ids=str)
def test_refused_styles(example: Any) -> None:
    assert_plain(refusal_of(example.build, image(), "1(50%)+4"))


# -- Python that proxies cannot run, written out ---------------------------------------------------


def _assigns(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, 1:] = x[:, 1:] * 2
    return x


class Forwards(Sdpa):
    """Runs a piece of Python in the function that attends."""

    def __init__(self, python: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.python = python

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.python(x))


PYTHON: dict[str, Callable[[Tensor], Any]] = {
    "assignment": _assigns,
    "branch": lambda x: x if x.sum() > 0 else -x,
    "loop": lambda x: sum(row for row in x),
    "number": lambda x: x * float(x.max()),
    "list": lambda x: x * x.tolist()[0][0][0],
    "item": lambda x: x * x.amax().item(),
    "unknown-attribute": lambda x: x.no_such_attribute * 2,
    "range": lambda x: x * len(range(x.argmax())),
    "hash": lambda x: {x: x}[x * 1],
    "numpy": lambda x: x * torch.from_numpy(x.detach().numpy()),
    "format": lambda x: x * float(f"{x.mean():.3f}"),
    "wrong-shape": lambda x: x + torch.zeros(3, 3),
}


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
@pytest.mark.parametrize("name", PYTHON)
def test_python_that_cannot_be_followed(name: str, frontend: Any) -> None:
    model = Odd([Block(Forwards(PYTHON[name])), *(Block() for _ in range(DEPTH - 1))])
    try:
        skipvit_fx.rewrite(model.eval(), "1(50%)+2", example_inputs=(image(),), frontend=frontend)
    except SkipViTError as error:
        assert_plain(error)


def test_writing_into_a_part_names_the_module() -> None:
    def build() -> nn.Module:
        return Odd([Block(), Block(Forwards(_assigns))]).eval()

    error = refusal_of(build, image(), frontend="symbolic")
    assert isinstance(error, TraceError)
    assert "module 'blocks.1.attn' writes into a part of a tensor" in str(error)


# -- prefix tokens: the hint where it helps, and not elsewhere --------------------------------------


class Shuffles(Odd):
    """An operator that no rule knows stands between the class token and the layers; attention is as usual."""

    def layers(self, x: Tensor) -> Tensor:
        return super().layers(torch.fft.ifft(torch.fft.fft(x, dim=1), dim=1).real)


def test_prefix_tokens_is_the_hint_where_it_helps() -> None:
    def build() -> nn.Module:
        return Shuffles(Block() for _ in range(DEPTH)).eval()

    error = refusal_of(build, image())
    assert "where they are now cannot be told" in str(error)
    assert "prefix_tokens=N" in error.hint
    skipvit_fx.rewrite(build(), "1(50%)+2", example_inputs=(image(),), prefix_tokens=1)


class SideBySide(nn.Module):
    """Two sequences of one image, each with layers of its own, joined at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.ways = nn.ModuleList(Odd([Block(), Block()]) for _ in range(2))

    def forward(self, image: Tensor) -> Tensor:
        return self.ways[0](image) + self.ways[1](image)


class ThroughChannels(Sdpa):
    """Attention among channels, with a matrix for each head."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.split(p(x)).mT for p in (self.to_q, self.to_k, self.to_v))
        return self.out(self.join(F.scaled_dot_product_attention(q, k, v).mT))


class Shrinks(Odd):
    """Every second token leaves after the second layer."""

    def layers(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x)
            x = torch.cat([x[:, :1], x[:, 1::2]], dim=1) if i == 1 else x
        return x


class Causal(Sdpa):
    """Each token sees those before it."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.split(p(x)) for p in (self.to_q, self.to_k, self.to_v))
        return self.out(self.join(F.scaled_dot_product_attention(q, k, v, is_causal=True)))


SHAPES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "several": (SideBySide, "several sequences of tokens"),
    "channels": (lambda: Odd(Block(ThroughChannels()) for _ in range(2)), "weighs channels"),
    "causal": (lambda: Odd(Block(Causal()) for _ in range(2)), "causal attention depends on"),
    "shrinks": (lambda: Shrinks(Block(mlp=Mlp(DIM)) for _ in range(4)), "11 x 32"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_what_a_graph_shows(name: str) -> None:
    build, says = SHAPES[name]
    error = refusal_of(lambda: build().eval(), image())
    assert_plain(error)
    assert says in str(error)
    assert "prefix_tokens" not in str(error)
