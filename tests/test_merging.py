"""Merged tokens: the compiler equals two references that know nothing of it nor of each other."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import skipvit_fx as sv
from skipvit_fx.errors import PlanError, SkipViTError, UnsupportedModelError
from support.checks import TOLERANCE, assert_same_bits
from support.models import BY_NAME, FAMILIES, TORCHVISION, Family, layout_of, names
from support.odd_models import (
    DEPTH,
    DIM,
    EITHER,
    GOOD,
    HEADS,
    TOKENS,
    Block,
    Example,
    Odd,
    Projections,
    image,
)
from support.reference import ReferenceResult, relative_error
from support.tiny import Tiny
from support.token_merging import (
    MergedImages,
    MergeResult,
    MergingRun,
    assert_same_merges,
    merge_count,
    merging_reference,
    tome_vit,
)

Reference = dict[str, Any]

PLANS: dict[str, Reference] = {
    "1-4(3)+merged": {"stages": [(layer, 3) for layer in (1, 2, 3, 4)]},
    "1-3(3)+5+merged": {"stages": [(1, 3), (2, 3), (3, 3)], "return_layer": 5},
    "2(50%)+merged": {"stages": [(2, "0.5")]},
    "1,3(30%,5)+4+merged": {"stages": [(1, "0.3"), (3, 5)], "return_layer": 4},
    "1(4)+3+merged;3,4(5)+merged": {
        "stages": [(1, 4), (3, 5), (4, 5)],
        "return_layer": (3,),
    },
    "1,2(3,10%)+3+merged;3(30%)": {
        "stages": [(1, 3), (2, "0.1"), (3, "0.3")],
        "return_layer": (3,),
        "merging": (1, 2),
    },
    "1(30%)+2;2-4(3)+merged": {
        "stages": [(1, "0.3"), (2, 3), (3, 3), (4, 3)],
        "return_layer": (2,),
        "merging": (2, 3, 4),
    },
}
BLOCKS: dict[str, Reference] = {
    "1,2(4,3)+4+merged": {"stages": [(1, 4), (2, 3)], "return_layer": 4, "cut": "block"},
    "1,4(5,25%)+merged": {"stages": [(1, 5), (4, "0.25")], "cut": "block"},
    "1(4)+2+merged;2(30%)+5": {
        "stages": [(1, 4), (2, "0.3")],
        "return_layer": (2, 5),
        "merging": (1,),
        "cut": "block",
    },
}
NAMES = [
    "vit",
    "vit-unfused",
    "dinov2-reg4",
    "siglip-map",
    "beit",
    "eva02",
    "dinov3-token",
    "rope-axial",
    "relpos-shared",
    "cait",
    "naflex-gap",
    "eva-gqa",
    "parallel-things",
]
PLAIN = [
    "vit",
    "vit-unfused",
    "vit-layerscale-qknorm",
    "vit-cls-avg",
    "dinov2-reg4",
    "reg4-gap",
    "siglip-map",
    "vit-coincident",
]
# What each layer merges away, and where all return.
LITERAL: list[tuple[tuple[int, ...], int | None]] = [
    ((8, 5, 3, 2), None),
    ((3, 3, 3, 3), None),
    ((0, 5, 4, 0), 4),
    ((7, 0, 0, 0), 2),
    ((4, 0, 4, 0), 5),
]
EXACT = 1e-5
MARGIN = 1e-5
"""How far apart similarities and scores must be that decide, so that rounding decides nothing."""


def reference_of(
    model: nn.Module,
    plan: Reference,
    layout: Any = None,
    make: Callable[..., Tensor] = image,
    batch: int = 3,
) -> tuple[Tensor, ReferenceResult]:
    """An input for which no choice of the reference is close, and what the reference makes of it.

    After a return, patches that were one token are equal, and stay equal in layers that know no positions. Where one
    of them had to be dropped and another not, neither would be wrong.
    """
    layout = layout_of(model) if layout is None else layout
    for seed in range(1, 50):
        x = make(batch=batch, seed=seed)
        result = merging_reference(model, x, layout, **plan)
        if all(stage.margin > MARGIN for stage in result.stages):
            return x, result
    raise AssertionError("the reference is at a tie for every seed")


def rewritten(
    model: nn.Module, plan: str, x: Any, reference: Reference | None = None, **options: Any
) -> Any:
    """`model` rewritten; what its reference says of cut and score is said to the compiler, too."""
    reference = reference or {}
    if "cut" in reference:
        options["cut"] = reference["cut"]
    if "merging" in reference and "score" not in options:  # some stages drop
        options["score"] = "mean" if layout_of(model).cls is None else "cls"
    return sv.rewrite(model, plan, example_inputs=x, **options)


def assert_merges(fast: Any, x: Any, wanted: ReferenceResult, tolerance: float = TOLERANCE) -> None:
    """Same output and same tokens as the reference."""
    with torch.no_grad():
        got = fast(x)
    assert type(got) is type(wanted.output)
    assert relative_error(got, wanted.output) < tolerance
    assert_same_merges(sv.trace_tokens(fast, x), wanted.stages)


def text_of(amounts: tuple[int, ...], back: int | None) -> str:
    """The plan of a run of `tome_vit`."""
    stages = {layer: r for layer, r in enumerate(amounts, 1) if r}
    layers, numbers = (",".join(map(str, part)) for part in (stages.keys(), stages.values()))
    return f"{layers}({numbers}){'' if back is None else f'+{back}'}+merged"


def gradients(model: nn.Module, loss: Any) -> dict[str, Tensor]:
    model.zero_grad()
    loss().square().sum().backward()
    return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


class Products(TorchDispatchMode):
    """Keeps the dtypes of the operands of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.baddbmm):
            self.dtypes |= {arg.dtype for arg in args if isinstance(arg, Tensor)}
        return func(*args, **(kwargs or {}))


