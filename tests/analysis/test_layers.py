"""Where layers begin and end: the author's blocks, however they differ, and what holds where there are none."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import skipvit_fx
from skipvit_fx import UnsupportedModelError
from support.checks import assert_exact
from support.models import scramble
from support.odd_models import DEPTH, DIM, AddPosition, Block, Mlp, Odd, Sdpa, Shared, image
from support.reference import Layout, Point, mark, plan_text

Plan = dict[str, Any]
PLANS: dict[str, Plan] = {
    "before-norm": {"stages": [(1, "0.3"), (3, "0.4")], "return_layer": DEPTH + 1},
    "block": {"stages": [(2, "0.5")], "return_layer": 3, "cut": "block"},
    "return": {"stages": [(1, "0.3"), (2, "0.3")], "return_layer": DEPTH},
    "last": {"stages": [(DEPTH, "0.5")], "return_layer": DEPTH + 1},
    "block-before-norm": {
        "stages": [(1, "0.3"), (DEPTH, "0.4")],
        "return_layer": DEPTH + 1,
        "cut": "block",
    },
    "never": {"stages": [(2, "0.5")]},
}


class Part(Block):
    """A block put together from choices. Its places are written down by hand, from the documented rule.

    Args:
        ffn: whether there is a feed-forward network.
        before: a feed-forward network in front of the attention as well (macaron).
        position: positions are added to the stream first.
        adapter: a token-wise module on the stream; ``"middle"`` between the two branches, ``"end"`` after them, both
            with a residual; ``"plain"`` after them, without.
        norms: ``"pre"`` or ``"post"``.
        beside: the feed-forward network reads what the attention reads.
        second: a second attention beside the first.
    """

    def __init__(
        self,
        *,
        ffn: bool = True,
        before: bool = False,
        position: bool = False,
        adapter: str = "",
        norms: str = "pre",
        beside: bool = False,
        second: bool = False,
    ) -> None:
        super().__init__()
        self.before = Mlp() if before else None
        self.position = AddPosition() if position else None
        self.adapter = Mlp() if adapter else None
        self.second = Sdpa() if second else None
        self.ffn, self.place, self.post, self.beside = ffn, adapter, norms == "post", beside

    def forward(self, x: Tensor) -> Any:
        if self.position is not None:
            x = self.position(x)
        if self.before is not None:
            x = x + 0.5 * self.before(x)
        x = self.attend(x)
        if self.adapter is not None and self.place == "middle":
            x = x + self.adapter(x)
        if self.ffn and not self.beside:
            x = self.norm2(x + self.mlp(x)) if self.post else x + self.mlp(self.norm2(x))
        if self.adapter is not None and self.place == "end":
            x = x + self.adapter(x)
        if self.adapter is not None and self.place == "plain":
            x = self.adapter(x)
        return x

    def attend(self, x: Tensor) -> Tensor:
        """The attention and its residual."""
        if self.post:
            out: Tensor = self.norm1(x + self.attn(x))
            return out
        y = self.norm1(x)
        out = x + self.attn(y)
        if self.second is not None:
            out = out + self.second(y)
        return out + self.mlp(y) if self.beside else out

    def middle(self) -> Point:
        if self.post:
            return Point(self.norm1, "output")
        if self.adapter is not None and (self.place == "middle" or not self.ffn):
            return Point(self.adapter)
        return Point(self.norm2) if self.ffn and not self.beside else Point(self, "output")


class Twice(Block):
    """Two attentions, one after the other, and one feed-forward network. Each attention is a layer, from the chain."""

    def __init__(self) -> None:
        super().__init__()
        self.norm3, self.other = nn.LayerNorm(DIM), Sdpa()

    def forward(self, x: Tensor) -> Tensor:
        x = mark(x, "input")
        x = mark(x + self.attn(self.norm1(x)), "cut", "end", "input")
        x = mark(x + self.other(self.norm3(x)), "cut")
        return mark(x + self.mlp(self.norm2(x)), "end")


class Pair(Part):
    """Hands its output on in a tuple, as blocks do that can also return their attention."""

    def forward(self, x: Tensor) -> Any:
        return mark(super().forward(mark(x, "input")), "end"), None

    def attend(self, x: Tensor) -> Tensor:
        return mark(super().attend(x), "cut")


class MarkedPart(Part):
    """The same among blocks that mark their places."""

    def forward(self, x: Tensor) -> Any:
        return mark(super().forward(mark(x, "input")), "end")

    def attend(self, x: Tensor) -> Tensor:
        return mark(super().attend(x), "cut")


def _layout(entry: Sequence[Any], mid: Sequence[Point], ends: Sequence[Point]) -> Layout:
    return Layout(entry, mid, 1, cls=0, ends=ends)


def _marked(depth: int = DEPTH) -> Layout:
    return Layout([nn.Identity()] * depth, (), 1, cls=0, marked=True)


def _of_blocks(blocks: Sequence[Any]) -> Layout:
    return _layout(blocks, [b.middle() for b in blocks], [Point(b, "output") for b in blocks])


class Blocks(Odd):
    """One block a layer; `between` are modules that stand after a block, outside it."""

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        between: dict[int, nn.Module] | None = None,
        *,
        residual: bool = True,
    ) -> None:
        super().__init__(blocks)
        self.between = nn.ModuleDict({str(at): module for at, module in (between or {}).items()})
        self.residual = residual

    def layers(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x)
            x = x[0] if isinstance(x, tuple) else x
            if str(i) in self.between:
                y = self.between[str(i)](x)
                x = x + y if self.residual else y
        return x

    def layout(self) -> Layout:
        return _of_blocks(self.blocks)


class Pairs(Blocks):
    """Blocks that return tuples."""

    def layout(self) -> Layout:
        return _marked()


class Nested(Odd):
    """Each block within a module of its own, with an adapter after some; two of these make a stage."""

    def __init__(self) -> None:
        wraps = [
            nn.Sequential(Block(), Residual(Mlp())) if i % 2 else nn.Sequential(Block())
            for i in range(DEPTH)
        ]
        super().__init__([nn.Sequential(*wraps[:2]), nn.Sequential(*wraps[2:])])

    def layout(self) -> Layout:
        wraps: list[Any] = [wrap for stage in self.blocks for wrap in stage]  # type: ignore[attr-defined]
        return _layout(
            wraps,
            [wrap[0].middle() for wrap in wraps],
            [Point(wrap, "output") for wrap in wraps],
        )


class Residual(nn.Module):
    """A branch and its residual in one module."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.norm, self.branch = nn.LayerNorm(DIM), branch

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.branch(self.norm(x))
        return y


