"""Hand-written ViTs in odd styles: some to be rewritten exactly, some to be refused.

No two authors spell attention, layout and position alike. Those in `GOOD` mix tokens in attention
only, so a rewrite must equal the reference. Those in `EITHER` may also be refused, never wrong.
`MIXERS` move information between tokens elsewhere and must be refused inside the span.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support.models import scramble
from support.reference import Layout, Point

GRID = (4, 5)
PATCHES = 20
TOKENS = 21
DIM = 32
HEADS = 4
DEPTH = 4


class Projections(nn.Module):
    """What most attentions share: separate projections. Subclasses say how they attend."""

    def __init__(self, dim: int = DIM, heads: int = HEADS) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (dim // heads) ** -0.5
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def split(self, x: Tensor) -> Tensor:
        """``[B, N, C]`` to ``[B, H, N, D]``."""
        b, n, c = x.shape
        return x.reshape(b, n, self.heads, c // self.heads).transpose(1, 2)

    def join(self, x: Tensor) -> Tensor:
        """The way back."""
        b, h, n, d = x.shape
        return x.transpose(1, 2).reshape(b, n, h * d)


class Sdpa(Projections):
    """The usual."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.to_q(x)), self.split(self.to_k(x)), self.split(self.to_v(x))
        return self.out(self.join(F.scaled_dot_product_attention(q, k, v)))


class EinsumAttention(Projections):
    """All products by einsum, heads never moved to the front by hand."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = (p(x).view(b, n, self.heads, -1) for p in (self.to_q, self.to_k, self.to_v))
        weights = torch.softmax(torch.einsum("bnhd,bmhd->bhnm", q, k) * self.scale, dim=-1)
        return self.out(torch.einsum("bhnm,bmhd->bnhd", weights, v).reshape(b, n, c))


class HeadsLast(Projections):
    """Logits of shape ``[B, N, M, H]``."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, _c = x.shape
        q, k, v = (p(x).view(b, n, self.heads, -1) for p in (self.to_q, self.to_k, self.to_v))
        weights = torch.einsum("bnhd,bmhd->bnmh", q, k).mul(self.scale).softmax(dim=2)
        return self.out(torch.einsum("bnmh,bmhd->bnhd", weights, v).flatten(2))


class MergedHeads(Projections):
    """Batch and heads in one axis."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        h, d = self.heads, c // self.heads
        q = self.to_q(x).view(b, n, h, d).transpose(1, 2).reshape(b * h, n, d)
        k = self.to_k(x).view(b, n, h, d).transpose(1, 2).reshape(b * h, n, d)
        v = self.to_v(x).view(b, n, h, d).transpose(1, 2).reshape(b * h, n, d)
        weights = F.softmax(torch.bmm(q * self.scale, k.transpose(1, 2)), dim=-1)
        return self.out(torch.bmm(weights, v).view(b, h, n, d).transpose(1, 2).reshape(b, n, c))


class SequenceFirst(Projections):
    """``[N, B, C]``, as in the first transformers."""

    def forward(self, x: Tensor) -> Tensor:
        n, b, c = x.shape
        h, d = self.heads, c // self.heads
        q = self.to_q(x).reshape(n, b * h, d).transpose(0, 1)
        k = self.to_k(x).reshape(n, b * h, d).transpose(0, 1)
        v = self.to_v(x).reshape(n, b * h, d).transpose(0, 1)
        weights = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
        return self.out((weights @ v).transpose(0, 1).reshape(n, b, c))


class LiteralSizes(Projections):
    """The token count written out, as exporters and hurried authors do."""

    tokens = TOKENS

    def forward(self, x: Tensor) -> Tensor:
        n, h = self.tokens, self.heads
        c = x.shape[-1]
        q = self.to_q(x).view(-1, n, h, c // h).permute(0, 2, 1, 3)
        k = self.to_k(x).view(-1, n, h, c // h).permute(0, 2, 1, 3)
        v = self.to_v(x).view(-1, n, h, c // h).permute(0, 2, 1, 3)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.permute(0, 2, 1, 3).reshape(-1, n, c))


class JoinedShape(Projections):
    """The shape of the result is put together from a part of another shape."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.to_q(x)), self.split(self.to_k(x)), self.split(self.to_v(x))
        y = F.scaled_dot_product_attention(q, k, v).permute(0, 2, 1, 3)
        shape = y.size()[:-2] + (x.shape[-1],)  # noqa: RUF005 - the style in question
        return self.out(y.reshape(shape))