def assert_same_gradients(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    scale = max(float(grad.abs().max()) for grad in wanted.values())
    for key, grad in wanted.items():
        assert float((got[key] - grad).abs().max()) < TOLERANCE * scale, key


# -- the references ---------------------------------------------------------------------------------------------------


def assert_same_groups(stages: Any, literal: MergedImages, prefix: int) -> None:
    """Positions, owners and sizes, from the lists of patches."""
    for stage in stages:
        images = literal.tokens[stage.layer - 1]
        assert stage.kept.tolist() == [[token[0] for token in tokens] for tokens in images]
        row_of = [
            {patch: prefix + row for row, token in enumerate(tokens) for patch in token}
            for tokens in images
        ]
        assert stage.owner.tolist() == [[rows[p] for p in sorted(rows)] for rows in row_of]
        if isinstance(stage, MergeResult):
            assert stage.sizes.tolist() == [[len(token) for token in tokens] for tokens in images]


@pytest.mark.parametrize(("amounts", "back"), LITERAL)
@pytest.mark.parametrize("name", PLAIN)
@torch.no_grad()
def test_both_references_agree(name: str, amounts: tuple[int, ...], back: int | None) -> None:
    model, x = BY_NAME[name].build(), BY_NAME[name].input()
    stages = [(layer, r) for layer, r in enumerate(amounts, 1) if r]
    generic = merging_reference(model, x, layout_of(model), stages=stages, return_layer=back)
    literal = tome_vit(model, x, amounts, back)
    assert relative_error(generic.output, literal.output) < 2e-6
    assert_same_groups(generic.stages, literal, model.num_prefix_tokens)


def test_both_references_have_the_same_gradients() -> None:
    model, x = BY_NAME["vit"].build(), BY_NAME["vit"].input()
    stages = [(1, 8), (2, 5), (3, 3)]
    generic = partial(merging_reference, model, x, layout_of(model), stages=stages, return_layer=4)
    wanted = gradients(model, lambda: tome_vit(model, x, (8, 5, 3, 0), 4).output)
    assert_same_gradients(gradients(model, lambda: generic().output), wanted)


ALL = [*FAMILIES, TORCHVISION]


@pytest.mark.parametrize("family", ALL, ids=names(ALL))
@torch.no_grad()
def test_the_reference_is_the_model_if_nothing_is_merged(family: Family) -> None:
    model, x = family.build(), family.input()
    result = merging_reference(model, x, layout_of(model), stages=[(1, 0), (3, "0.01")])
    assert relative_error(result.output, model(x)) < 1e-6
    merged = merging_reference(model, x, layout_of(model), stages=[(1, 3), (3, "0.2")])
    assert relative_error(merged.output, result.output) > 1e-3
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


class NoSizesInAttention(MergingRun):
    def logits_sizes(self) -> Tensor | None:
        return None


class NoSizesInHead(MergingRun):
    def head_sizes(self, length: int) -> Tensor | None:
        return None


class PlainMean(MergingRun):
    def weights_of(self, sizes: Tensor) -> Tensor:
        return torch.ones_like(sizes)


class DestinationsFirst(MergingRun):
    def following(self, kept_sources: Tensor, destinations: Tensor) -> Tensor:
        return torch.cat([destinations, kept_sources])


class OriginalOrder(MergingRun):
    def following(self, kept_sources: Tensor, destinations: Tensor) -> Tensor:
        return super().following(kept_sources, destinations).sort().values


class MergedTokensSeen(MergingRun):
    def hidden(self) -> Tensor | None:
        return None


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        *(("vit", wrong) for wrong in (NoSizesInAttention, PlainMean, MergedTokensSeen)),
        *(("eva02", wrong) for wrong in (DestinationsFirst, OriginalOrder)),
        ("siglip-map", NoSizesInHead),
        ("cait", NoSizesInHead),
    ],
)
@torch.no_grad()
def test_a_wrong_reference_is_told_apart(name: str, wrong: type[MergingRun]) -> None:
    model, x = BY_NAME[name].build(), BY_NAME[name].input()
    plan = PLANS["1-4(3)+merged"]
    right = merging_reference(model, x, layout_of(model), **plan)
    other = merging_reference(model, x, layout_of(model), run=wrong, **plan)
    assert relative_error(other.output, right.output) > 1e-3


