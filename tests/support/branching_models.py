"""ViTs whose Python code decides something, by what it finds in a tensor, in one place or another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support.models import scramble
from support.odd_models import TOKENS, Block, Mlp, Odd, Sdpa

Condition = Callable[[Tensor], Any]

DEPTH = 2

BATCH: dict[str, Condition] = {
    "below": lambda x: x.shape[0] < 100,
    "above": lambda x: x.shape[0] > 3,
    "one": lambda x: x.shape[0] == 1,
    "not-one": lambda x: x.size(0) != 1,
    "five": lambda x: x.shape[0] == 5,
    "one-of": lambda x: x.shape[0] in (1, 5),
    "even": lambda x: x.shape[0] % 2 == 0,
    "length": lambda x: len(x) > 3,
    "numel": lambda x: x.numel() > 12 * TOKENS * 32,
    "least": lambda x: min(x.shape[0], 4) == 4,
    "difference": lambda x: bool(x.shape[0] - 1),
    "quotient": lambda x: x.shape[0] // 4,
    "looked-up": lambda x: {2: True, 5: True}.get(x.shape[0], False),
    "rank-and-size": lambda x: x.ndim > 2 and x.shape[0] >= 100,
}
"""What depends on the batch size, and on nothing else."""

KIND: dict[str, Condition] = {
    "isinstance": lambda x: isinstance(x, Tensor),
    "isinstance-of-several": lambda x: not isinstance(x, (list, tuple, dict)),
    "type-is": lambda x: type(x) is Tensor,
    "type-equals": lambda x: type(x) == Tensor,  # noqa: E721
    "type-in": lambda x: type(x) in (list, Tensor),
    "hasattr": lambda x: hasattr(x, "tensors"),
    "hasattr-of-its-own": lambda x: hasattr(x, "unflatten"),
    "size-is-int": lambda x: isinstance(x.shape[0], int) and isinstance(x.shape[-1], int),
    "type-of-size": lambda x: type(x.shape[-1]) is int,
    "shape-is-tuple": lambda x: isinstance(x.shape, tuple),
    "is-tensor": lambda x: torch.is_tensor(x),
    "rank": lambda x: x.dim() in (3, 4),
    "dtype": lambda x: x.dtype == torch.float32,
    "dtype-is": lambda x: x.dtype is torch.float32,
    "dtype-is-not": lambda x: x.dtype is not torch.float32,
    "dtype-in-set": lambda x: x.dtype in {torch.float32, torch.float64},
    "dtype-looked-up": lambda x: {torch.float32: True}.get(x.dtype, False),
    "floating": lambda x: x.is_floating_point() and torch.is_floating_point(x),
    "on-cpu": lambda x: x.device.type == "cpu",
    "device-is": lambda x: x.device == torch.device("cpu"),
    "cuda": lambda x: x.is_cuda,
    "tokens": lambda x: x.shape[-2] == TOKENS,
    "few-tokens": lambda x: x.shape[-2] < TOKENS - 4,
    "none": lambda x: x is not None,
}
"""What is the same at every batch size."""

MODES: dict[str, tuple[Condition, str]] = {
    "inference": (lambda x: torch.is_inference_mode_enabled(), "is_inference_mode_enabled"),
    "autocast": (lambda x: torch.is_autocast_enabled("cpu"), "is_autocast_enabled"),
    "autocast-of-x": (lambda x: torch.is_autocast_enabled(x.device.type), "is_autocast_enabled"),
}
"""What depends on torch's mode, and the name to be refused."""


def _branch(condition: Condition, x: Tensor) -> Tensor:
    return x * 1.3 if condition(x) else x


class BranchingAttention(Sdpa):
    """On its queries."""

    def __init__(self, condition: Condition) -> None:
        super().__init__()
        self.condition = condition

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.to_q(x)), self.split(self.to_k(x)), self.split(self.to_v(x))
        q = _branch(self.condition, q)
        return self.out(self.join(F.scaled_dot_product_attention(q, k, v)))


class BranchingMlp(Mlp):
    """In a module that runs no attention."""

    def __init__(self, condition: Condition) -> None:
        super().__init__()
        self.condition = condition

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(_branch(self.condition, x))


class BranchingBlock(Block):
    """In front of the feed-forward network."""

    def __init__(self, condition: Condition) -> None:
        super().__init__()
        self.condition = condition

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(_branch(self.condition, self.norm2(x)))


class BranchingEnds(Odd):
    """Before the first layer, or after the last."""

    def __init__(self, condition: Condition, *, first: bool) -> None:
        super().__init__([Block() for _ in range(DEPTH)])
        self.condition, self.first = condition, first

    def layers(self, x: Tensor) -> Tensor:
        x = _branch(self.condition, x) if self.first else x
        x = super().layers(x)
        return x if self.first else _branch(self.condition, x)


def _blocks(make: Callable[[], nn.Module], layers: tuple[int, ...], depth: int = DEPTH) -> Odd:
    return Odd([make() if layer in layers else Block() for layer in range(1, depth + 1)])


PLACES: dict[str, Callable[[Condition], Odd]] = {
    "attention-that-scores": lambda c: _blocks(lambda: Block(BranchingAttention(c)), (1,)),
    "attention-under-drop": lambda c: _blocks(lambda: Block(BranchingAttention(c)), (2,)),
    "block-under-drop": lambda c: _blocks(lambda: BranchingBlock(c), (1, 2), 3),
    "every-block": lambda c: _blocks(lambda: BranchingBlock(c), (1, 2)),
    "last-attention": lambda c: _blocks(lambda: Block(BranchingAttention(c)), (3,), 3),
    "leaf": lambda c: _blocks(lambda: Block(mlp=BranchingMlp(c)), (1, 2)),
    "in-front": lambda c: BranchingEnds(c, first=True),
    "behind": lambda c: BranchingEnds(c, first=False),
}


def branching(condition: Condition, place: str) -> Odd:
    """The model, scrambled, in eval mode."""
    model = PLACES[place](condition)
    scramble(model)
    return model.eval()