class EmptyPrefix(Projections):
    """Rows in front that are left as they are, and of which there may be none."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.to_q(x)), self.split(self.to_k(x)), self.split(self.to_v(x))
        q, k = (torch.cat([y[:, :, :0], y[:, :, 0:] * 2], dim=2) for y in (q, k))
        return self.out(self.join(F.scaled_dot_product_attention(q, k, v)))


class LiteralSlices(Projections):
    """Which rows are patches is written out, or computed from the length, and not counted from the end."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        first, last = 1, 1 + PATCHES
        if self.how == "computed":
            last = x.shape[1] - 2
        front, middle = x[:, :first], x[:, first:last]
        back = x[:, last:]
        if self.how == "selected":
            back = torch.stack([x.select(1, last), torch.select(x, dim=1, index=last + 1)], 1)
        if self.how == "narrowed":
            back = torch.stack([x.select(1, last), x[:, last + 1]], 1)
        x = torch.cat([front, middle * 2, back + 1], dim=1)
        q, k, v = self.split(self.to_q(x)), self.split(self.to_k(x)), self.split(self.to_v(x))
        return self.out(self.join(F.scaled_dot_product_attention(q, k, v)))


class SlicingMlp(nn.Module):
    """The same in a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        rows = [x[:, :1], x[:, 1 : 1 + PATCHES] * 2, x[:, 1 + PATCHES :]]
        y: Tensor = self.fc(torch.cat(rows, dim=1))
        return y


class LiteralCoincident(Projections):
    """As many channels as tokens, and both written out."""

    def forward(self, x: Tensor) -> Tensor:
        q = self.to_q(x).view(-1, 21, 3, 7).transpose(1, 2)
        k = self.to_k(x).view(-1, 21, 3, 7).transpose(1, 2)
        v = self.to_v(x).view(-1, 21, 3, 7).transpose(1, 2)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, 21, 21))


class BiasedAttention(Projections):
    """A learned bias for every head and pair of positions."""

    def __init__(self, dim: int = DIM, heads: int = HEADS, *, sliced: bool = False) -> None:
        super().__init__(dim, heads)
        self.sliced = sliced
        self.pos_bias = nn.Parameter(torch.zeros(heads, TOKENS, TOKENS))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.to_q(x)), self.split(self.to_k(x)), self.split(self.to_v(x))
        n = x.shape[1]
        bias = self.pos_bias[:, :n, :n] if self.sliced else self.pos_bias
        weights = (q @ k.transpose(-2, -1) * self.scale + bias).softmax(dim=-1)
        return self.out(self.join(weights @ v))


class TalkingHeads(Projections):
    """Heads mixed before and after the softmax."""

    def __init__(self, dim: int = DIM, heads: int = HEADS) -> None:
        super().__init__(dim, heads)
        self.before = nn.Linear(heads, heads)
        self.after = nn.Linear(heads, heads)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.to_q(x)), self.split(self.to_k(x)), self.split(self.to_v(x))
        logits = torch.einsum("bhnd,bhmd->bnmh", q * self.scale, k)
        weights = self.after(self.before(logits).softmax(dim=2))
        return self.out(torch.einsum("bnmh,bhmd->bnhd", weights, v).flatten(2))


def rotation(tokens: int, dim: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine tables ``[tokens, dim]``."""
    angle = torch.arange(tokens)[:, None] / 10 ** (torch.arange(dim // 2) / (dim // 2))
    return angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)


def turned(x: Tensor) -> Tensor:
    """The second half first, negated."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)


class Rope(nn.Module):
    """Rotates all tokens after the first by a table held here."""

    cos: Tensor
    sin: Tensor

    def __init__(self, dim: int, sliced: bool = False) -> None:
        super().__init__()
        self.sliced = sliced
        cos, sin = rotation(TOKENS if sliced else PATCHES, dim)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.sliced:
            n = x.shape[2]
            return x * self.cos[:n] + turned(x) * self.sin[:n]
        first, rest = x[:, :, :1], x[:, :, 1:]
        return torch.cat([first, rest * self.cos + turned(rest) * self.sin], dim=2)


class RopeInLeaf(Projections):
    """Rotation by a module of its own."""

    def __init__(self, dim: int = DIM, heads: int = HEADS, *, sliced: bool = False) -> None:
        super().__init__(dim, heads)
        self.rope = Rope(dim // heads, sliced)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.to_q(x)), self.split(self.to_k(x)), self.split(self.to_v(x))
        y = F.scaled_dot_product_attention(self.rope(q), self.rope(k), v)
        return self.out(self.join(y))


class RopeSliced(Projections):
    """The table is cut to the length of the sequence: no error when tokens are missing."""

    cos: Tensor
    sin: Tensor

    def __init__(self, dim: int = DIM, heads: int = HEADS) -> None:
        super().__init__(dim, heads)
        cos, sin = rotation(2 * TOKENS, dim // heads)
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        q, k, v = self.split(self.to_q(x)), self.split(self.to_k(x)), self.split(self.to_v(x))
        cos, sin = self.cos[:n], self.sin[:n]
        q = q * cos + turned(q) * sin
        k = k * cos + turned(k) * sin
        return self.out(self.join(F.scaled_dot_product_attention(q, k, v)))


class ArangeBias(Projections):
    """A bias by distance, computed from the length of the sequence in every call (ALiBi)."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.to_q(x)), self.split(self.to_k(x)), self.split(self.to_v(x))
        at = torch.arange(x.shape[1], device=x.device)
        bias = (at[:, None] - at[None, :]).abs().to(x.dtype) * -0.1
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.out(self.join(y))


class CausalAttention(Projections):
    """Each token sees those before it."""

    def __init__(self, dim: int = DIM, heads: int = HEADS, *, flag: bool = True) -> None:
        super().__init__(dim, heads)
        self.flag = flag

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.to_q(x)), self.split(self.to_k(x)), self.split(self.to_v(x))
        if self.flag:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            n = x.shape[1]
            mask = torch.ones(n, n, dtype=torch.bool, device=x.device).tril()
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(self.join(y))


