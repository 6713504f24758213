"""A model so small that its whole graph can be read, and its graph as text."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from skipvit_fx.capture.opening import with_capture
from skipvit_fx.options import Options
from skipvit_fx.passes import passes_for
from skipvit_fx.plan import Plan
from skipvit_fx.rewriting.context import Context, start_rewrite
from skipvit_fx.rewriting.passes import Pass, run_passes

DIM = 8
TOKENS = 17


class Block(nn.Module):
    """Attention, then an MLP.

    Args:
        positions: queries are multiplied with a table that has a row for every token.
        sizes: how queries are reshaped to heads: ``literal``, with the number of tokens, and multiplied with what their
            shape says of it; ``read``, with what their shape says; or not at all, for one head.
    """

    def __init__(self, positions: bool = False, sizes: str = "") -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.q, self.k, self.v = (nn.Linear(DIM, DIM) for _ in range(3))
        self.mlp = nn.Sequential(nn.Linear(DIM, DIM), nn.GELU())
        self.register_buffer("table", torch.rand(TOKENS, DIM) if positions else None)
        self.sizes = sizes

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = self.q(h), self.k(h), self.v(h)
        if self.table is not None:
            q = q * self.table
        if self.sizes == "literal":
            q = (q * q.shape[1]).reshape(q.shape[0], TOKENS, 2, DIM // 2).flatten(2)
        elif self.sizes == "read":
            n = q.shape[1]
            q = q.reshape(q.shape[0], n, 2, DIM // 2).flatten(2)
        x = x + F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None]).squeeze(1)
        return x + self.mlp(self.norm2(x))


class Tiny(nn.Module):
    """Three layers; the class token is classified. ``hidden``: the tokens after this layer are also returned."""

    def __init__(self, hidden: int = 0, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, DIM, 4, 4)
        self.cls = nn.Parameter(torch.rand(1, 1, DIM))
        self.blocks = nn.ModuleList([Block(**options) for _ in range(3)])
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, 5)
        self.hidden = hidden

    def tokens(self, x: Tensor, states: list[Tensor] | None = None) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
            if states is not None:
                states.append(x)
        return x

    def forward(self, x: Tensor) -> Any:
        states: list[Tensor] = []
        out = self.head(self.norm(self.tokens(x, states))[:, 0])
        return [out, states[self.hidden - 1]] if self.hidden else out


@dataclass(frozen=True)
class Ran:
    """A pass, run on a model after the passes before it; the graph before and after it, one line per node."""

    step: Pass
    before: list[str]
    after: list[str]
    events: tuple[tuple[str, str], ...]
    context: Context


def run_up_to(kind: type[Any], model: nn.Module, plan: str = "1(50%)+3", **options: Any) -> Ran:
    """Run the passes of a plan on the captured ``model`` until that of this class has run."""
    example = (torch.zeros(2, 3, 16, 16),)

    def work(capture: Any) -> Ran:
        context = start_rewrite(capture, Options(Plan.parse(plan), **options))
        steps = passes_for(context.options)
        at = next(i for i, step in enumerate(steps) if isinstance(step, kind))
        run_passes(steps[:at], context)
        before = lines(context.editor.graph)
        (record,) = run_passes(steps[at : at + 1], context)
        events = tuple((event.kind, event.node) for event in record.events)
        return Ran(steps[at], before, lines(context.editor.graph), events, context)

    return with_capture(model.eval(), example, {}, work)


def lines(graph: fx.Graph) -> list[str]:
    """The nodes as code."""
    return [_line(node) for node in graph.nodes if node.op != "placeholder"]


def _line(node: fx.Node) -> str:
    args = [_spelled(a) for a in node.args] + [f"{k}={_spelled(v)}" for k, v in node.kwargs.items()]
    if node.op == "output":
        return f"return {args[0]}"
    if node.op == "get_attr":
        return f"{node.name} = {node.target}"
    if node.op == "call_method":
        return f"{node.name} = {args[0]}.{node.target}({', '.join(args[1:])})"
    if node.op == "call_module":
        return f"{node.name} = {node.target}({', '.join(args)})"
    name = getattr(node.target, "__name__", str(node.target))
    match name:
        case "add" | "mul":
            return f"{node.name} = {args[0]} {'+' if name == 'add' else '*'} {args[1]}"
        case "getitem":
            return f"{node.name} = {args[0]}[{args[1]}]"
        case "getattr":
            return f"{node.name} = {args[0]}.{node.args[1]}"
    return f"{node.name} = {name}({', '.join(args)})"


def _spelled(value: Any) -> str:
    if isinstance(value, slice):
        return ":".join("" if b is None else str(b) for b in (value.start, value.stop))
    if isinstance(value, tuple):
        return ", ".join(map(_spelled, value))
    return str(value)


def assert_documented(ran: Ran) -> None:
    """What the docstring shows is in the graph before and after, in this order, and every change is shown."""
    for word, graph in (("Before", ran.before), ("After", ran.after)):
        places = [graph.index(line) for line in shown(type(ran.step), word)]
        assert places == sorted(places), word
    before, after = (set(shown(type(ran.step), word)) for word in ("Before", "After"))
    gone, new = set(ran.before) - set(ran.after), set(ran.after) - set(ran.before)
    assert gone | new, "the example shows no change"
    assert gone <= before, gone - before
    assert new <= after, new - after


def shown(kind: type[Any], word: str) -> list[str]:
    """The lines of the block of code that stands after ``word`` in a pass's docstring."""
    text = inspect.getdoc(kind) or ""
    match = re.search(rf"^{word}[^\n]*::\n\n((?:    [^\n]*\n|\n)+)", text + "\n", re.MULTILINE)
    assert match, f"{kind.__name__} shows no graph {word.lower()}"
    code = (line.partition("  #")[0].strip() for line in match[1].splitlines())
    return [line for line in code if line]
