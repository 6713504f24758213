"""Scores besides a row of attention: each equals one that is worked out without the compiler."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import skipvit_fx as sv
from skipvit_fx import scores
from skipvit_fx.options import Options
from support.checks import assert_matches, assert_same_bits
from support.models import BY_NAME, TORCHVISION, layout_of
from support.odd_models import DEPTH, EITHER, GOOD, TOKENS, Block, Example, Odd, Projections, image
from support.reference import Layout, relative_error
from support.scoring import Kind, of_everything, scored_reference

KINDS: dict[Kind, Any] = {
    "received": "received",
    "values": "values",
    "keys": "keys",
    "all": of_everything,
}
PLANS: dict[str, dict[str, Any]] = {
    "1,3(30%,40%)+4": {"stages": [(1, "0.3"), (3, "0.4")], "return_layer": 4},
    "1,2(30%,5)+3;3(40%)+5": {
        "stages": [(1, "0.3"), (2, 5), (3, "0.4")],
        "return_layer": (3, 5),
    },
    "2,4(40%,30%)": {"stages": [(2, "0.4"), (4, "0.3")]},
}
BLOCK = {"stages": [(1, "0.4"), (2, "0.25")], "return_layer": 4, "cut": "block"}
NAMES = [
    "vit",
    "vit-unfused",
    "vit-layerscale-qknorm",
    "dinov2-reg4",
    "siglip-map",
    "parallel-things",
    "beit",
    "beit-unfused",
    "eva02",
    "eva-gqa",
    "dinov3-token",
    "rope-mixed",
    "relpos-shared",
    "cait",
    "naflex-gap",
    "torchvision",
]


class Window(Projections):
    """Each token sees those near it and the first, by a mask of booleans."""

    near: Tensor

    def __init__(self) -> None:
        super().__init__()
        at = torch.arange(TOKENS)
        near = ((at[:, None] - at).abs() < 4) | (at == 0)
        near[0] = True
        self.register_buffer("near", near, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.split(p(x)) for p in (self.to_q, self.to_k, self.to_v))
        return self.out(self.join(F.scaled_dot_product_attention(q, k, v, attn_mask=self.near)))


class Grouped(Projections):
    """Two query heads share a head of keys and values."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.split(p(x)) for p in (self.to_q, self.to_k, self.to_v))
        y = F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], enable_gqa=True)
        return self.out(self.join(y))


def _example(name: str, make: Callable[[], nn.Module]) -> Example:
    return Example(name, lambda: Odd([Block(make()) for _ in range(DEPTH)]))


MORE = [_example("window", Window), _example("grouped", Grouped)]
ODD = {example.name: example for example in (*GOOD, *EITHER, *MORE)}
SPELLED = [
    "einsum",
    "heads-last",
    "merged-heads",
    "sequence-first",
    "registers-last",
    "learned-bias",
    "talking-heads",
    "rope-leaf",
    "rope-sliced",
    "cls-last",
    "shared-block",
    "window",
    "grouped",
]


def check(
    kind: Kind,
    model: Any,
    plan: str,
    reference: dict[str, Any],
    layout: Layout,
    make: Callable[[int], Tensor],
) -> None:
    """Same output, tokens and scores as the reference, on images for which no choice is close."""
    for seed in range(1, 20):
        x = make(seed)
        wanted = scored_reference(kind, model, x, layout, **reference)
        if all(stage.margin > 1e-4 for stage in wanted.stages):
            break
    fast = sv.rewrite(
        model, plan, example_inputs=x, score=KINDS[kind], cut=reference.get("cut", "attention")
    )
    assert_matches(fast, x, wanted)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_exact_on_every_family(kind: Kind, name: str, plan: str) -> None:
    family = TORCHVISION if name == "torchvision" else BY_NAME[name]
    model = family.build()
    check(kind, model, plan, PLANS[plan], layout_of(model), lambda seed: family.input(2, seed))