class Halves(Odd):
    """Attention and its residual are one module, the feed-forward network and its own the next."""

    def __init__(self) -> None:
        super().__init__(Residual(part) for _ in range(DEPTH) for part in (Sdpa(), Mlp()))

    def layers(self, x: Tensor) -> Tensor:
        for i, half in enumerate(self.blocks):
            x = mark(half(mark(x, "input")), "cut") if i % 2 == 0 else mark(half(x), "end")
        return x

    def layout(self) -> Layout:
        return _marked()


class TwoEach(Odd):
    """Two attentions in every block."""

    def __init__(self) -> None:
        super().__init__(Twice() for _ in range(DEPTH // 2))

    def layout(self) -> Layout:
        return _marked()


class Mixed(Odd):
    """Blocks of one attention, and one of two."""

    def __init__(self) -> None:
        super().__init__([MarkedPart(adapter="end"), Twice(), MarkedPart(position=True)])

    def layout(self) -> Layout:
        return _marked()


class SpelledOut(Odd):
    """No module holds a layer: the forward of the model spells them all out.

    Args:
        adapters: layers with a token-wise adapter at their end.
        without: layers without feed-forward network.
        post: layers with their norms after the sums.
        position: whether positions are added in front of every attention.
        macaron: whether half a feed-forward network stands in front of every attention.
    """

    def __init__(
        self,
        *,
        adapters: Sequence[int] = (),
        without: Sequence[int] = (),
        post: Sequence[int] = (),
        position: bool = False,
        macaron: bool = False,
    ) -> None:
        super().__init__(Block() for _ in range(DEPTH))
        self.adapters = nn.ModuleDict({str(i): Mlp() for i in adapters})
        self.positions = nn.ModuleList(AddPosition() for _ in range(DEPTH if position else 0))
        self.halves = nn.ModuleList(Mlp() for _ in range(DEPTH if macaron else 0))
        self.without, self.post = without, post

    def layers(self, x: Tensor) -> Tensor:
        for i, b in enumerate(list[Any](self.blocks)):
            if len(self.positions):
                x = self.positions[i](x)
            if len(self.halves):
                x = x + self.halves[i](x) * 0.5
            x = mark(x, *(("end", "input") if i else ("input",)))
            x = b.norm1(x + b.attn(x)) if i in self.post else x + b.attn(b.norm1(x))
            x = mark(x, "cut")
            if i not in self.without:
                x = b.norm2(x + b.mlp(x)) if i in self.post else x + b.mlp(b.norm2(x))
            if str(i) in self.adapters:
                x = x + self.adapters[str(i)](x)
        return mark(x, "end")

    def layout(self) -> Layout:
        return _marked()


class OutsideNorm(Odd):
    """The norm stands outside the module that adds the attention, so that one begins within a branch."""

    class Join(nn.Module):
        """All of a layer except its first norm."""

        def __init__(self) -> None:
            super().__init__()
            self.attn, self.norm2, self.mlp = Sdpa(), nn.LayerNorm(DIM), Mlp()

        def forward(self, y: Tensor, x: Tensor) -> Tensor:
            x = mark(x + self.attn(y), "cut")
            return x + self.mlp(self.norm2(x))

    def __init__(self) -> None:
        super().__init__(self.Join() for _ in range(DEPTH))
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(DEPTH))

    def layers(self, x: Tensor) -> Tensor:
        for norm, join in zip(self.norms, self.blocks, strict=True):
            x = mark(x, "input")
            x = mark(join(norm(x), x), "end")
        return x

    def layout(self) -> Layout:
        return _marked()


class StemInside(Blocks):
    """The first block also joins the class token and adds positions, so it takes another sequence."""

    class Stem(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.cls_token = nn.Parameter(torch.zeros(1, 1, DIM))
            self.position, self.block = AddPosition(), block

        def forward(self, x: Tensor) -> Any:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
            return self.block(self.position(x))

    def __init__(self) -> None:
        super().__init__([self.Stem(Block()), *(Part(ffn=i != 1) for i in range(DEPTH - 1))])

    def forward(self, image: Tensor) -> Tensor:
        x = self.layers(self.embed(image).flatten(2).transpose(1, 2))
        y: Tensor = self.head(self.norm(x)[:, 0])
        return y

    def layout(self) -> Layout:
        first, *rest = list[Any](self.blocks)
        return _of_blocks([first.block, *rest])


class SharedPart(Shared):
    """One block, run four times, that begins with a sum."""

    def __init__(self) -> None:
        super().__init__([MarkedPart(position=True, adapter="end")])

    def layout(self) -> Layout:
        return _marked()


@dataclass(frozen=True)
class Variant:
    """A model, and the plans that need a place which its author does not tell."""

    make: Callable[[], Odd]
    refused: Sequence[str] = field(default=())

    def build(self) -> Odd:
        """The model, scrambled, in eval mode."""
        model = self.make()
        scramble(model)
        return model.eval()


def _some(options: Plan, *, at: Sequence[int] = (1, 3), **others: Any) -> Callable[[], Odd]:
    """A model whose layers at these indices (from 0) are built with other options than the rest."""
    return lambda: Blocks([Part(**(options if i in at else others)) for i in range(DEPTH)])


CHOICES: dict[str, Plan] = {
    "adapter": {"adapter": "end"},
    "adapter-middle": {"adapter": "middle"},
    "adapter-plain": {"adapter": "plain"},
    "no-ffn": {"ffn": False},
    "no-ffn-but-adapter": {"ffn": False, "adapter": "end"},
    "post-norm": {"norms": "post"},
    "macaron": {"before": True},
    "position": {"position": True},
    "position-macaron": {"position": True, "before": True, "adapter": "middle"},
    "ffn-beside": {"beside": True},
    "parallel-attention": {"second": True},
}
WHERE = {"all": range(DEPTH), "some": (1, 3), "first": (0,), "last": (DEPTH - 1,)}

VARIANTS: dict[str, Variant] = {
    **{
        f"{name}-{where}": Variant(_some(options, at=at))
        for (name, options), (where, at) in itertools.product(CHOICES.items(), WHERE.items())
    },
    "between": Variant(lambda: Blocks([Block() for _ in range(DEPTH)], {0: Mlp(), 1: Mlp()})),
    "between-plain": Variant(
        lambda: Blocks([Part(position=True) for _ in range(DEPTH)], {1: Mlp()}, residual=False)
    ),
    "between-ffn-first": Variant(
        lambda: Blocks(
            [Part(before=True, ffn=False) for _ in range(DEPTH)], {0: Mlp()}, residual=False
        )
    ),
    "after-the-last": Variant(
        lambda: Blocks([Block() for _ in range(DEPTH)], {1: Mlp(), 3: Mlp()})
    ),
    "pairs": Variant(lambda: Pairs([Pair(adapter="end", ffn=i != 1) for i in range(DEPTH)])),
    "nested": Variant(Nested),
    "halves": Variant(Halves),
    "two-each": Variant(TwoEach),
    "mixed": Variant(Mixed),
    "shared": Variant(SharedPart),
    "outside-norm": Variant(OutsideNorm),
    "stem-inside": Variant(StemInside),
    "spelled-out": Variant(SpelledOut),
    "spelled-out-adapters": Variant(lambda: SpelledOut(adapters=(1, 3))),
    "spelled-out-no-ffn": Variant(lambda: SpelledOut(without=(0, 3))),
    "spelled-out-position": Variant(lambda: SpelledOut(position=True)),
    "spelled-out-macaron": Variant(lambda: SpelledOut(macaron=True)),
    "spelled-out-post": Variant(lambda: SpelledOut(post=range(DEPTH))),
    "spelled-out-last-post": Variant(
        lambda: SpelledOut(post=(DEPTH - 1,)), ("before-norm", "last", "block-before-norm")
    ),
    "spelled-out-last-pre": Variant(
        lambda: SpelledOut(post=range(DEPTH - 1)), ("before-norm", "last", "block-before-norm")
    ),
}


def check(variant: Variant, name: str, frontend: Any) -> None:
    """A plan on a model equals the reference, or is refused if the model does not tell a place that it needs."""
    plan, model = PLANS[name], variant.build()
    text = plan_text(plan["stages"], plan.get("return_layer"))
    options: Plan = {"cut": plan.get("cut", "attention"), "frontend": frontend}
    try:
        fast = skipvit_fx.rewrite(model, text, example_inputs=(image(),), **options)
    except UnsupportedModelError as error:
        refusal = error
    else:
        assert frontend == "export" or name not in variant.refused
        assert_exact(fast, model, image(batch=3), model.layout(), plan)
        return
    assert name in variant.refused, refusal
    assert "the last layer is not a module" in refusal.reason
    assert "module of its own" in refusal.hint
    assert refusal.node


FAST = {
    "before-norm": "adapter-some no-ffn-last post-norm-last mixed outside-norm spelled-out-position",
    "block": "between between-ffn-first adapter-plain-some pairs spelled-out-adapters position-macaron-some",
    "return": "between-plain position-some shared nested stem-inside parallel-attention-last",
    "last": "adapter-last halves macaron-last spelled-out spelled-out-last-post after-the-last",
    "block-before-norm": "ffn-beside-some two-each spelled-out-post spelled-out-last-pre",
    "never": "adapter-middle-some no-ffn-but-adapter-some spelled-out-no-ffn spelled-out-macaron",
}
"""For each plan the variants that it tells most about; all others are slow."""


def _cases() -> Iterator[Any]:
    for name, plan in itertools.product(VARIANTS, PLANS):
        slow = name not in FAST[plan].split()
        yield pytest.param(name, plan, marks=[pytest.mark.slow] if slow else [])


def test_every_variant_has_a_fast_case() -> None:
    fast = {
        name.removesuffix("-some").removesuffix("-last")
        for f in FAST.values()
        for name in f.split()
    }
    assert fast >= {
        name.removesuffix("-some")
        for name in VARIANTS
        if not name.endswith(("-all", "-first", "-last"))
    }


@pytest.mark.parametrize(("name", "plan"), list(_cases()))
def test_layers(name: str, plan: str) -> None:
    check(VARIANTS[name], plan, "symbolic")


EXPORTED = ("adapter-last", "shared", "spelled-out-adapters")


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["before-norm", pytest.param("block", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in EXPORTED else pytest.mark.slow) for n in VARIANTS]
)
def test_exported_layers(name: str, plan: str) -> None:
    check(VARIANTS[name], plan, "export")


def test_the_plan_is_refused_only_where_it_needs_the_unknown_end() -> None:
    variant = VARIANTS["spelled-out-last-post"]
    assert set(variant.refused) < set(PLANS)
    report = skipvit_fx.find_attention(variant.build(), example_inputs=(image(),))
    assert len(report.layers) == DEPTH
    assert report.refusal is None


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("wrapped", [False, True])
def test_few_layers(depth: int, wrapped: bool) -> None:
    """A lone layer is held by every module around it: the layer is the block, and not the encoder with its norm."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.last = nn.Sequential(*blocks), nn.LayerNorm(DIM)

        def forward(self, x: Tensor) -> Any:
            return self.last(self.inner(x))

    blocks = [Part(adapter="end", position=True) for _ in range(depth)]
    model: Any = Odd([Encoder()] if wrapped else blocks)
    model.layout = lambda: _of_blocks(blocks)
    scramble(model).eval()
    plan: Plan = {"stages": [(depth, "0.5")], "return_layer": depth + 1}
    fast = skipvit_fx.rewrite(model, f"{depth}(50%)+{depth + 1}", example_inputs=(image(),))
    assert_exact(fast, model, image(batch=3), model.layout(), plan)


# -- what else takes a softmax --------------------------------------------------------------------


class Weighing(Sdpa):
    """Attention whose queries, or whose weights, an operator mixes beyond recognition."""

    def __init__(self, place: str, mix: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.place, self.mix = place, mix

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.to_q(x)), self.split(self.to_k(x)), self.split(self.to_v(x))
        q = self.mix(q) if self.place == "query" else q
        weights = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
        weights = self.mix(weights) if self.place == "weights" else weights
        return self.out(self.join(weights @ v))


class Gate(Mlp):
    """A feed-forward network with a softmax in it that is not an attention."""

    def __init__(self, gate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.gate(x))


MIXERS: dict[str, Callable[[Tensor], Tensor]] = {
    "samples": lambda x: x - x.mean(0, keepdim=True),
    "reversed": lambda x: x.flip(-2),
    "running": lambda x: x.cumsum(-2),
}
GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "of-a-sample": lambda x: x.flatten(1).softmax(-1).view_as(x) * 50,
    "of-channels-after-mixing": lambda x: x.flip(1).softmax(-1),
    "of-tokens": lambda x: x.softmax(1) * x.shape[-1],
    "of-pairs-summed": lambda x: (x @ x.mT).softmax(-1).sum() * 0.1,
    "of-samples-summed": lambda x: (
        (x.transpose(0, 1) @ x.transpose(0, 1).mT * 0.1).softmax(-1).sum() * 0 + x
    ),
    "of-pairs-summed-in-a-sample": lambda x: (x @ x.mT).softmax(-1).square().sum((1, 2), True),
}


@pytest.mark.parametrize("layer", [1, 3])
@pytest.mark.parametrize(
    ("place", "mixer"),
    [("weights", mixer) for mixer in MIXERS] + [("query", "reversed"), ("query", "running")],
)
@pytest.mark.slow
def test_an_attention_that_cannot_score_is_a_layer_all_the_same(
    place: str, mixer: str, layer: int
) -> None:
    attention = Weighing(place, MIXERS[mixer])
    model: Any = scramble(
        Blocks([Block(attention if i == layer - 1 else None) for i in range(DEPTH)])
    ).eval()
    report = skipvit_fx.find_attention(model, example_inputs=(image(),))
    assert len(report.layers) == DEPTH
    with pytest.raises(UnsupportedModelError, match=rf"layer {layer} cannot score"):
        skipvit_fx.rewrite(model, f"{layer}(50%)", example_inputs=(image(),))
    plan: Plan = {"stages": [(2 if layer == 1 else 1, "0.5")], "return_layer": 3}
    fast = skipvit_fx.rewrite(
        model, plan_text(plan["stages"], 3), example_inputs=(image(),), prefix_tokens=1
    )
    assert_exact(fast, model, image(batch=3), model.layout(), plan)
    assert len(skipvit_fx.inspect(fast).layers) == DEPTH


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.slow
def test_another_softmax_is_no_layer(gate: str) -> None:
    blocks = [Block(mlp=Gate(GATES[gate]) if i == 0 else None) for i in range(DEPTH)]
    model: Any = scramble(Blocks(blocks)).eval()
    plan: Plan = {"stages": [(2, "0.5")], "return_layer": 3}
    fast = skipvit_fx.rewrite(model, "2(50%)+3", example_inputs=(image(),), prefix_tokens=1)
    assert_exact(fast, model, image(batch=3), model.layout(), plan)
    assert len(skipvit_fx.inspect(fast).layers) == DEPTH


# -- what `inspect` says --------------------------------------------------------------------------

PLACES = [
    ("adapter-some", "2(50%)+4", "attention", "blocks.1.attn", "blocks.1.norm2", "blocks.3"),
    ("adapter-some", "2(50%)+5", "block", "blocks.1", "blocks.2", "norm"),
    (
        "adapter-middle-some",
        "2(50%)+3",
        "attention",
        "blocks.1.attn",
        "blocks.1.adapter",
        "blocks.2",
    ),
    ("post-norm-all", "2(50%)+4", "attention", "blocks.1.norm1", "blocks.1.mlp", "blocks.3"),
    ("between", "2(50%)", "block", "blocks.1", "between.1", None),
    ("halves", "2(50%)+4", "attention", "blocks.2", "blocks.3", "blocks.6"),
    ("two-each", "2(50%)+4", "attention", "blocks.0.other", "blocks.0.norm2", "blocks.1.norm3"),
    ("spelled-out", "2(50%)+5", "block", "blocks.1.mlp", "blocks.2.norm1", "norm"),
    ("nested", "2(50%)+4", "block", "blocks.0.1", "blocks.1", "blocks.1.1"),
]


@pytest.mark.parametrize("frontend", ["symbolic", pytest.param("export", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "plan", "cut", "after", "before", "back"), PLACES)
def test_places_by_modules(
    name: str, plan: str, cut: Any, after: str, before: str, back: str | None, frontend: Any
) -> None:
    model = VARIANTS[name].build()
    report = skipvit_fx.inspect(
        skipvit_fx.rewrite(model, plan, example_inputs=(image(),), cut=cut, frontend=frontend)
    )
    (stage,) = report.stages
    assert (stage.layer, stage.leave_after, stage.leave_before) == (2, after, before)
    assert stage.return_before == back
    returns = "never return" if back is None else f"return before {back}"
    assert f"layer 2: leave after {after}, before {before}; {returns}" in str(report).splitlines()
    (plain,) = report.to_dict()["stages"]
    assert plain == {
        "layer": 2,
        "leave_after": after,
        "leave_before": before,
        "return_before": back,
    }