class LengthScaled(Projections):
    """Logits scaled by the logarithm of the token count."""

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        q, k, v = self.split(self.to_q(x)), self.split(self.to_k(x)), self.split(self.to_v(x))
        q = q * (n / 10)
        return self.out(self.join(F.scaled_dot_product_attention(q, k, v)))


class SoftmaxOverQueries(Projections):
    """Normalised over the wrong axis, which makes every token depend on all queries."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.to_q(x)), self.split(self.to_k(x)), self.split(self.to_v(x))
        return self.out(self.join((q @ k.transpose(-2, -1) * self.scale).softmax(dim=-2) @ v))


class LinearAttention(Projections):
    """Keys are summed into one matrix before any query comes."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.to_q(x)), self.split(self.to_k(x)), self.split(self.to_v(x))
        context = k.softmax(dim=-2).transpose(-2, -1) @ v
        return self.out(self.join(q.softmax(dim=-1) @ context))


class WindowAttention(Projections):
    """Attention among neighbours on the grid, in windows of two by five; the first token alone."""

    def forward(self, x: Tensor) -> Tensor:
        b, _, c = x.shape
        first, rest = x[:, :1], x[:, 1:]
        windows = rest.reshape(b, 2, 2, 5, c).reshape(b * 2, 10, c)
        q, k = self.split(self.to_q(windows)), self.split(self.to_k(windows))
        y = self.join(F.scaled_dot_product_attention(q, k, self.split(self.to_v(windows))))
        return self.out(torch.cat([first, y.reshape(b, PATCHES, c)], dim=1))


class Mlp(nn.Module):
    """The usual."""

    def __init__(self, dim: int = DIM) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 2 * dim)
        self.fc2 = nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return y


