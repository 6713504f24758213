"""What a forward does besides computing values: it survives a rewrite, or is refused by name."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import skipvit_fx
from skipvit_fx.errors import TraceError
from support.checks import rewrite
from support.models import scramble
from support.odd_models import Block, Odd, image

PLAN = "1(40%)+3"
FRONTENDS = ["symbolic", "export"]


def odd(block: Callable[[], Block] = Block) -> Odd:
    return scramble(Odd([block() for _ in range(2)])).eval()


def assert_like_its_twin(model: Odd, twin: Odd, frontend: Any) -> None:
    """``twin`` computes the same as ``model`` without writing in place; so do the rewrites of both."""
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(image()), twin(image()))
        wanted = rewrite(twin, PLAN)(image())
        assert (wanted - twin(image())).abs().max() > 1e-2
        torch.testing.assert_close(
            rewrite(model, PLAN, frontend=frontend)(image()), wanted, rtol=1e-5, atol=1e-5
        )


# -- writes in place ----------------------------------------------------------------------------------------------


class Augmented(Block):
    def forward(self, x: Tensor) -> Tensor:
        x += self.attn(self.norm1(x))
        x += self.mlp(self.norm2(x))
        return x


class Methods(Block):
    def forward(self, x: Tensor) -> Tensor:
        x.add_(self.attn(self.norm1(x)))
        x.add_(self.mlp(self.norm2(x)))
        return x


class OnItsWay(Block):
    def forward(self, x: Tensor) -> Tensor:
        a = self.attn(self.norm1(x))
        a += x
        b = self.mlp(self.norm2(a)).mul_(2.0).mul_(0.5)
        return F.dropout(b, 0.0, inplace=True) + a


@pytest.mark.parametrize(
    ("block", "frontend"),
    [
        (Augmented, "symbolic"),
        (Augmented, "export"),
        (Methods, "export"),
        (Methods, "auto"),
        (OnItsWay, "symbolic"),
        (OnItsWay, "export"),
    ],
)
@pytest.mark.slow
def test_writes_that_a_graph_can_show(block: type[Block], frontend: str) -> None:
    assert_like_its_twin(odd(block), odd(), frontend)


class Head(Odd):
    """Does something to the logits."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__([Block() for _ in range(2)])
        self.act = act

    def forward(self, image: Tensor) -> Tensor:
        return self.act(super().forward(image))


def one_row(x: Tensor) -> Tensor:
    x[:, 0] = 1.0
    return x


def through_a_view(x: Tensor) -> Tensor:
    x.view(-1).add_(1.0)
    return x


def under_a_view(x: Tensor) -> Tensor:
    view = x.view(-1)
    x += 1.0
    return x + view.sum()


def half(x: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=1)
    left *= 2.0
    return torch.cat([left, right], dim=1) + x


def into_a_buffer(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    torch.mul(x, 2.0, out=out)
    return out


def wider(x: Tensor) -> Tensor:
    y = x.half()
    y += x
    return y


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("act", [one_row, through_a_view, under_a_view, half, into_a_buffer])
def test_writes_that_a_graph_would_lose(act: Callable[[Tensor], Tensor], frontend: str) -> None:
    with pytest.raises(TraceError) as caught:
        rewrite(scramble(Head(act)).eval(), PLAN, frontend=frontend)
    assert caught.value.hint


@pytest.mark.slow
def test_a_write_that_keeps_its_dtype() -> None:
    model = scramble(Head(wider)).eval()
    with pytest.raises(TraceError, match="of another shape or dtype"):
        rewrite(model, PLAN, frontend="symbolic")
    fast = skipvit_fx.rewrite(model, "1(0%)+3", example_inputs=image())
    with torch.no_grad():
        got, wanted = fast.graph_forward(image()), model(image())
    torch.testing.assert_close(got, wanted)
    assert got.dtype == torch.float16


class Disjoint(Odd):
    """Writes over one half of a tensor while the other is read: no element of it changes."""

    def forward(self, image: Tensor) -> Tensor:
        left, right = super().forward(image).chunk(2, dim=1)
        left *= 2.0
        return torch.cat([left, right], dim=1)


def test_writes_beside_what_is_read() -> None:
    class Twin(Odd):
        def forward(self, image: Tensor) -> Tensor:
            left, right = super().forward(image).chunk(2, dim=1)
            return torch.cat([left * 2.0, right], dim=1)

    blocks = [Block() for _ in range(2)]
    assert_like_its_twin(scramble(Disjoint(blocks)).eval(), Twin(blocks).eval(), "symbolic")


class InPlaceLeaf(Block):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        self.act(x)
        return x + self.mlp(self.norm2(x))


class InPlaceBehindIdentity(InPlaceLeaf):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        y = self.act(x)
        y += 1.0
        return x + self.mlp(self.norm2(x))


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("block", [InPlaceLeaf, InPlaceBehindIdentity])
def test_modules_that_write_in_place(block: type[Block], frontend: str) -> None:
    with pytest.raises(TraceError, match="in place, which blocks_0_norm2 reads afterwards"):
        rewrite(odd(block), PLAN, frontend=frontend)


class Steps(Block):
    """Counts its calls, in one way or another."""

    way = ""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))
        self.steps: Any
        self.n = 0

    def forward(self, x: Tensor) -> Tensor:
        match self.way:
            case "added":
                self.steps += 1
            case "replaced":
                self.steps = self.steps + 1
            case "copied":
                self.steps.copy_(self.steps + 1)
            case "number":
                self.n += 1
        return super().forward(x) * (1 + 0.1 * self.n)


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize(
    ("way", "reason"),
    [
        ("added", "its own state"),
        ("replaced", "its own state"),
        ("copied", "its own state"),
        (
            "number",
            "second call computes something different from its first, because of what it keeps: blocks.0.n",
        ),
    ],
)
def test_state_that_changes_around_attention(way: str, reason: str, frontend: str) -> None:
    model = odd(type(way, (Steps,), {"way": way}))
    with pytest.raises(TraceError, match=reason):
        rewrite(model, PLAN, frontend=frontend)


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_an_input_that_is_written_into(frontend: str) -> None:
    class Scales(Odd):
        def forward(self, image: Tensor) -> Tensor:
            return super().forward(image.mul_(0.5))

    with pytest.raises(TraceError, match="changes an input, 'image'"):
        rewrite(scramble(Scales([Block() for _ in range(2)])).eval(), PLAN, frontend=frontend)


