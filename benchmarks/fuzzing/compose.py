"""Models composed at random, as source code, and the same source with marks for the reference.

What the reference is told (where a layer begins, where tokens leave) follows from how the model was written: a layer is
its block, and tokens leave right after the sum that ends its attention. The twin has the marks and the same weights;
the model has no marks, so that the compiler cannot see them.
"""

from __future__ import annotations

import math
import random
import re
import sys
from dataclasses import dataclass, field, replace
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fuzzing import operators
from fuzzing.operators import Operator, draw
from support.models import scramble
from support.reference import Layout, Point

PATCH = 4
STYLES = (
    "pre",
    "pre",
    "pre",
    "post",
    "scaled",
    "sub-post",
    "parallel",
    "macaron",
    "no-ffn",
    "ffn-first",
)
ATTENTIONS = ("fused", "fused", "weights", "heads-last", "merged", "grouped", "module", "separate")
HEADS = (
    "first",
    "first",
    "first",
    "mean",
    "mean-all",
    "both",
    "tokens",
    "dict",
    "query",
    "hidden",
    "flatten",
)
SEQUENCE_PLACES = (
    "mlp",
    "hidden-layer",
    "attention",
    "joined",
    "start",
    "middle",
    "end",
    "branch",
    "between",
)
FRAME_PLACES = ("patches", "embedded", "normed")
HEAD_PLACES = ("query", "key", "value")


@dataclass(frozen=True)
class Placed:
    """An operator at a place; ``block`` counts from 1, and is 0 for the frame."""

    place: str
    block: int
    operator: Operator


@dataclass(frozen=True)
class Composition:
    """Everything that a composed model is made from.

    Attributes:
        grid: patches, rows and columns.
        channels, heads: of the layers.
        prefix, suffix: names of the rows joined before and after the patches; ``cls`` is the class token.
        position: ``"add"``, ``"patches"`` (before the prefix is joined) or ``"none"``.
        tokens_first: the layers work on ``[tokens, batch, channels]``.
        blocks: style of each layer.
        attentions: spelling of the attention of each layer.
        head: what is read at the end.
        placed: the operators.
    """

    grid: tuple[int, int]
    channels: int
    heads: int
    prefix: tuple[str, ...]
    suffix: tuple[str, ...]
    position: str
    tokens_first: bool
    blocks: tuple[str, ...]
    attentions: tuple[str, ...]
    head: str
    placed: tuple[Placed, ...]

    @property
    def kind(self) -> str:
        """The kind of model in the table of results."""
        return "composed"

    @property
    def depth(self) -> int:
        """Layers."""
        return len(self.blocks)

    @property
    def cls(self) -> int | None:
        """Row of the class token."""
        return self.prefix.index("cls") if "cls" in self.prefix else None

    def build(self) -> Built:
        """The model and its twin, scrambled, in eval mode, with the same weights."""
        source, marked = self.source(), self.source(marked=True)
        model, twin = _run(source), _run(marked)
        scramble(model)
        twin.load_state_dict(model.state_dict())
        middle = any(placed.place == "middle" for placed in self.placed)
        marks = ("fork", "sum") if middle else ("fork",)
        return Built(model.eval(), twin.eval(), partial(self._layout, twin), source, marks)

    def image(self, batch: int, seed: int) -> Tensor:
        """A batch of images."""
        generator = torch.Generator().manual_seed(seed)
        height, width = self.grid
        return torch.randn(batch, 3, height * PATCH, width * PATCH, generator=generator)

    def smaller(self) -> list[Composition]:
        """The same model with parts removed, the largest steps first."""
        found = []
        if self.depth > 2:
            found += [self._without_block(i) for i in range(1, self.depth + 1)]
        for i in range(len(self.placed)):
            found.append(replace(self, placed=self.placed[:i] + self.placed[i + 1 :]))
        plain: dict[str, Any] = {
            "tokens_first": False,
            "position": "none",
            "suffix": (),
            "prefix": ("cls",),
            "head": "first",
            "blocks": ("pre",) * self.depth,
            "attentions": ("fused",) * self.depth,
        }
        found += [
            replace(self, **{name: v}) for name, v in plain.items() if getattr(self, name) != v
        ]
        return found

    def _without_block(self, gone: int) -> Composition:
        def rest(items: tuple[str, ...]) -> tuple[str, ...]:
            return items[: gone - 1] + items[gone:]

        placed = tuple(
            replace(p, block=p.block - (p.block > gone)) for p in self.placed if p.block != gone
        )
        return replace(
            self, blocks=rest(self.blocks), attentions=rest(self.attentions), placed=placed
        )

    def _layout(self, twin: Any, at: str) -> Layout:
        """What the reference is told if tokens leave at the mark ``at`` of a layer: ``sum`` or ``fork``."""
        layers = range(1, self.depth + 1)
        marks = dict(twin.named_modules())
        axis = {"heads-last": 2}
        return Layout(
            blocks=[marks[f"start_{i}"] for i in layers],
            mid=[Point(marks[f"blocks.{i - 1}.{at}"]) for i in layers],
            prefix=len(self.prefix),
            suffix=len(self.suffix),
            cls=self.cls,
            token_dim=0 if self.tokens_first else 1,
            exit=Point(marks["exit"]),
            mixed=[
                (marks[f"blocks.{i - 1}.attn.weigh"], axis.get(self.attentions[i - 1], -1))
                for i in layers
                if f"blocks.{i - 1}.attn.weigh" in marks
            ],
        )

    # -- source -------------------------------------------------------------------------------------------------

    def source(self, *, marked: bool = False) -> str:
        """The model as a Python module that defines ``Model``; ``marked``: with marks for the reference."""
        return _Writer(self, marked).text()


