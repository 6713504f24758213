"""Which row scores: the one that the head reads, whatever it is called and in whatever order it was registered."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import skipvit_fx
from skipvit_fx import UnsupportedModelError, find_attention
from support.models import BY_NAME, scramble
from support.odd_models import DIM, PATCHES, AddPosition, Block, Sdpa, SequenceFirst, image
from support.reference import Layout, masked_reference, plan_text, relative_error

LAYERS = 2
PLAN: dict[str, Any] = {"stages": [(1, "0.4"), (2, "0.3")], "return_layer": 3}
Read = Callable[[Tensor, int], Tensor]


class Rows(nn.Module):
    """A ViT whose sequence is put together from named rows.

    Args:
        front, back: name and number of the rows before the patches and after them, in joined order.
        read: what the head takes from the normed sequence, given how many rows stand in front.
        registered: the names in the order in which the parameters are registered; by default as they are joined.
        inserted: these of `front` are put in after the first row in a second step, as DINOv2 does with registers.
        leaf: whether a module of its own joins them, which tracing does not enter.
        sequence_first: whether the layers see ``[tokens, batch, channels]``.
    """

    def __init__(
        self,
        front: Sequence[tuple[str, int]],
        back: Sequence[tuple[str, int]] = (),
        *,
        read: Read,
        registered: Sequence[str] | None = None,
        inserted: Sequence[str] = (),
        leaf: bool = False,
        sequence_first: bool = False,
    ) -> None:
        super().__init__()
        self.read, self.sequence_first = read, sequence_first
        self.stem = Stem([*front], [*back], registered, inserted)
        self.leaf = leaf
        attention = SequenceFirst if sequence_first else Sdpa
        self.blocks = nn.ModuleList(Block(attention()) for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, 10)
        self.prefix, self.suffix = (sum(n for _, n in rows) for rows in (front, back))

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image) if self.leaf else self.stem.forward(image)
        x = x.transpose(0, 1) if self.sequence_first else x
        for block in self.blocks:
            x = block(x)
        x = x.transpose(0, 1) if self.sequence_first else x
        y: Tensor = self.head(self.read(self.norm(x), self.prefix))
        return y

    def layout(self, row: int | None) -> Layout:
        """What the reference is told, given the row that scores."""
        blocks: list[Any] = list(self.blocks)
        mid = [block.middle() for block in blocks]
        dim = 0 if self.sequence_first else 1
        return Layout(blocks, mid, self.prefix, self.suffix, row, dim)


class Stem(nn.Module):
    """Patches, with the other rows joined to them, and positions."""

    def __init__(
        self,
        front: list[tuple[str, int]],
        back: list[tuple[str, int]],
        registered: Sequence[str] | None,
        inserted: Sequence[str],
    ) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, DIM, 8, 8)
        rows = dict([*front, *back])
        for name in registered or rows:
            setattr(self, name, nn.Parameter(torch.zeros(1, rows[name], DIM)))
        self.front = [name for name, _ in front if name not in inserted]
        self.back, self.inserted = [name for name, _ in back], inserted
        self.pos = nn.Parameter(
            torch.zeros(1, PATCHES + sum(rows[n] for n in (*self.front, *self.back)), DIM)
        )

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed(image).flatten(2).transpose(1, 2)
        front, inserted, back = (
            [getattr(self, name).expand(x.shape[0], -1, -1) for name in names]
            for names in (self.front, self.inserted, self.back)
        )
        x = torch.cat([*front, x, *back], dim=1) + self.pos
        if inserted:
            x = torch.cat([x[:, :1], *inserted, x[:, 1:]], dim=1)
        return x


def at(row: int) -> Read:
    """Reads one row."""
    return lambda x, _: x[:, row]


def average(x: Tensor, prefix: int) -> Tensor:
    return x[:, prefix:].mean(1)


def everything(x: Tensor, _: int) -> Tensor:
    return x


def whole_prefix(x: Tensor, prefix: int) -> Tensor:
    return x[:, :prefix].mean(1)


def sliced(x: Tensor, _: int) -> Tensor:
    return x[:, 0:1].squeeze(1)


def prefix_first(x: Tensor, prefix: int) -> Tensor:
    """The whole prefix is taken and normed, and one row of that."""
    return torch.relu(x[:, :prefix])[:, 2]


def two(x: Tensor, _: int) -> Tensor:
    return x[:, 1] + x[:, 2]


def split(x: Tensor, prefix: int) -> Tensor:
    first, others = x.split([1, x.shape[1] - 1], dim=1)
    return first[:, 0] + others.mean(1) * 0


def add_last(x: Tensor, prefix: int) -> Tensor:
    return x[:, 0] + x[:, -1]


def last_to_all(x: Tensor, prefix: int) -> Tensor:
    return (x + x[:, -1:]).mean(1)


CLS, REG, DIST = ("cls_token", 1), ("reg_token", 4), ("dist_token", 1)
Case = tuple[dict[str, Any], int | None, str]
CASES: dict[str, Case] = {
    "plain": ({"front": [CLS], "read": at(0)}, 0, "read by the head"),
    "unnamed": ({"front": [("a", 1)], "read": at(0)}, 0, "read by the head"),
    "registers-first": ({"front": [REG, CLS], "read": at(4)}, 4, "read by the head"),
    "registers-registered-first": (
        {"front": [CLS, REG], "registered": ["reg_token", "cls_token"], "read": average},
        0,
        "guessed from the name 'stem.cls_token'",
    ),
    "class-token-called-register": (
        {"front": [("reg_token", 1), ("b", 3)], "read": at(0)},
        0,
        "read by the head",
    ),
    "inserted-registers": (
        {"front": [CLS, REG], "inserted": ["reg_token"], "read": at(0)},
        0,
        "read",
    ),
    "inserted-registers-average": (
        {"front": [CLS, REG], "inserted": ["reg_token"], "read": average},
        0,
        "guessed from the name 'stem.cls_token'",
    ),
    "registers-then-class-average": (
        {"front": [REG, CLS], "read": average},
        4,
        "guessed from the name 'stem.cls_token'",
    ),
    "storage": ({"front": [("storage_tokens", 4)], "read": average}, None, "registers"),
    "memory": ({"front": [("memory", 2), ("mem_2", 1)], "read": everything}, None, "registers"),
    "one-register": ({"front": [("reg_token", 1)], "read": average}, None, "registers"),
    "region": ({"front": [("region_embedding", 1)], "read": average}, 0, "guessed from the name"),
    "class-embedding": (
        {"front": [DIST, ("class_embedding", 1)], "read": average},
        1,
        "class_embed",
    ),
    "classes-is-no-word": ({"front": [REG, ("classy", 1)], "read": at(1)}, 1, "read by the head"),
    "distilled": ({"front": [CLS, DIST], "read": two}, 1, "read by the head"),
    "slice": ({"front": [CLS, REG], "read": sliced}, 0, "read by the head"),
    "prefix-then-row": (
        {"front": [("a", 2), ("b", 3)], "read": prefix_first},
        2,
        "read by the head",
    ),
    "split": ({"front": [("a", 1), ("b", 2)], "read": split}, 0, "read by the head"),
    "whole-prefix": ({"front": [CLS, REG], "read": whole_prefix}, 0, "guessed from the name"),
    "at-the-end": ({"front": [], "back": [("a", 1)], "read": at(-1)}, PATCHES, "read by the head"),
    "at-the-end-of-registers": (
        {"front": [REG], "back": [("b", 2), CLS], "read": at(-1)},
        4 + PATCHES + 2,
        "read by the head",
    ),
    "at-the-end-of-unnamed": (
        {"front": [("a", 2)], "back": [CLS], "read": at(-1)},
        2 + PATCHES,
        "read by the head",
    ),
    "both-ends": ({"front": [("a", 2)], "back": [CLS], "read": at(1)}, 1, "read by the head"),
    "back-unread": ({"front": [], "back": [CLS], "read": average}, None, "reads none of the rows"),
    "register-behind-added": (
        {"front": [CLS], "back": [REG], "read": add_last},
        0,
        "read by the head",
    ),
    "no-rows": ({"front": [], "read": average}, None, "all rows are patches"),
}
STYLES: dict[str, dict[str, Any]] = {
    "seen": {},
    "leaf": {"leaf": True},
    "sequence-first": {"sequence_first": True},
    "leaf-sequence-first": {"leaf": True, "sequence_first": True},
}


def build(options: dict[str, Any], style: str = "seen") -> Rows:
    model = Rows(**options, **STYLES[style])
    scramble(model)
    for module in model.modules():  # rows with names that scrambling does not know
        if isinstance(module, Stem):
            for name, parameter in module.named_parameters(recurse=False):
                if name != "pos":
                    parameter.data = torch.randn(parameter.shape) * 2
    return model.eval()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _styles() -> list[Any]:
    """Every case in one style, alternating; in the others in the slow tests."""
    return [
        pytest.param(name, style, marks=[] if i % len(STYLES) == j else pytest.mark.slow)
        for (i, name), (j, style) in itertools.product(enumerate(CASES), enumerate(STYLES))
    ]


@pytest.mark.parametrize(("name", "style"), _styles())
@pytest.mark.slow
def test_row_and_reason(name: str, style: str) -> None:
    options, row, reason = CASES[name]
    model, x = build(options, style), image(batch=3)
    fast = skipvit_fx.rewrite(
        model, plan_text(PLAN["stages"], PLAN["return_layer"]), example_inputs=(image(),)
    )
    report = skipvit_fx.inspect(fast)
    assert report.class_token.startswith("none: " if row is None else f"row {row}: ")
    assert reason in report.class_token
    assert f"class token: {report.class_token}" in str(report)
    with torch.no_grad():
        wanted = masked_reference(model, x, model.layout(row), **PLAN)
        assert wanted.stages[0].dropped.shape[1]
        assert relative_error(fast(x), wanted.output) < 1e-5


@pytest.mark.parametrize("name", ["registers-first", "at-the-end", "storage"])
@pytest.mark.slow
def test_reports(name: str) -> None:
    options, row, _ = CASES[name]
    report = find_attention(build(options), example_inputs=(image(),))
    assert report.class_token is (row is not None)
    assert f"class token ({report.scored_by})" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["scored_by"] == report.scored_by
    fast = skipvit_fx.rewrite(build(options), "1(50%)+3", example_inputs=(image(),))
    assert skipvit_fx.inspect(fast).to_dict()["class_token"] == report.scored_by


@pytest.mark.slow
@pytest.mark.parametrize("name", ["registers-first", "at-the-end-of-registers"])
def test_exported(name: str) -> None:
    options, row, reason = CASES[name]
    model, x = build(options), image(batch=3)
    fast = skipvit_fx.rewrite(model, "1(50%)+3", example_inputs=(image(),), frontend="export")
    assert skipvit_fx.inspect(fast).class_token == f"row {row}: {reason}"
    with torch.no_grad():
        wanted = masked_reference(model, x, model.layout(row), stages=[(1, "0.5")], return_layer=3)
        assert relative_error(fast(x), wanted.output) < 1e-5


AMBIGUOUS = {"front": [("a", 2), ("prompts", 3)], "read": average}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (AMBIGUOUS, r"stem\.a, stem\.prompts"),
        (
            {"front": [CLS], "back": [REG], "read": last_to_all},
            r"row \d+, .*reg_token\), but .*cls",
        ),
        ({"front": [("a", 1)], "back": [("b", 1)], "read": at(-1)}, r"row \d+, .*stem\.a"),
    ],
    ids=["nothing-read", "register-behind", "unnamed-behind"],
)
@pytest.mark.slow
def test_what_cannot_be_told_is_refused_with_the_ways_out(
    options: dict[str, Any], named: str
) -> None:
    model = build(options)
    with pytest.raises(UnsupportedModelError, match=named) as caught:
        skipvit_fx.rewrite(model, "1(50%)+3", example_inputs=(image(),))
    for way_out in ("score='cls'", "score='mean'", "prefix_tokens=N"):
        assert way_out in caught.value.hint
    with pytest.raises(UnsupportedModelError, match=named) as caught:
        skipvit_fx.rewrite(
            model,
            "1(50%)+3",
            example_inputs=(image(),),
            score=lambda tokens, attention: attention.mean(1),
        )
    assert caught.value.hint.startswith("pass prefix_tokens=N")
    assert not find_attention(model, example_inputs=(image(),)).class_token


@pytest.mark.parametrize(
    "score", ["received", "keys", "values", lambda tokens, *, keys: keys.mean((1, 3))]
)
@pytest.mark.slow
def test_scores_that_need_no_class_token_need_not_know_it(score: Any) -> None:
    model = build(AMBIGUOUS)
    fast = skipvit_fx.rewrite(model, "1(50%)+3", example_inputs=(image(),), score=score)
    assert "validated" in str(skipvit_fx.inspect(fast))


@pytest.mark.parametrize(("score", "row"), [("cls", 0), ("mean", None)])
def test_the_ways_out_work(score: Any, row: int | None) -> None:
    model, x = build(AMBIGUOUS), image(batch=3)
    fast = skipvit_fx.rewrite(model, "1(50%)+3", example_inputs=(image(),), score=score)
    with torch.no_grad():
        wanted = masked_reference(model, x, model.layout(row), stages=[(1, "0.5")], return_layer=3)
        assert relative_error(fast(x), wanted.output) < 1e-5


@pytest.mark.parametrize("score", ["random", lambda patches: patches.norm(dim=-1)])
@pytest.mark.slow
def test_other_scores_do_not_ask(score: Any) -> None:
    for plan, scored in (("1(50%)+3", {"score": score}), ("", {})):
        fast = skipvit_fx.rewrite(build(AMBIGUOUS), plan, example_inputs=(image(),), **scored)
        assert skipvit_fx.inspect(fast).class_token.startswith("none: ")


@pytest.mark.parametrize("name", ["storage", "no-rows", "back-unread"])
def test_no_class_token_to_score_with(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match="needs a class token") as caught:
        skipvit_fx.rewrite(
            build(CASES[name][0]), "1(50%)+3", example_inputs=(image(),), score="cls"
        )
    assert "score='mean'" in caught.value.hint


@pytest.mark.slow
def test_what_is_computed_and_not_used_is_not_read() -> None:
    class Wasteful(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x[:, 3]
            return x.mean(1)

    head = Wasteful()
    model = build({"front": [REG, CLS], "read": lambda x, _: head(x)})
    model.add_module("pool", head)
    report = find_attention(model, example_inputs=(image(),))
    assert report.scored_by == "row 4: guessed from the name 'stem.cls_token'"


def test_a_flipped_sequence_is_not_read_by_place() -> None:
    options = {"front": [("a", 1), ("b", 2)], "read": lambda x, _: x.flip(1)[:, -1]}
    model = build(options)
    assert find_attention(model, example_inputs=(image(),)).class_token is False


def test_a_sample_and_a_channel_are_no_rows() -> None:
    options = {"front": [REG, CLS], "read": lambda x, p: x[:, p:].mean(1) + x[..., 2:3].mean(1)}
    report = find_attention(build(options), example_inputs=(image(),))
    assert report.scored_by.startswith("row 4: guessed")


class PositionedTwice(Rows):
    """Adds positions in a leaf after the layers, and reads a row of that."""

    def __init__(self) -> None:
        super().__init__([("a", 1)], read=at(0))
        self.late = AddPosition()

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem.forward(image)
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(self.head_in(self.late(x)))
        return y

    def head_in(self, x: Tensor) -> Tensor:
        """Through a linear layer over all rows."""
        return self.blocks[0].mlp(x)[:, 0]  # type: ignore[operator, index]


def test_rows_are_followed_through_what_keeps_them() -> None:
    model = scramble(PositionedTwice()).eval()
    assert find_attention(model, example_inputs=(image(),)).scored_by == "row 0: read by the head"


FAMILIES = {
    "vit": "row 0: read by the head",
    "vit-cls-avg": "row 0: guessed from the name 'cls_token'",
    "dinov2-reg4": "row 0: read by the head",
    "reg4-gap": "none: by their names, the rows before the patches are registers",
    "siglip-map": "none: all rows are patches",
    "deit-distilled": "row 0: read by the head",
    "dinov3": "row 0: guessed from the name 'cls_token'",
    "naflex-gap": "none: by their names, the rows before the patches are registers",
    "cait": "none: all rows are patches",
    "pe-core": "row 0: guessed from the name 'cls_token'",
}


@pytest.mark.parametrize("name", FAMILIES)
def test_families_keep_their_choice(name: str) -> None:
    family = BY_NAME[name]
    report = find_attention(family.build(), example_inputs=(family.input(),))
    assert report.scored_by == FAMILIES[name]