class Block(nn.Module):
    """Pre-norm."""

    def __init__(
        self, attn: nn.Module | None = None, mlp: nn.Module | None = None, dim: int = DIM
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attn or Sdpa(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = mlp or Mlp(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def middle(self) -> Point:
        """After the attention residual."""
        return Point(self.norm2)

    def start(self) -> Point:
        """The layer's input."""
        return Point(self)


class PostNorm(Block):
    """The norm after the sum, as in the first transformers."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attn(x))
        return self.norm2(x + self.mlp(x))

    def middle(self) -> Point:
        return Point(self.norm1, "output")


class ScaledResidual(Block):
    """Both the stream and the branch weighted."""

    def __init__(self) -> None:
        super().__init__()
        self.keep = nn.Parameter(torch.ones(DIM))
        self.gain = nn.Parameter(torch.ones(DIM))
        self.between = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(self.keep * x + self.gain * self.attn(self.norm1(x)))
        return x * 0.5 + self.mlp(self.norm2(x)) * self.gain

    def middle(self) -> Point:
        return Point(self.between, "output")  # the input of norm2 comes after half of the sum


class SubPostNorm(Block):
    """A second norm at the end of each branch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm3 = nn.LayerNorm(DIM)
        self.norm4 = nn.LayerNorm(DIM)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norm3(self.attn(self.norm1(x)))
        return x + self.norm4(self.mlp(self.norm2(x)))


class AddPosition(nn.Module):
    """Adds what it knows about every position."""

    def __init__(self) -> None:
        super().__init__()
        self.pos = nn.Parameter(torch.zeros(1, TOKENS, DIM))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.pos


class PositionInBranch(Block):
    """Positions added again for every attention, on the branch only."""

    def __init__(self) -> None:
        super().__init__()
        self.position = AddPosition()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.position(self.norm1(x)))
        return x + self.mlp(self.norm2(x))


class PositionOnStream(PositionInBranch):
    """Positions added to the stream before every attention, within the block."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.position(x)
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TokenScale(nn.Module):
    """A factor for every position, in a leaf."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = Mlp()
        self.pos_scale = nn.Parameter(torch.ones(1, TOKENS, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.pos_scale


class ChannelShuffle(nn.Module):
    """Moves channels and no tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x.roll(3, dims=-1)).flip(-1)
        return y + y.cumsum(dim=2) * 0.1


class Odd(nn.Module):
    """The frame: patches, class token, positions, layers, norm, head."""

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        *,
        dim: int = DIM,
        registers: int = 0,
        cls_last: bool = False,
        sequence_first: bool = False,
        head: str = "cls",
    ) -> None:
        super().__init__()
        self.cls_last, self.sequence_first, self.head_kind = cls_last, sequence_first, head
        self.embed = nn.Conv2d(3, dim, 8, 8)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos = nn.Parameter(torch.zeros(1, TOKENS, dim))
        self.register_tokens = nn.Parameter(torch.zeros(1, registers, dim)) if registers else None
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim * PATCHES if head == "flatten" else dim, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed(image).flatten(2).transpose(1, 2)
        cls = self.cls_token.expand(x.shape[0], -1, -1)
        x = torch.cat([x, cls] if self.cls_last else [cls, x], dim=1) + self.pos
        if self.register_tokens is not None:
            x = torch.cat([x, self.register_tokens.expand(x.shape[0], -1, -1)], dim=1)
        if self.sequence_first:
            x = x.transpose(0, 1)
        x = self.layers(x)
        x = self.norm(x)
        if self.sequence_first:
            x = x.transpose(0, 1)
        if self.head_kind == "flatten":
            return self.head(x[:, 1 : 1 + PATCHES].flatten(1))
        if self.head_kind == "grid":
            return x[:, 1 : 1 + PATCHES].transpose(1, 2).unflatten(2, GRID)
        return self.head(x[:, -1] if self.cls_last else x[:, 0])

    def layers(self, x: Tensor) -> Tensor:
        """All layers, one after the other."""
        for block in self.blocks:
            x = block(x)
        return x

    def layout(self) -> Layout:
        """What the reference is told."""
        blocks: list[Any] = list(self.blocks)
        suffix = (1 if self.cls_last else 0) + (
            0 if self.register_tokens is None else self.register_tokens.shape[1]
        )
        return Layout(
            blocks=blocks,
            mid=[block.middle() for block in blocks],
            entry=[block.start() for block in blocks],
            prefix=0 if self.cls_last else 1,
            suffix=suffix,
            cls=PATCHES if self.cls_last else 0,
            token_dim=0 if self.sequence_first else 1,
            mixed=[(b.attn.after, 2) for b in blocks if isinstance(b.attn, TalkingHeads)],
        )


class Shared(Odd):
    """One block, run four times."""

    def layers(self, x: Tensor) -> Tensor:
        for _ in range(DEPTH):
            x = self.blocks[0](x)
        return x

    def layout(self) -> Layout:
        block: Any = self.blocks[0]
        return Layout(blocks=[block] * DEPTH, mid=[block.middle()] * DEPTH, prefix=1, cls=0)


class LongSkip(Odd):
    """The first layer's output joins the last layer's input, as in a U-Net."""

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__(blocks)
        self.join = nn.Linear(2 * DIM, DIM)

    def layers(self, x: Tensor) -> Tensor:
        x = early = self.blocks[0](x)
        x = self.blocks[2](self.blocks[1](x))
        x = self.join(torch.cat([x, early], dim=-1))
        out: Tensor = self.blocks[3](x)
        return out


class ValueAttention(Sdpa):
    """Takes half of its values from the first layer."""

    def forward(self, x: Tensor, first: Tensor | None = None) -> Tensor:
        q, k, v = self.split(self.to_q(x)), self.split(self.to_k(x)), self.split(self.to_v(x))
        if first is not None:
            v = 0.5 * v + 0.5 * self.split(self.to_v(first))
        return self.out(self.join(F.scaled_dot_product_attention(q, k, v)))


class ValueBlock(Block):
    """Hands the first layer's input on to the attention."""

    def __init__(self) -> None:
        super().__init__(ValueAttention())

    def forward(self, x: Tensor, first: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), first)
        return x + self.mlp(self.norm2(x))


class ValueResidual(Odd):
    """Every attention also reads the tokens as they were before the first layer."""

    def layers(self, x: Tensor) -> Tensor:
        first = x
        for block in self.blocks:
            x = block(x, first)
        return x


@dataclass(frozen=True)
class Example:
    """An odd model and how it is built."""

    name: str
    make: Callable[[], Odd]

    def build(self) -> Odd:
        """The model, scrambled, in eval mode."""
        model = self.make()
        scramble(model)
        return model.eval()

    def __str__(self) -> str:
        return self.name


def image(batch: int = 2, seed: int = 1) -> Tensor:
    """A batch of images of the size that all models here take."""
    return torch.randn(batch, 3, 32, 40, generator=torch.Generator().manual_seed(seed))


def _odd(make: Callable[[], nn.Module], **options: Any) -> Callable[[], Odd]:
    return lambda: Odd([make() for _ in range(DEPTH)], **options)


def _attend(make: Callable[[], nn.Module], **options: Any) -> Callable[[], Odd]:
    return _odd(lambda: Block(make()), **options)


GOOD = [
    Example("plain", _odd(Block)),
    Example("einsum", _attend(EinsumAttention)),
    Example("heads-last", _attend(HeadsLast)),
    Example("merged-heads", _attend(MergedHeads)),
    Example("sequence-first", _attend(SequenceFirst, sequence_first=True)),
    Example("literal-sizes", _attend(LiteralSizes)),
    Example("joined-shape", _attend(JoinedShape)),
    Example("empty-prefix", _attend(EmptyPrefix)),
    Example(
        "literal-coincident",
        lambda: Odd([Block(LiteralCoincident(21, 3), Mlp(21), 21) for _ in range(DEPTH)], dim=21),
    ),
    Example("learned-bias", _attend(BiasedAttention)),
    Example("learned-bias-sliced", _attend(lambda: BiasedAttention(sliced=True))),
    Example("talking-heads", _attend(TalkingHeads)),
    Example("rope-leaf", _attend(RopeInLeaf)),
    Example("rope-leaf-sliced", _attend(lambda: RopeInLeaf(sliced=True))),
    Example("rope-sliced", _attend(RopeSliced)),
    Example("post-norm", _odd(PostNorm)),
    Example("scaled-residual", _odd(ScaledResidual)),
    Example("sub-post-norm", _odd(SubPostNorm)),
    Example("position-in-branch", _odd(PositionInBranch)),
    Example("position-on-stream", _odd(PositionOnStream)),
    Example("registers-last", _odd(Block, registers=3)),
    Example("literal-slices", _attend(lambda: LiteralSlices("literal"), registers=2)),
    Example("computed-slices", _attend(lambda: LiteralSlices("computed"), registers=2)),
    Example("selected-rows", _attend(lambda: LiteralSlices("selected"), registers=2)),
    Example("slices-in-a-leaf", _odd(lambda: Block(mlp=SlicingMlp()), registers=2)),
    Example("grid-output", _odd(Block, head="grid")),
    Example("flatten-head", _odd(Block, head="flatten")),
    Example("shared-block", lambda: Shared([Block()])),
]

EITHER = [
    Example("picked-rows", _attend(lambda: LiteralSlices("narrowed"), registers=2)),
    Example("cls-last", _odd(Block, cls_last=True)),
    Example("distance-bias", _attend(ArangeBias)),
    Example("length-scaled", _attend(LengthScaled)),
    Example("token-scale", _odd(lambda: Block(mlp=TokenScale()))),
    Example("channel-shuffle", _odd(lambda: Block(mlp=ChannelShuffle()))),
    Example("long-skip", lambda: LongSkip([Block() for _ in range(DEPTH)])),
    Example("value-residual", lambda: ValueResidual([ValueBlock() for _ in range(DEPTH)])),
]


# What moves information between tokens outside attention. As functions, so that they can stand in a
# leaf module and in the middle of an attention alike.


class Parametric(nn.Module):
    """A function of the tokens with weights of its own."""

    def __init__(self, module: nn.Module, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = module
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.inner, x)


def _conv_position(conv: nn.Module, x: Tensor) -> Tensor:
    first, rest = x[:, :1], x[:, 1:]
    grid = rest.transpose(1, 2).reshape(x.shape[0], -1, *GRID)
    return torch.cat([first, (rest + conv(grid).flatten(2).transpose(1, 2))], dim=1)


def _shift(x: Tensor) -> Tensor:
    return torch.cat([x[:, 1:], x[:, :1]], dim=1)


def _gate(fc: nn.Module, x: Tensor) -> Tensor:
    return x * torch.sigmoid(fc(x.mean(dim=1, keepdim=True)))


def _permuted(x: Tensor) -> Tensor:
    order = torch.arange(x.shape[1] - 1, -1, -1, device=x.device)
    return x[:, order]


def _fourier(x: Tensor) -> Tensor:
    return torch.fft.fft(x, dim=1).real * 0.2


def _windows(x: Tensor) -> Tensor:
    first, rest = x[:, :1], x[:, 1:]
    b, _, c = rest.shape
    windows = rest.reshape(b, 2, 2, 5, c)
    windows = windows - windows.mean(dim=(2, 3), keepdim=True)
    return torch.cat([first, windows.reshape(b, PATCHES, c)], dim=1)


def _even_odd(x: Tensor) -> Tensor:
    first, rest = x[:, :1], x[:, 1:]
    return torch.cat([first, rest[:, ::2], rest[:, 1::2]], dim=1)


Mixer = Callable[[], Callable[[Tensor], Tensor]]

MIXERS: dict[str, Mixer] = {
    "roll": lambda: lambda x: x.roll(1, dims=1),
    "roll-negative-axis": lambda: lambda x: torch.roll(x, 2, -2),
    "shift-by-slices": lambda: _shift,
    "even-odd": lambda: _even_odd,
    "flip": lambda: lambda x: x.flip(1),
    "permutation": lambda: _permuted,
    "sort": lambda: lambda x: x.sort(dim=1).values,
    "cumsum": lambda: lambda x: x.cumsum(dim=1) * 0.2,
    "cummax": lambda: lambda x: x.cummax(dim=1).values,
    "mean-token": lambda: lambda x: x + x.mean(dim=1, keepdim=True),
    "global-max": lambda: lambda x: x + x.amax(dim=1, keepdim=True),
    "token-softmax": lambda: lambda x: x * x.softmax(dim=1),
    "token-norm": lambda: lambda x: F.normalize(x, dim=1),
    "token-layer-norm": lambda: lambda x: F.layer_norm(x.transpose(1, 2), (x.shape[1],)).mT,
    "sum-over-count": lambda: lambda x: x - x.sum(dim=1, keepdim=True) / x.shape[1],
    "times-count": lambda: lambda x: x * (x.shape[1] / 10),
    "position-by-count": lambda: (
        lambda x: x * torch.linspace(0, 1, x.shape[1], device=x.device)[:, None]
    ),
    "fourier": lambda: _fourier,
    "windows": lambda: _windows,
    "gram": lambda: lambda x: x @ (x.transpose(1, 2) @ x) * 0.02,
    "first-patch": lambda: lambda x: x + x[:, 1:2],
    "last-token": lambda: lambda x: x + x[:, -1:],
    "median": lambda: lambda x: x - x.median(dim=1, keepdim=True).values,
    "average-pool": lambda: lambda x: F.avg_pool1d(x.mT, 3, 1, 1).mT,
    "grouped-view": lambda: (
        lambda x: x.reshape(x.shape[0], 3, 7, -1).flip(2).reshape(x.shape[0], TOKENS, -1)
    ),
    "transposed-view": lambda: lambda x: x.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1),
    "linear-over-tokens": lambda: Parametric(nn.Linear(TOKENS, TOKENS), lambda m, x: m(x.mT).mT),
    "conv1d": lambda: Parametric(
        nn.Conv1d(DIM, DIM, 3, padding=1, groups=DIM), lambda m, x: m(x.mT).mT
    ),
    "grid-conv": lambda: Parametric(nn.Conv2d(DIM, DIM, 3, padding=1, groups=DIM), _conv_position),
    "squeeze-excite": lambda: Parametric(nn.Linear(DIM, DIM), _gate),
    "batch-norm-over-tokens": lambda: Parametric(nn.BatchNorm1d(TOKENS), lambda m, x: m(x)),
    "instance-norm": lambda: Parametric(
        nn.InstanceNorm1d(DIM, affine=True), lambda m, x: m(x.mT).mT
    ),
    "group-norm": lambda: Parametric(nn.GroupNorm(4, DIM), lambda m, x: m(x.mT).mT),
    "recurrent": lambda: Parametric(nn.GRU(DIM, DIM, batch_first=True), lambda m, x: m(x)[0]),
    "dense-positions": lambda: Parametric(
        nn.Embedding(TOKENS, DIM), lambda m, x: x + m(torch.arange(x.shape[1], device=x.device))
    ),
}


# These treat every token by its place or by the number of tokens, and mix none: a compiler that
# gathers what belongs to the kept tokens, or keeps the first count, would be right as well.
POSITIONAL = {
    "batch-norm-over-tokens",
    "dense-positions",
    "position-by-count",
    "times-count",
}


class MixingMlp(Mlp):
    """An MLP that mixes tokens out of sight: tracing does not enter it."""

    def __init__(self, mix: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.mix = mix

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(self.mix(self.fc1(x)[..., :DIM]).repeat(1, 1, 2))
        return y


class MixingAttention(Sdpa):
    """Mixes in plain sight, in the function that attends."""

    def __init__(self, mix: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.mix = mix

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.mix(x))


def mixing(name: str, place: str, layer: int) -> Odd:
    """A model that mixes tokens in one layer, in its MLP ("leaf") or its attention ("traced")."""
    mix = MIXERS[name]()
    odd = Block(mlp=MixingMlp(mix)) if place == "leaf" else Block(MixingAttention(mix))
    blocks = [odd if at == layer else Block() for at in range(1, DEPTH + 1)]
    model = Odd(blocks)
    scramble(model)
    return model.eval()


BAD = [
    Example("causal-flag", _attend(CausalAttention)),
    Example("causal-mask", _attend(lambda: CausalAttention(flag=False))),
    Example("softmax-over-queries", _attend(SoftmaxOverQueries)),
    Example("linear-attention", _attend(LinearAttention)),
    Example("window-attention", _attend(WindowAttention)),
]