# -- the compiler -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("amounts", "back"), LITERAL)
@pytest.mark.parametrize("name", PLAIN)
@torch.no_grad()
def test_exact_to_the_letter(name: str, amounts: tuple[int, ...], back: int | None) -> None:
    model, x = BY_NAME[name].build(), BY_NAME[name].input()
    fast = rewritten(model, text_of(amounts, back), x)
    literal = tome_vit(model, x, amounts, back)
    assert relative_error(fast(x), literal.output) < EXACT
    assert_same_groups(sv.trace_tokens(fast, x), literal, model.num_prefix_tokens)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("plan", PLANS)
def test_exact_then_off(plan: str, name: str) -> None:
    family = BY_NAME[name]
    model = family.build(rate=0.1)
    keys = list(model.state_dict())
    fast = rewritten(model, plan, family.input(batch=2), PLANS[plan])
    with torch.no_grad():
        x, wanted = reference_of(model, PLANS[plan], make=family.input)
        assert_merges(fast, x, wanted)
        with sv.skipping(fast, False):
            assert torch.equal(fast(x), model(x))
            assert torch.equal(fast.graph_forward(x), model(x)), "the graph itself"
            torch.manual_seed(3)
            wanted = model.train()(x)
            torch.manual_seed(3)
            assert torch.equal(fast.train().graph_forward(x), wanted)
    assert list(fast.state_dict()) == keys


@pytest.mark.slow
@pytest.mark.parametrize("plan", BLOCKS)
@pytest.mark.parametrize(
    "name", ["vit", "dinov2-reg4", "beit", "rope-axial", "cait", "parallel-scaling"]
)
def test_exact_if_whole_layers_merge(name: str, plan: str) -> None:
    family = BY_NAME[name]
    model = family.build()
    fast = rewritten(model, plan, family.input(), BLOCKS[plan])
    with torch.no_grad():
        assert_merges(fast, *reference_of(model, BLOCKS[plan], make=family.input))


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["1-4(3)+merged", "1,3(30%,5)+4+merged"])
@pytest.mark.parametrize("family", ALL, ids=names(ALL))
def test_exact_for_every_family(family: Family, plan: str) -> None:
    model = family.build()
    try:
        fast = rewritten(model, plan, family.input(batch=2))
    except UnsupportedModelError:
        assert family.name not in NAMES
        return
    with torch.no_grad():
        assert_merges(fast, *reference_of(model, PLANS[plan], make=family.input))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "dinov2-reg4", "siglip-map", "beit", "rope-axial"])
@pytest.mark.parametrize("plan", ["1-4(3)+merged", "1-3(3)+5+merged"])
def test_exact_if_exported_first(plan: str, name: str) -> None:
    family = BY_NAME[name]
    model = family.build()
    fast = rewritten(model, plan, family.input(batch=2), frontend="export")
    with torch.no_grad():
        assert_merges(fast, *reference_of(model, PLANS[plan], make=family.input))