@pytest.mark.parametrize("name", ["vit", "siglip-map", "parallel-things"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_exact_if_whole_layers_score(kind: Kind, name: str) -> None:
    family = BY_NAME[name]
    model = family.build()
    plan = "1,2(40%,25%)+4"
    check(kind, model, plan, BLOCK, layout_of(model), lambda seed: family.input(2, seed))


@pytest.mark.parametrize("name", SPELLED)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_exact_in_any_spelling(kind: Kind, name: str) -> None:
    model = ODD[name].build()
    plan = "1,2(30%,5)+3;3(40%)+5"
    check(kind, model, plan, PLANS[plan], model.layout(), lambda seed: image(2, seed))


# -- functions --------------------------------------------------------------------------------------------------------


class Noted:
    """A score function that notes what it is given."""

    def __init__(self) -> None:
        self.given: list[dict[str, Tensor]] = []

    def __call__(
        self, tokens: Tensor, *, keys: Tensor, queries: Tensor, values: Tensor, attention: Tensor
    ) -> Tensor:
        named = {"keys": keys, "queries": queries, "values": values, "attention": attention}
        self.given.append({"tokens": tokens, **named})
        return tokens.sum(-1)


class Attentions(TorchFunctionMode):
    """Notes the queries, keys and values of every fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, ...]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            self.seen.append(args[:3])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["vit", "dinov2-reg4", "siglip-map", "eva02", "grouped"])
@torch.no_grad()
@pytest.mark.slow
def test_a_function_gets_what_it_names(name: str) -> None:
    """Of the patches, as the model itself multiplies them, prefix rows left out."""
    if name == "grouped":
        model: Any = ODD[name].build()
        layout, x = model.layout(), image()
    else:
        model, x = BY_NAME[name].build(), BY_NAME[name].input(2)
        layout = layout_of(model)
    noted = Noted()
    fast = sv.rewrite(model, "2(30%)+4", score=noted, example_inputs=x)
    fast(x)
    (given,) = noted.given[-1:]
    states: list[Tensor] = []
    at_cut = layout.mid[1].module.register_forward_pre_hook(lambda m, args: states.append(args[0]))
    with Attentions() as attentions:
        model(x)
    at_cut.remove()
    query, key, value = attentions.seen[1]
    first = layout.prefix
    torch.testing.assert_close(given["tokens"], states[0][:, first:])
    torch.testing.assert_close(given["queries"], query[:, :, first:])
    torch.testing.assert_close(given["keys"], key[:, :, first:])
    torch.testing.assert_close(given["values"], value[:, :, first:])
    row = query.mean(2) if layout.cls is None else query[:, :, layout.cls]
    keys = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = (row[:, :, None] * keys).sum(-1) / query.shape[-1] ** 0.5
    torch.testing.assert_close(given["attention"], logits.softmax(-1)[:, :, first:])
    assert given["keys"].shape[1] == (2 if name == "grouped" else query.shape[1])


def by_norm(tokens: Tensor) -> Tensor:
    return tokens.norm(dim=-1)


def by_attention(tokens: Tensor, *, attention: Tensor) -> Tensor:
    return attention.mean(1)


@pytest.mark.parametrize("name", ["vit", "vit-unfused", "siglip-map", "parallel-things"])
@torch.no_grad()
@pytest.mark.slow
def test_attention_averaged_over_heads_is_auto(name: str) -> None:
    model, x = BY_NAME[name].build(), BY_NAME[name].input(2)
    fast = [
        sv.rewrite(model, "1,3(30%,40%)+4", score=score, example_inputs=x)
        for score in ("auto", by_attention)
    ]
    ours, theirs = (sv.trace_tokens(module, x) for module in fast)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.kept, b.kept)
        torch.testing.assert_close(a.scores, b.scores)


class Learned(nn.Module):
    """A module that scores."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, tokens: Tensor, values: Tensor) -> Tensor:
        return tokens.norm(dim=-1) + self.weight * values.mean((1, 3))


def named_otherwise(keys: Tensor) -> Tensor:
    return keys.norm(dim=-1)


def with_default(tokens: Tensor, power: float = 2.0, **others: Any) -> Tensor:
    assert not others
    return tokens.norm(dim=-1) ** power


def everything(*args: Any, **kwargs: Any) -> Tensor:
    (tokens,) = args
    assert not kwargs
    return by_norm(tokens)


@pytest.mark.every_case
@pytest.mark.parametrize(
    ("function", "asked"),
    [
        (by_norm, ()),
        (by_attention, ("attention",)),
        (of_everything, ("keys", "queries", "values", "attention")),
        (named_otherwise, ()),
        (with_default, ()),
        (everything, ()),
        (torch.sum, ()),
        (Noted(), ("keys", "queries", "values", "attention")),
        (Learned(), ("values",)),
        (functools.partial(with_default, power=3.0), ()),
        (functools.partial(by_attention, attention=torch.ones(1)), ("attention",)),
        (lambda tokens, keys=None: tokens, ("keys",)),
        (lambda tokens, /, values, *rest, queries: tokens, ("values", "queries")),
    ],
)
def test_what_a_function_asks_for(function: Any, asked: tuple[str, ...]) -> None:
    assert scores.asked_by(function) == asked


@pytest.mark.every_case
@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda tokens, heads: tokens, "asks for 'heads'"),
        (lambda tokens, *, key: tokens, "asks for 'key'"),
        (lambda tokens, keys, /: tokens, "asks for 'keys'"),
        (lambda *, keys: keys, "takes no tokens"),
        (lambda: None, "takes no tokens"),
        (lambda **named: None, "takes no tokens"),
    ],
)
def test_a_function_that_cannot_be_called_is_refused(function: Any, why: str) -> None:
    for call in (
        lambda: Options(sv.Plan.parse("1(50%)"), score=function),
        lambda: sv.register_score("uncallable", function),
    ):
        with pytest.raises(sv.PlanError, match=why) as caught:
            call()
        assert "keys, queries, values, attention" in str(caught.value)
        assert "*, keys, attention" in caught.value.hint