@dataclass(frozen=True)
class Built:
    """A model, what the reference runs in its place, and its layout there.

    Attributes:
        model: for the compiler.
        twin: for the reference; the model itself, unless it has marks.
        layout: the layout, by the mark at which tokens leave.
        source: the source of the model, if it was composed.
        marks: those at which they may leave: the sum after an attention, and the value that both the feed-forward
            network and the connection past it read. An operator between the two may belong to either.
    """

    model: nn.Module
    twin: nn.Module
    layout: Any
    source: str = ""
    marks: tuple[str, ...] = ("fork",)


class Mark(nn.Module):
    """Does nothing, at a place that hooks can find."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def _run(source: str) -> Any:
    module = sys.modules["composed"] = ModuleType("composed")  # where classes are looked up
    vars(module).update(torch=torch, nn=nn, F=F, math=math, Mark=Mark)
    exec(compile(source, "<composed>", "exec"), vars(module))
    return module.Model()


@dataclass
class _Class:
    """Source of one class under construction."""

    init: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)
    methods: list[str] = field(default_factory=list)

    def text(self, name: str, arguments: str) -> str:
        init = [f"        {line}" for line in ("super().__init__()", *self.init)]
        body = [f"        {line}" for line in self.body]
        lines = [f"class {name}(nn.Module):", "    def __init__(self):", *init, ""]
        lines += [f"    def forward(self, {arguments}):", *body, *self.methods]
        return "\n".join(lines)


class _Writer:
    """Writes the source of a composition."""

    def __init__(self, spec: Composition, marked: bool) -> None:
        self.spec = spec
        self.marked = marked
        self.classes: dict[str, str] = {}  # text without its name: name

    def text(self) -> str:
        spec = self.spec
        rows, columns = spec.grid
        tokens = rows * columns + len(spec.prefix) + len(spec.suffix)
        values = (spec.channels, spec.heads, spec.channels // spec.heads, tokens, rows * columns)
        sizes = f"C, H, D, N, P = {', '.join(map(str, values))}"
        frame = self._frame(rows * columns).text("Model", "image")
        parts = [text.replace("NAME", name, 1) for text, name in self.classes.items()]
        return "\n\n\n".join([sizes, *parts, frame]) + "\n"

    def _named(self, kind: str, part: _Class, arguments: str = "x") -> str:
        text = part.text("NAME", arguments)
        return self.classes.setdefault(text, f"{kind}{len(self.classes) + 1}")

    def _operators(self, owner: _Class, place: str, block: int, x: str = "x", y: str = "") -> None:
        """Apply the operators at a place to the variable ``x`` (or ``y``, which may read ``x``)."""
        for placed in self.spec.placed:
            if (placed.place, placed.block) != (place, block):
                continue
            number = len(owner.methods) // 2 + 1
            code = placed.operator.code.replace("\n", "; ")
            if placed.operator.make:
                owner.init.append(f"self.m{number} = {placed.operator.make}")
            code = re.sub(r"\bM\b", f"self.m{number}", code)
            lines = code.split("; ") if "return " in code else [f"return {code}"]
            arguments = "y, x" if y else "x"
            owner.methods += [
                f"\n    def operator{number}(self, {arguments}):",
                "\n".join(f"        {line}" for line in lines),
            ]
            owner.body.append(f"{y or x} = self.operator{number}({f'{y}, {x}' if y else x})")

    def _mark(self, owner: _Class, name: str, x: str = "x") -> None:
        if self.marked:
            owner.init.append(f"self.{name} = Mark()")
            owner.body.append(f"{x} = self.{name}({x})")

    def _frame(self, patches: int) -> _Class:
        spec, frame = self.spec, _Class()
        frame.init.append(f"self.embed = nn.Conv2d(3, C, {PATCH}, {PATCH})")
        frame.body.append("x = self.embed(image).flatten(2).transpose(1, 2)")
        self._operators(frame, "patches", 0)
        if spec.position == "patches":
            frame.init.append(f"self.pos = nn.Parameter(torch.zeros(1, {patches}, C))")
            frame.body.append("x = x + self.pos")
        rows = [f"self.{name}_token" for name in (*spec.prefix, *spec.suffix)]
        frame.init += [f"{row} = nn.Parameter(torch.zeros(1, 1, C))" for row in sorted(set(rows))]
        if rows:
            parts = [f"{row}.expand(x.shape[0], -1, -1)" for row in rows]
            parts.insert(len(spec.prefix), "x")
            frame.body.append(f"x = torch.cat([{', '.join(parts)}], dim=1)")
        if spec.position == "add":
            frame.init.append("self.pos = nn.Parameter(torch.zeros(1, N, C))")
            frame.body.append("x = x + self.pos")
        if spec.tokens_first:
            frame.body.append("x = x.transpose(0, 1)")
        self._operators(frame, "embedded", 0)
        names = [self._block(i) for i in range(1, spec.depth + 1)]
        frame.init.append(f"self.blocks = nn.ModuleList([{', '.join(f'{n}()' for n in names)}])")
        hidden = spec.head == "hidden"
        frame.body += ["states = []"] * hidden
        simple = not self.marked and not hidden and all(p.place != "between" for p in spec.placed)
        if simple:
            frame.body += ["for block in self.blocks:", "    x = block(x)"]
        else:
            for i in range(1, spec.depth + 1):
                self._operators(frame, "between", i)
                self._mark(frame, f"start_{i}")
                frame.body += ["states.append(x)"] * hidden
                frame.body.append(f"x = self.blocks[{i - 1}](x)")
        self._mark(frame, "exit")
        frame.init.append("self.norm = nn.LayerNorm(C)")
        frame.body.append("x = self.norm(x)")
        if spec.tokens_first:
            frame.body.append("x = x.transpose(0, 1)")
        self._operators(frame, "normed", 0)
        self._head(frame, patches)
        return frame

    def _head(self, frame: _Class, patches: int) -> None:
        spec = self.spec
        first = len(spec.prefix)
        last = f"-{len(spec.suffix)}" if spec.suffix else ""
        width = "2 * C" if spec.head == "both" else "C"
        read = {
            "first": f"x[:, {spec.cls or 0}]",
            "mean": f"x[:, {first}:{last}].mean(1)",
            "mean-all": "x.mean(dim=1)",
            "both": f"torch.cat([x[:, {spec.cls or 0}], x[:, {first}:{last}].mean(1)], dim=-1)",
            "query": "F.scaled_dot_product_attention(self.query.expand(x.shape[0], -1, -1), x, x)[:, 0]",
            "hidden": f"x[:, {spec.cls or 0}]",
            "dict": f"x[:, {spec.cls or 0}]",
            "flatten": f"x[:, {first}:{last}].flatten(1)",
        }
        if spec.head == "tokens":
            frame.body.append("return x")
            return
        if spec.head == "query":
            frame.init.append("self.query = nn.Parameter(torch.zeros(1, 1, C))")
        frame.body.append(f"y = {read[spec.head]}")
        self._operators(frame, "pooled", 0, y="y")
        width = f"{patches} * C" if spec.head == "flatten" else width
        frame.init.append(f"self.head = nn.Linear({width}, 5)")
        returned = {
            "hidden": "self.head(y), states",
            "dict": '{"logits": self.head(y), "tokens": x}',
        }
        frame.body.append(f"return {returned.get(spec.head, 'self.head(y)')}")

    # -- blocks -------------------------------------------------------------------------------------------------

    def _block(self, i: int) -> str:
        style, block = self.spec.blocks[i - 1], _Class()
        block.init += ["self.norm1 = nn.LayerNorm(C)", f"self.attn = {self._attention(i)}()"]
        if style != "no-ffn":
            block.init += ["self.norm2 = nn.LayerNorm(C)", f"self.mlp = {self._mlp(i)}()"]
        self._operators(block, "start", i)
        getattr(self, f"_{style.replace('-', '_')}")(block, i)
        self._operators(block, "end", i)
        block.body.append("return x")
        return self._named("Block", block)

    def _middle(self, block: _Class, i: int) -> None:
        self._mark(block, "sum")
        self._operators(block, "middle", i)
        self._mark(block, "fork")

    def _branch(self, block: _Class, i: int, code: str) -> str:
        block.body.append(f"y = {code}")
        self._operators(block, "branch", i, x="y")
        return "y"

    def _pre(self, block: _Class, i: int) -> None:
        block.body.append(f"x = x + {self._branch(block, i, 'self.attn(self.norm1(x))')}")
        self._middle(block, i)
        block.body.append("x = x + self.mlp(self.norm2(x))")

    def _post(self, block: _Class, i: int) -> None:
        block.body.append(f"x = x + {self._branch(block, i, 'self.attn(x)')}")
        block.body.append("x = self.norm1(x)")
        self._middle(block, i)
        block.body.append("x = self.norm2(x + self.mlp(x))")

    def _scaled(self, block: _Class, i: int) -> None:
        block.init += [f"self.gain{k} = nn.Parameter(torch.ones(C))" for k in (1, 2)]
        branch = self._branch(block, i, "self.attn(self.norm1(x)) * self.gain1")
        block.body.append(f"x = self.gain2 * x + {branch}")
        self._middle(block, i)
        block.body.append("x = x * 0.5 + self.gain1 * self.mlp(self.norm2(x))")

    def _sub_post(self, block: _Class, i: int) -> None:
        block.init += ["self.norm3 = nn.LayerNorm(C)", "self.norm4 = nn.LayerNorm(C)"]
        branch = self._branch(block, i, "self.norm3(self.attn(self.norm1(x)))")
        block.body.append(f"x = x + {branch}")
        self._middle(block, i)
        block.body.append("x = x + self.norm4(self.mlp(self.norm2(x)))")

    def _parallel(self, block: _Class, i: int) -> None:
        block.body.append("z = self.norm1(x)")
        block.body.append(f"x = x + {self._branch(block, i, 'self.attn(z)')} + self.mlp(z)")
        self._middle(block, i)

    def _macaron(self, block: _Class, i: int) -> None:
        block.init += ["self.norm0 = nn.LayerNorm(C)", "self.mlp0 = nn.Linear(C, C)"]
        block.body.append("x = x + 0.5 * self.mlp0(self.norm0(x))")
        block.body.append(f"x = x + {self._branch(block, i, 'self.attn(self.norm1(x))')}")
        self._middle(block, i)
        block.body.append("x = x + 0.5 * self.mlp(self.norm2(x))")

    def _no_ffn(self, block: _Class, i: int) -> None:
        block.body.append(f"x = x + {self._branch(block, i, 'self.attn(self.norm1(x))')}")
        self._middle(block, i)

    def _ffn_first(self, block: _Class, i: int) -> None:
        block.body.append("x = x + self.mlp(self.norm2(x))")
        block.body.append(f"x = x + {self._branch(block, i, 'self.attn(self.norm1(x))')}")
        self._middle(block, i)

    def _mlp(self, i: int) -> str:
        mlp = _Class(["self.fc1 = nn.Linear(C, C)", "self.fc2 = nn.Linear(C, C)"])
        self._operators(mlp, "mlp", i)
        mlp.body.append("x = F.gelu(self.fc1(x))")
        self._operators(mlp, "hidden-layer", i)
        mlp.body.append("return self.fc2(x)")
        return self._named("Mlp", mlp)

    # -- attention ----------------------------------------------------------------------------------------------

    def _attention(self, i: int) -> str:
        kind, attn = self.spec.attentions[i - 1], _Class()
        first = self.spec.tokens_first
        self._operators(attn, "attention", i)
        if kind == "module":
            attn.init.append(f"self.inner = nn.MultiheadAttention(C, H, batch_first={not first})")
            attn.body.append("x = self.inner(x, x, x, need_weights=False)[0]")
            self._operators(attn, "joined", i)
            attn.body.append("return x")
            return self._named("Attention", attn)
        if first:
            attn.body.append("x = x.transpose(0, 1)")
        attn.body.append("b, n, c = x.shape")
        self._projections(attn, kind)
        for place, x in (("query", "q"), ("key", "k"), ("value", "v")):
            self._operators(attn, place, i, x=x)
        getattr(self, f"_{kind.replace('-', '_')}")(attn, i)
        if first:
            attn.body.append("x = x.transpose(0, 1)")
        self._operators(attn, "joined", i)
        attn.init.append("self.out = nn.Linear(C, C)")
        attn.body.append("return self.out(x)")
        return self._named("Attention", attn)

    def _projections(self, attn: _Class, kind: str) -> None:
        heads = "reshape(b, n, H, D).transpose(1, 2)"
        if kind == "separate":
            attn.init += [f"self.to_{x} = nn.Linear(C, C)" for x in "qkv"]
            attn.body += [f"{x} = self.to_{x}(x).{heads}" for x in "qkv"]
        elif kind == "grouped":
            attn.init += ["self.to_q = nn.Linear(C, C)", "self.to_kv = nn.Linear(C, C)"]
            attn.body.append(f"q = self.to_q(x).{heads}")
            attn.body.append(
                "k, v = self.to_kv(x).view(b, n, 2, H // 2, D).permute(2, 0, 3, 1, 4).unbind(0)"
            )
            attn.body += [f"{x} = {x}.repeat_interleave(2, 1)" for x in "kv"]
        else:
            attn.init.append("self.qkv = nn.Linear(C, 3 * C)")
            attn.body.append(
                "q, k, v = self.qkv(x).reshape(b, n, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)"
            )

    def _fused(self, attn: _Class, _i: int) -> None:
        attn.body.append("y = F.scaled_dot_product_attention(q, k, v)")
        attn.body.append("x = y.transpose(1, 2).reshape(b, n, c)")

    _grouped = _separate = _fused

    def _softmax(self, attn: _Class, i: int, axis: int) -> None:
        self._operators(attn, "logits", i, x="w")
        attn.body.append(f"w = w.softmax(dim={axis})")
        self._operators(attn, "weights", i, x="w")
        self._mark(attn, "weigh", x="w")

    def _weights(self, attn: _Class, i: int) -> None:
        attn.body.append("w = q @ k.transpose(-2, -1) * D**-0.5")
        self._softmax(attn, i, -1)
        attn.body.append("x = (w @ v).transpose(1, 2).reshape(b, n, c)")

    def _heads_last(self, attn: _Class, i: int) -> None:
        attn.body.append('w = torch.einsum("bhnd,bhmd->bnmh", q, k).mul(D**-0.5)')
        self._softmax(attn, i, 2)
        attn.body.append('x = torch.einsum("bnmh,bhmd->bnhd", w, v).flatten(2)')

    def _merged(self, attn: _Class, i: int) -> None:
        attn.body.append("q, k, v = (part.reshape(b * H, n, D) for part in (q, k, v))")
        attn.body.append("w = torch.bmm(q * D**-0.5, k.transpose(1, 2))")
        self._softmax(attn, i, -1)
        attn.body.append("x = torch.bmm(w, v).view(b, H, n, D).transpose(1, 2).reshape(b, n, c)")


# -- at random ------------------------------------------------------------------------------------------------------


def compose(rng: random.Random) -> Composition:
    """A random composition."""
    depth = rng.choice([2, 2, 3, 3, 4])
    prefix = rng.choice(
        [("cls",)] * 6 + [(), ("reg", "cls"), ("cls", "reg", "reg"), ("memory", "cls"), ("reg",)]
    )
    style = rng.choice(STYLES)
    styles = [style] * depth if rng.random() < 0.7 else [rng.choice(STYLES) for _ in range(depth)]
    attention = rng.choice(ATTENTIONS)
    same = rng.random() < 0.8
    attentions = [attention if same else rng.choice(ATTENTIONS) for _ in range(depth)]
    tokens_first = rng.random() < 0.15
    heads = HEADS if "cls" in prefix else ("mean", "mean-all", "tokens", "query", "flatten")
    grid = rng.choice([(3, 4), (4, 4), (2, 5), (3, 3)])
    channels = rng.choice([16, 24, 32])
    spec = Composition(
        grid=grid,
        channels=channels,
        heads=rng.choice([2, 4]),
        prefix=prefix,
        suffix=rng.choice([()] * 8 + [("reg",), ("tail", "tail")]),
        position=rng.choice(["add", "add", "patches", "none"]),
        tokens_first=tokens_first,
        blocks=tuple(styles),
        attentions=tuple(attentions),
        head=rng.choice(heads),
        placed=(),
    )
    tokens = grid[0] * grid[1] + len(spec.prefix) + len(spec.suffix)
    if tokens == channels:  # the reference recognises an attention by its square of all tokens
        spec = replace(spec, channels=channels + 8)
    count = rng.choice([0, 1, 1, 1, 2, 2, 3])
    return replace(spec, placed=tuple(_place(rng, spec) for _ in range(count)))


def _place(rng: random.Random, spec: Composition) -> Placed:
    block = rng.randint(1, spec.depth)
    axes = (0, 1) if spec.tokens_first else (1, 0)
    tables = (operators.APART, operators.TOGETHER)
    spelled_out = spec.attentions[block - 1] in ("weights",)
    opened = spec.attentions[block - 1] != "module"
    groups = ["sequence"] * 6 + ["frame", "pooled"] + ["heads"] * (2 * opened)
    groups += ["logits", "weights"] * (2 * spelled_out)
    group = rng.choice(groups)
    if group == "heads":
        operator = draw(rng, operators.HEADS_APART, operators.HEADS_TOGETHER)
        return Placed(rng.choice(HEAD_PLACES), block, operator)
    if group == "logits":
        return Placed("logits", block, draw(rng, operators.LOGITS))
    if group == "weights":
        return Placed("weights", block, draw(rng, operators.WEIGHTS))
    if group == "pooled" and spec.head in ("first", "mean", "mean-all", "query", "hidden", "dict"):
        return Placed("pooled", 0, draw(rng, operators.POOLED))
    if group == "frame":
        place = rng.choice(FRAME_PLACES)
        axes = axes if place == "embedded" else (1, 0)
        named = place == "embedded" and (
            spec.prefix or spec.suffix
        )  # rows that must stay where they are
        operator = draw(rng, *(tables[:1] if named else tables), axes=axes)
        if place == "patches":  # there is no prefix yet
            code, make = (re.sub(r"\bN\b", "P", text) for text in (operator.code, operator.make))
            operator = replace(operator, code=code, make=make)
        return Placed(place, 0, operator)
    return Placed(rng.choice(SEQUENCE_PLACES), block, draw(rng, *tables, axes=axes))