# -- attributes ---------------------------------------------------------------------------------------------------


class Caches(Block):
    """Keeps what never changes."""

    table: Tensor | None = None
    size: tuple[int, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        self.size = tuple(x.shape[1:])
        if self.table is None:
            self.table = torch.linspace(0.5, 1.5, x.shape[2])
        y: Tensor = super().forward(x * self.table)
        return y


class Computes(Block):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x * torch.linspace(0.5, 1.5, x.shape[2]))
        return y


def test_a_cache_is_no_memory() -> None:
    assert_like_its_twin(odd(Caches), odd(Computes), "symbolic")


@pytest.mark.slow
def test_what_a_model_keeps_of_a_call_is_told() -> None:
    class Keeps(Block):
        def forward(self, x: Tensor) -> Tensor:
            self.last = x
            return super().forward(x)

    model, twin = odd(Keeps), odd()
    twin.load_state_dict(model.state_dict())
    with pytest.warns(UserWarning, match=r"keeps blocks\.0\.last, .* of every call") as told:
        fast = rewrite(model, PLAN)
    assert len(told) == 1
    with torch.no_grad():
        assert torch.equal(fast(image()), rewrite(twin, PLAN)(image()))
    assert not hasattr(model.blocks[0], "last")


# -- random numbers -----------------------------------------------------------------------------------------------

DRAWS: dict[str, Callable[[], Any]] = {
    "random": lambda: random.random(),
    "numpy.random": lambda: np.random.rand(),
    "torch": lambda: torch.rand(1).item(),
}


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("library", DRAWS)
def test_layer_drop_in_python(library: str, frontend: str) -> None:
    class Dropped(Block):
        def forward(self, x: Tensor) -> Tensor:
            if (
                self.training and DRAWS[library]() < -1.0
            ):  # never here; 0.1 would be hit now and then
                return x
            return super().forward(x)

    reason = "data-dependent" if (library, frontend) == ("torch", "export") else library
    with pytest.raises(TraceError, match=reason):
        rewrite(odd(Dropped), PLAN, frontend=frontend)


def test_modules_that_run_no_attention_may_draw() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * (1 + random.random()) if self.training else x

    class NoisyBlock(Block):
        def __init__(self) -> None:
            super().__init__()
            self.noisy = Noisy()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.noisy(super().forward(x))
            return y

    fast = rewrite(odd(NoisyBlock), PLAN).train()
    with torch.no_grad():
        assert not torch.equal(fast(image()), fast(image()))


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_a_rewrite_draws_nothing(frontend: str) -> None:
    def drawn() -> tuple[Any, ...]:
        return random.random(), np.random.rand(), torch.rand(1).item()

    model = odd()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    wanted = drawn()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    rewrite(model, PLAN, frontend=frontend)
    assert drawn() == wanted


# -- gradients ----------------------------------------------------------------------------------------------------


class Tripled(torch.autograd.Function):
    """Passes values through, and three times their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 3.0


class Function(Block):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = Tripled.apply(super().forward(x))  # type: ignore[no-untyped-call]
        return y


class Hook(Block):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        if y.requires_grad:
            y.register_hook(lambda gradient: gradient * 3.0)
        return y


class HookWithoutAsking(Block):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        with contextlib.suppress(RuntimeError):
            y.register_hook(lambda gradient: gradient * 3.0)
        return y


@pytest.mark.parametrize(
    ("block", "frontend", "reason"),
    [
        (Function, "symbolic", "calls a torch.autograd.Function around attention"),
        (Function, "export", "calls a torch.autograd.Function around attention"),
        (Hook, "symbolic", "asks for 'requires_grad' of a tensor"),
        (Hook, "export", "asks for 'requires_grad' of a tensor"),
        (HookWithoutAsking, "export", "hooks the gradient of a tensor around attention"),
    ],
)
def test_gradients_that_values_do_not_show(block: type[Block], frontend: str, reason: str) -> None:
    with pytest.raises(TraceError, match=reason):
        rewrite(odd(block), PLAN, frontend=frontend)


class TripledLeaf(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = Tripled.apply(x)  # type: ignore[no-untyped-call]
        return y


class Stopped(Block):
    """Gradients of its own in a module that runs no attention, and a part that has none."""

    def __init__(self) -> None:
        super().__init__()
        self.tripled = TripledLeaf()

    def forward(self, x: Tensor) -> Tensor:
        y = self.tripled(super().forward(x))
        z: Tensor = y + y.detach() * 0.5
        return z


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.slow
def test_gradients_that_stay(frontend: str) -> None:
    model = odd(Stopped)
    fast = skipvit_fx.rewrite(model, "1(0%)+3", example_inputs=image(), frontend=frontend)
    found = []
    for run in (model, fast.graph_forward):
        model.zero_grad()
        run(image()).square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