class BaddbmmAttention(Projections):
    """Product, scale and bias in one operator."""

    def __init__(self) -> None:
        super().__init__()
        self.pos_bias = nn.Parameter(torch.zeros(TOKENS, TOKENS))

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = (
            self.split(part(x)).reshape(b * self.heads, n, -1)
            for part in (self.to_q, self.to_k, self.to_v)
        )
        logits = torch.baddbmm(self.pos_bias, q, k.transpose(1, 2), beta=0.5, alpha=self.scale)
        y = torch.bmm(logits.softmax(-1), v).view(b, self.heads, n, c // self.heads)
        return self.out(self.join(y))


class TransposedLogits(Projections):
    """Keys times queries."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.to_q(x)), self.split(self.to_k(x)), self.split(self.to_v(x))
        weights = (k @ q.transpose(-2, -1) * self.scale).softmax(dim=-2)
        return self.out(self.join(weights.transpose(-2, -1) @ v))


class TransposedValues(Projections):
    """Everything transposed: channels before tokens."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.split(part(x)).mT for part in (self.to_q, self.to_k, self.to_v))
        weights = torch.matmul(q.mT, k).mul(self.scale).softmax(dim=-1)
        return self.out(self.join((v @ weights.mT).mT))


class BooleanMask(Projections):
    """Each token sees some of the others, by a table."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        seen = torch.rand(TOKENS, TOKENS, generator=torch.Generator().manual_seed(5)) < 0.7
        self.register_buffer("seen", seen | torch.eye(TOKENS, dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.to_q(x)), self.split(self.to_k(x)), self.split(self.to_v(x))
        return self.out(self.join(F.scaled_dot_product_attention(q, k, v, attn_mask=self.seen)))


class FloatMask(Projections):
    """A learned bias, given to the fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.pos_bias = nn.Parameter(torch.zeros(1, HEADS, TOKENS, TOKENS))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.to_q(x)), self.split(self.to_k(x)), self.split(self.to_v(x))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.pos_bias, scale=0.3)
        return self.out(self.join(y))