@torch.no_grad()
@pytest.mark.slow
def test_functions_of_tokens_alone_in_front_of_layer_1() -> None:
    model, x = BY_NAME["vit"].build(depth=2), BY_NAME["vit"].input(2)
    embedded: list[Tensor] = []
    handle = model.blocks[0].register_forward_pre_hook(lambda m, args: embedded.append(args[0]))
    model(x)
    handle.remove()
    fast = sv.rewrite(model, "0(50%)", score=by_norm, example_inputs=x)
    (stage,) = sv.trace_tokens(fast, x)
    assert torch.equal(stage.scores, embedded[0][:, 1:].norm(dim=-1))


@pytest.mark.parametrize("score", ["received", "keys", "values", by_attention])
def test_what_reads_attention_in_front_of_layer_1_is_refused(score: Any) -> None:
    model, x = BY_NAME["vit"].build(depth=2), BY_NAME["vit"].input(2)
    with pytest.raises(sv.UnsupportedModelError, match="needs an attention") as caught:
        sv.rewrite(model, "0(50%)", score=score, example_inputs=x)
    assert "tokens alone" in caught.value.hint


@pytest.mark.slow
def test_no_gradient_flows_through_the_choice() -> None:
    """The parameters of a score get none, and those of the model what they get of the kept tokens."""
    model, x, score = BY_NAME["vit"].build(depth=3), BY_NAME["vit"].input(2), Learned()
    found = []
    for function in (score, lambda tokens, values: score(tokens, values).detach()):
        fast = sv.rewrite(model, "2(40%)+3", score=function, example_inputs=x)
        model.zero_grad()
        fast(x).square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert score.weight.grad is None
    assert found[0]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("score", KINDS.values(), ids=KINDS)
def test_off_it_is_the_model(score: Any) -> None:
    model, x = BY_NAME["vit"].build(depth=3), BY_NAME["vit"].input(2)
    fast = sv.rewrite(model, "1,2(30%,40%)+3", score=score, example_inputs=x)
    with torch.no_grad(), sv.skipping(fast, False):
        assert_same_bits(fast(x), model(x))
        assert_same_bits(fast.graph_forward(x), model(x))


def draws(tokens: Tensor, *, keys: Tensor) -> Tensor:
    return torch.rand(tokens.shape[:2]) + keys.mean((1, 3))


@pytest.mark.slow
def test_functions_may_draw_random_numbers() -> None:
    """Validation runs them, and leaves no trace."""
    model, x = BY_NAME["vit"].build(depth=3), BY_NAME["vit"].input(2)
    before = torch.random.get_rng_state()
    fast = sv.rewrite(model, "1,2(30%,40%)+3", score=draws, example_inputs=x)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert "validated" in str(sv.inspect(fast))


@pytest.mark.slow
def test_the_matrix_is_counted() -> None:
    """Of four heads of ``[25, 16] @ [16, 25]`` each, as against one row."""
    model, x = BY_NAME["vit"].build(depth=2), BY_NAME["vit"].input(2)
    macs = [
        sv.inspect(sv.rewrite(model, "1(40%)", score=score, example_inputs=x)).macs
        for score in ("cls", "received")
    ]
    assert macs[1] - macs[0] == 4 * 24 * 25 * 16