class GroupedQueries(Projections):
    """Two heads of keys for four of queries."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.to_k, self.to_v = nn.Linear(DIM, DIM // 2), nn.Linear(DIM, DIM // 2)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q = self.split(self.to_q(x))
        k, v = (
            part(x).reshape(b, n, 2, c // self.heads).transpose(1, 2)
            for part in (self.to_k, self.to_v)
        )
        if self.how == "fused":
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        elif self.how == "repeated":
            k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
            y = (q @ k.mT * self.scale).softmax(-1) @ v
        else:
            k, v = (part[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for part in (k, v))
            y = F.scaled_dot_product_attention(q, k, v)
        return self.out(self.join(y))


def _spelled(name: str, make: Any) -> Example:
    return Example(name, lambda: Odd([Block(make()) for _ in range(DEPTH)]))


SPELLINGS = [
    _spelled("baddbmm", BaddbmmAttention),
    _spelled("transposed-logits", TransposedLogits),
    _spelled("transposed-values", TransposedValues),
    _spelled("boolean-mask", BooleanMask),
    _spelled("float-mask", FloatMask),
    *(
        _spelled(f"grouped-{how}", partial(GroupedQueries, how))
        for how in ("fused", "repeated", "expanded")
    ),
]
WHOLE = ("grid-output", "flatten-head")  # these read every patch at the end


def check_odd(example: Example, plan: str, reference: Reference) -> None:
    model = example.build()
    fast = rewritten(model, plan, image(), score="cls", cut=reference.get("cut", "attention"))
    with torch.no_grad():
        x, wanted = reference_of(model, reference, model.layout())
        assert_merges(fast, x, wanted)
        with sv.skipping(fast, False):
            assert torch.equal(fast.graph_forward(x), model(x))


@pytest.mark.parametrize(
    "alike",
    [
        ("plain", "einsum", "heads-last", "merged-heads", "sequence-first", "literal-sizes"),
        ("plain", "transposed-logits", "transposed-values"),
        ("grouped-fused", "grouped-repeated", "grouped-expanded"),
    ],
    ids=lambda alike: alike[1],
)
@torch.no_grad()
def test_the_reference_finds_keys_in_any_spelling(alike: tuple[str, ...]) -> None:
    examples = {example.name: example for example in (*GOOD, *SPELLINGS)}
    first, *others = (
        reference_of(model, PLANS["1-4(3)+merged"], model.layout())[1]
        for model in (examples[name].build() for name in alike)
    )
    for other in others:
        assert relative_error(other.output, first.output) < 2e-6
        for a, b in zip(other.stages, first.stages, strict=True):
            assert torch.equal(a.kept, b.kept)


@pytest.mark.parametrize("example", [*GOOD, *SPELLINGS], ids=str)
@pytest.mark.parametrize("plan", ["1-4(3)+merged", "1-3(3)+5+merged", "1,3(30%,5)+4+merged"])
@pytest.mark.slow
def test_exact_in_any_spelling(plan: str, example: Example) -> None:
    if plan == "1-4(3)+merged" and example.name in WHOLE:
        pytest.skip("its head reads all patches")
    check_odd(example, plan, PLANS[plan])


@pytest.mark.slow
@pytest.mark.parametrize(
    "example", [e for e in (*GOOD, *SPELLINGS) if e.name not in WHOLE], ids=str
)
def test_exact_in_any_spelling_of_whole_layers(example: Example) -> None:
    check_odd(example, "1,2(4,3)+4+merged", BLOCKS["1,2(4,3)+4+merged"])


@pytest.mark.slow
@pytest.mark.parametrize("example", EITHER, ids=str)
def test_exact_or_refused(example: Example) -> None:
    plan = "1-3(3)+5+merged"
    model = example.build()
    try:
        fast = rewritten(model, plan, image())
    except UnsupportedModelError:
        return
    with torch.no_grad():
        assert_merges(fast, *reference_of(model, PLANS[plan], model.layout()))


@pytest.mark.parametrize("name", ["siglip-map", "reg4-map", "cait", "naflex-map", "pe-core"])
@pytest.mark.slow
def test_the_head_attends_in_proportion(name: str) -> None:
    family = BY_NAME[name]
    model = family.build()
    fast = rewritten(model, "1-4(3)+merged", family.input())
    with torch.no_grad():
        assert_merges(fast, *reference_of(model, PLANS["1-4(3)+merged"], make=family.input))


@pytest.mark.parametrize("name", ["vit", "siglip-map", "rope-axial", "eva-gqa"])
@pytest.mark.slow
def test_without_proportional_attention(name: str) -> None:
    family = BY_NAME[name]
    model = family.build()
    plan = {**PLANS["1-4(3)+merged"], "proportional": False}
    fast = rewritten(model, "1-4(3)+merged", family.input(), proportional_attention=False)
    with torch.no_grad():
        assert_merges(fast, *reference_of(model, plan, make=family.input))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit-no-pos", "siglip-map", "siglip-gap", "cait"])
def test_equal_tokens_lose_nothing_by_merging(name: str) -> None:
    """As many equal tokens weigh as much as one of their size, in all layers and in the head."""
    family = BY_NAME[name]
    model = family.build()
    if getattr(model, "pos_embed", None) is not None:
        nn.init.zeros_(model.pos_embed)
    for key, parameter in model.named_parameters():
        if key.endswith("proj_w.bias"):  # what CaiT adds to the weight of each token, of any size
            nn.init.zeros_(parameter)
    x = torch.ones(2, 3, *family.image) * torch.tensor([0.5, -1.0]).view(2, 1, 1, 1)
    fast = rewritten(model, "1-4(5)+merged", family.input(batch=2))
    with torch.no_grad():
        assert relative_error(fast(x), model(x)) < EXACT
        merged = merging_reference(
            model, x, layout_of(model), stages=[(i, 5) for i in (1, 2, 3, 4)]
        )
        assert relative_error(merged.output, model(x)) < EXACT


@pytest.mark.parametrize("name", ["vit", "siglip-map", "rope-axial", "beit", "eva-gqa", "cait"])
@pytest.mark.parametrize("plan", ["1-4(3)+merged", "1(4)+3+merged;3,4(5)+merged"])
def test_gradients(plan: str, name: str) -> None:
    """Through the means as through the rest, and not through the choice."""
    family = BY_NAME[name]
    model = family.build()
    fast = rewritten(model, plan, family.input())
    x, result = reference_of(model, PLANS[plan], make=family.input)
    wanted = gradients(model, lambda: result.output)
    assert_same_gradients(gradients(model, lambda: fast(x)), wanted)


def test_gradients_of_patches_that_return() -> None:
    """Each token is the state of several patches there, and gets the gradients of all."""
    model, x = BY_NAME["vit"].build(), BY_NAME["vit"].input()
    fast = rewritten(model, "1,2(8,5)+3+merged", x)
    wanted = gradients(model, lambda: tome_vit(model, x, (8, 5, 0, 0), 3).output)
    assert_same_gradients(gradients(model, lambda: fast(x)), wanted)


@pytest.mark.slow
def test_training_with_merging_on() -> None:
    family = BY_NAME["vit"]
    model, x = family.build(rate=0.1), family.input()
    fast = rewritten(model, "1-3(4)+merged", x).train()
    torch.manual_seed(0)
    first = fast(x)
    torch.manual_seed(1)
    assert not torch.equal(fast(x), first)
    first.square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


@pytest.mark.parametrize(
    ("plan", "left"),
    [
        ("1(80%)+merged", [12]),
        ("1(20)+3+merged", [12]),
        ("1-4(50%)+merged", [12, 6, 3, 2]),
        ("1-4(9)+merged", [15, 8, 4, 2]),
        ("1,2(10%,30%)+merged", [22, 16]),
        ("1(20)+2+merged;2,3(20)+merged", [12, 12, 6]),
    ],
)
@pytest.mark.slow
def test_never_more_than_half_leaves(plan: str, left: list[int]) -> None:
    model, x = BY_NAME["vit"].build(), BY_NAME["vit"].input()
    stages = sv.trace_tokens(rewritten(model, plan, x), x)
    assert [stage.kept.shape[1] for stage in stages] == left


@pytest.mark.parametrize(
    ("amount", "present", "merged"),
    [("0.5", 24, 12), ("0.8", 24, 12), (20, 24, 12), ("0.3", 11, 3), (9, 11, 5), (3, 1, 0)],
)
def test_counts(amount: Any, present: int, merged: int) -> None:
    assert merge_count(amount, present) == merged


@pytest.mark.parametrize("name", ["vit", "dinov2-reg4", "siglip-map", "deit-distilled"])
@pytest.mark.slow
def test_every_patch_is_in_one_token(name: str) -> None:
    """Sizes add up over stages, and the place of a destination is the place of its token."""
    family = BY_NAME[name]
    model, x = family.build(), family.input()
    prefix = layout_of(model).prefix
    stages = sv.trace_tokens(rewritten(model, "1-4(4)+merged", x), x)
    before = torch.arange(24).expand(3, -1)
    for stage in stages:
        together = torch.cat([stage.kept, stage.dropped], 1).sort(1).values
        assert torch.equal(together, before.sort(1).values)
        before = stage.kept
        rows = stage.kept.shape[1]
        assert stage.owner.shape == (3, 24)
        assert stage.owner.min() == prefix
        assert stage.owner.max() == prefix + rows - 1
        sizes = torch.stack([row.bincount(minlength=rows) for row in stage.owner - prefix])
        assert sizes.min() > 0
        assert torch.equal(sizes.sum(1), torch.full((3,), 24))
        of_kept = stage.owner.gather(1, stage.kept) - prefix
        assert torch.equal(of_kept, torch.arange(rows).expand(3, -1))
    assert sizes.max() > 2


@pytest.mark.slow
def test_each_image_is_merged_alone() -> None:
    model, x = BY_NAME["rope-axial"].build(), BY_NAME["rope-axial"].input()
    fast = rewritten(model, "1-4(3)+merged", x)
    (first, *_) = sv.trace_tokens(fast, x)
    assert len(set(map(tuple, first.kept.tolist()))) > 1
    with torch.no_grad():
        alone = torch.cat([fast(one[None]) for one in x])
        assert relative_error(fast(x), alone) < EXACT


@pytest.mark.slow
def test_another_image_size() -> None:
    model = BY_NAME["vit-dynamic"].build()
    fast = rewritten(model, "1-3(25%)+5+merged", BY_NAME["vit-dynamic"].input())
    larger = Family("larger", "vit_tiny_patch16_224", image=(96, 80))
    plan: Reference = {"stages": [(i, "0.25") for i in (1, 2, 3)], "return_layer": 5}
    with torch.no_grad():
        x, wanted = reference_of(model, plan, make=larger.input)
        assert relative_error(fast(x), wanted.output) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.slow
def test_low_precision(dtype: torch.dtype) -> None:
    model = BY_NAME["vit"].build().to(dtype)
    x = BY_NAME["vit"].input().to(dtype)
    fast = rewritten(model, "1-4(3)+merged", x, validate=False)
    with torch.no_grad():
        out, whole = fast(x), model(x)
    assert out.dtype == dtype
    assert out.isfinite().all()
    assert relative_error(out, whole) < 0.2  # merging as such changes 5 %


@pytest.mark.slow
def test_autocast() -> None:
    model, x = BY_NAME["vit"].build(), BY_NAME["vit"].input()
    fast = rewritten(model, "1-4(3)+merged", x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out, whole = fast(x), model(x)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, whole) < 0.2


# -- plans, schedules, reports, files ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "1(8)+merged",
        "1-4(8)+merged",
        "1-4(8)+5+merged",
        "2(50%)+merged",
        "1(4)+3+merged;3,4(5)+merged",
        "1(30%)+2;2-4(3)+merged",
    ],
)
def test_plans_round_trip(text: str) -> None:
    plan = sv.Plan.parse(text)
    assert sv.Plan.parse(str(plan)) == plan
    assert str(plan).count("+merged") == text.count("+merged")
    assert plan != sv.Plan.parse(text.replace("+merged", ""))


@pytest.mark.parametrize(
    "text",
    ["1(8)+merged+3", "1(8)+merged+fused", "1(8)+fused+merged", "1(8)+merged+merged", "1+merged"],
)
def test_plans_that_are_none(text: str) -> None:
    with pytest.raises(PlanError) as error:
        sv.Plan.parse(text)
    assert error.value.hint


def test_no_attention_has_keys_in_front_of_the_first_layer() -> None:
    with pytest.raises(SkipViTError) as error:
        sv.rewrite(BY_NAME["vit"].build(), "0(8)+merged", score="random")
    assert error.value.hint


@pytest.mark.slow
def test_a_plan_that_merges_nothing_is_the_model() -> None:
    model, x = BY_NAME["vit"].build(), BY_NAME["vit"].input()
    fast = rewritten(model, "1,3(0)+merged", x)
    with torch.no_grad():
        assert torch.equal(fast(x), model(x))


@pytest.mark.slow
def test_reports_count_tokens() -> None:
    model, x = BY_NAME["vit"].build(), BY_NAME["vit"].input()
    report = sv.inspect(rewritten(model, "1-4(3)+merged", x, eliminate_dead_tokens=False))
    assert report.plan == str(sv.Plan.parse("1-4(3)+merged"))
    assert [layer.attention_tokens for layer in report.layers] == [25, 22, 19, 16]
    assert [layer.ffn_tokens for layer in report.layers] == [22, 19, 16, 13]
    assert report.macs < report.baseline_macs
    back = sv.inspect(rewritten(model, "1,2(5,30%)+4+merged", x, eliminate_dead_tokens=False))
    assert [layer.attention_tokens for layer in back.layers] == [25, 20, 15, 25]
    assert [layer.ffn_tokens for layer in back.layers] == [20, 15, 15, 25]


@pytest.mark.slow
def test_a_schedule_raises_amounts() -> None:
    model, x = BY_NAME["vit"].build(), BY_NAME["vit"].input()
    fast = rewritten(model, "1(9)+2+merged;2,3(50%)+merged", x)
    schedule = sv.SkipSchedule(fast, 1, ramp_epochs=2)
    counts = []
    for epoch in (1, 2, 3):
        schedule.step(epoch)
        counts.append([] if epoch == 1 else [s.dropped.shape[1] for s in sv.trace_tokens(fast, x)])
    assert counts == [[], [4, 6, 4], [9, 12, 6]]
    plan: Reference = {"stages": [(1, 9), (2, "0.5"), (3, "0.5")], "return_layer": 2}
    with torch.no_grad():
        assert_merges(fast, *reference_of(model, plan, make=BY_NAME["vit"].input))
        schedule.step(1)
        assert torch.equal(fast(x), model(x))


@pytest.mark.parametrize("plan", ["1-4(3)+merged", "1(4)+3+merged;3,4(5)+merged"])
@pytest.mark.slow
def test_files_and_copies(plan: str, tmp_path: Path) -> None:
    family = BY_NAME["siglip-map"]
    model, x = family.build(), family.input()
    fast = rewritten(model, plan, x)
    sv.save(fast, tmp_path / "fast.safetensors")
    again = sv.load(tmp_path / "fast.safetensors", family.build(seed=1))
    torch.save(fast, tmp_path / "fast.pt")
    pickled = torch.load(tmp_path / "fast.pt", weights_only=False)
    with torch.no_grad():
        for other in (again, pickled, copy.deepcopy(fast)):
            assert_same_bits(other(x), fast(x))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("plan", ["1-4(3)+merged", "1,2(3,10%)+3+merged;3(30%)"])
def test_compiled(plan: str, backend: str) -> None:
    model, x = BY_NAME["vit"].build(), BY_NAME["vit"].input()
    fast = rewritten(model, plan, x, PLANS[plan])
    compiled = torch.compile(fast, fullgraph=True, backend=backend)
    with torch.no_grad():
        assert relative_error(compiled(x), fast(x)) < EXACT
    wanted = gradients(model, lambda: fast(x))
    assert_same_gradients(gradients(model, lambda: compiled(x)), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "siglip-map", "rope-axial", "beit"])
@pytest.mark.parametrize("plan", ["1-4(3)+merged", "1-3(3)+5+merged"])
def test_onnx(plan: str, name: str, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    family = BY_NAME[name]
    model = family.build()
    with torch.no_grad():
        x, wanted = reference_of(model, PLANS[plan], make=family.input)
    fast = rewritten(model, plan, x)
    sv.export_onnx(fast, tmp_path / "fast.onnx", example_inputs=x)
    proto = onnx.load(tmp_path / "fast.onnx")
    graphs = [proto.graph, *proto.functions]
    operators = {node.op_type for graph in graphs for node in graph.node}
    assert not {name for name in operators if "Scatter" in name}
    session = onnxruntime.InferenceSession(tmp_path / "fast.onnx")
    (out, *_) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert relative_error(torch.from_numpy(out), wanted.output) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "vit-unfused", "rope-axial", "beit"])
def test_the_file_for_ascend_says_what_one_without_merging_says(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    family = BY_NAME[name]
    model, x = family.build(), family.input(batch=2)
    found = {}
    for plan in ("1,2(30%)+4", "1,2(30%)+4+merged"):
        fast = sv.rewrite(model, plan, example_inputs=x)
        path = tmp_path / "fast.onnx"
        written = sv.export_onnx(fast, path, target="ascend", example_inputs=x, verify=True)
        assert written.difference is not None
        assert written.check is not None
        assert written.difference < TOLERANCE
        assert not written.check.of("fail")
        assert written.check.attentions[0] == written.check.attentions[1]
        found[plan] = {finding.rule.id for finding in written.check.findings}
    dropped, merged = found.values()
    assert merged == dropped


@pytest.mark.slow
def test_the_length_is_a_multiple() -> None:
    family = BY_NAME["vit"]
    model, x = family.build(), family.input()
    fast = sv.rewrite(model, "1-3(30%)+merged", example_inputs=x, multiple_of=4)
    lengths = [layer.ffn_tokens for layer in sv.inspect(fast).layers]
    assert lengths[:3] == [20, 16, 12]


def test_hidden_states_under_a_merge_have_the_state_of_the_owner_for_every_patch() -> None:
    model, x = Tiny(hidden=1).eval(), torch.rand(2, 3, 16, 16)
    fast = sv.rewrite(model, "1(50%)+3+merged", example_inputs=x, fill_taps=True)
    (stage,) = sv.trace_tokens(fast, x)
    assert stage.owner is not None
    with torch.no_grad():
        hidden = fast(x)[1][:, 1:]
    for state, owner in zip(hidden, stage.owner, strict=True):
        same = (state[:, None] == state).all(-1)
        assert torch.equal(same, owner[:, None] == owner)
        assert len(owner.unique()) == 8


@pytest.mark.slow
def test_the_file_for_onnx_names_the_patches_that_are_left(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model, x = Tiny().eval(), torch.rand(2, 3, 16, 16)
    fast = sv.rewrite(model, "1,2(4)+merged", example_inputs=x)
    sv.export_onnx(fast, tmp_path / "fast.onnx", example_inputs=x, expose_kept=True)
    session = onnxruntime.InferenceSession(tmp_path / "fast.onnx")
    _, *kept = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    traces = sv.trace_tokens(fast, x)
    assert len(kept) == len(traces) == 2
    for positions, stage in zip(kept, traces, strict=True):
        assert torch.equal(torch.from_numpy(positions).long(), stage.kept)


@pytest.mark.slow
def test_no_product_of_integers() -> None:
    """Neither in the graph nor while it is validated: CUDA has none."""
    model, x = BY_NAME["vit"].build(), BY_NAME["vit"].input()
    with Products() as products:
        fast = sv.rewrite(model, "1-3(3)+5+merged", example_inputs=x)
        fast(x).sum().backward()
    assert torch.float32 in products.dtypes
    assert all(dtype.is_floating_point for dtype in products.dtypes)