# -- tools ------------------------------------------------------------------------------------------------------------

TOOLS = {
    **{(kind, "vit"): score for kind, score in KINDS.items()},
    ("received", "beit"): "received",
    ("keys", "eva-gqa"): "keys",
    ("all", "vit-unfused"): of_everything,
}


@pytest.mark.slow
@pytest.mark.parametrize("case", TOOLS, ids="-".join)
def test_compiled(case: tuple[str, str]) -> None:
    family = BY_NAME[case[1]]
    model, x = family.build(depth=3), family.input(2)
    fast = sv.rewrite(model, "1,2(30%,40%)+3", score=TOOLS[case], example_inputs=x)
    torch._dynamo.reset()  # only so many compilations of one piece of code are kept
    compiled = torch.compile(fast, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert relative_error(compiled(x), fast(x)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnxruntime", "ascend"])
@pytest.mark.parametrize("case", TOOLS, ids="-".join)
def test_exported(case: tuple[str, str], target: Any, tmp_path: Path) -> None:
    family = BY_NAME[case[1]]
    model, x = family.build(depth=3), family.input(2)
    fast = sv.rewrite(model, "1,2(30%,40%)+3", score=TOOLS[case], example_inputs=x)
    file = sv.export_onnx(fast, tmp_path / "fast.onnx", example_inputs=x, target=target)
    session = onnxruntime.InferenceSession(str(file.path), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        wanted = fast(x).numpy()
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4 * abs(wanted).max())


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that are registered are forgotten afterwards."""
    monkeypatch.setattr(scores, "_functions", dict(scores._functions))


@pytest.mark.usefixtures("named")
def test_a_name_stands_for_its_function() -> None:
    assert sv.register_score("mine", of_everything) is of_everything
    sv.register_score("mine", of_everything)
    for score in ("mine", of_everything):
        options = Options(sv.Plan.parse("1(50%)"), score=score)
        assert options.score_function is of_everything
        assert options.score_asks == ("keys", "queries", "values", "attention")
        assert options.score_name == options.to_dict()["score"] == "mine"


@pytest.mark.usefixtures("named")
def test_names_that_cannot_be_given() -> None:
    sv.register_score("mine", of_everything)
    for name, function, why in [
        ("mine", by_norm, "that of another function"),
        ("auto", by_norm, "comes with skipvit_fx"),
        ("received", by_norm, "comes with skipvit_fx"),
        ("keys", scores.by_keys, "comes with skipvit_fx"),
        ("module:a:b", by_norm, "not a name"),
        ("", by_norm, "not a name"),
        (by_norm, by_norm, "not a name"),
        ("other", None, "must be a function"),
        ("other", "keys", "must be a function"),
    ]:
        with pytest.raises(sv.PlanError, match=why) as caught:
            sv.register_score(name, function)  # type: ignore[type-var]
        assert caught.value.hint
    with pytest.raises(sv.PlanError, match="'received', 'keys', 'values', 'random', 'mine'"):
        Options(sv.Plan.parse("1(50%)"), score="other")


@pytest.mark.usefixtures("named")
@pytest.mark.parametrize("score", ["received", "keys", "values", "mine", by_norm])
@pytest.mark.slow
def test_saved_by_name(score: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = BY_NAME["vit"]
    sv.register_score("mine", of_everything)
    sv.register_score("by-norm", by_norm)
    x, path = family.input(2), tmp_path / "fast.safetensors"
    fast = sv.rewrite(family.build(depth=3), "1,2(30%,40%)+3", score=score, example_inputs=x)
    sv.save(fast, path)
    back = sv.load(path, family.build(depth=3, seed=9))
    name = "by-norm" if score is by_norm else score
    assert sv.inspect(back).score == sv.inspect(fast).score == name
    with torch.no_grad():
        assert torch.equal(back(x), fast(x))
    monkeypatch.setattr(scores, "_functions", {n: scores._functions[n] for n in ("keys", "values")})
    if name in scores.BUILT_IN:
        sv.load(path, family.build(depth=3), validate=False)
        return
    with pytest.raises(sv.SavedModelError, match=f"{name!r} of the file is not registered") as no:
        sv.load(path, family.build(depth=3))
    assert f"skipvit_fx.register_score({name!r}, function)" in no.value.hint
