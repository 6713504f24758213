"""A rewrite changes nothing for anybody else: other threads do not see it, and afterwards all is as it was."""

from __future__ import annotations

import builtins
import contextlib
import logging
import math
import random
import threading
from collections.abc import Callable, Iterator
from random import random as kept_random
from random import uniform as kept_uniform
from typing import Any

import numpy as np
import pytest
import torch
from numpy.random import rand as kept_rand
from torch import Tensor, fx, nn
from torch import rand as kept_torch_rand
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import skipvit_fx
from skipvit_fx.errors import SkipViTError, TraceError
from support.checks import rewrite
from support.models import scramble
from support.odd_models import DIM, Block, Odd, image

PLAN = "1(40%)+2"
FRONTENDS = ["symbolic", "export"]


def odd(make: Callable[[], Block] = Block, kind: type[Odd] = Odd) -> Odd:
    return scramble(kind([make() for _ in range(2)])).eval()


# -- what there is to notice ------------------------------------------------------------------------------------------


def everything() -> dict[str, Any]:
    """What may be replaced while a model is captured, by name."""
    owners = {
        "torch": torch,
        "torch.random": torch.random,
        "random": random,
        "Random": random.Random,
        "numpy.random": np.random,
        "math": math,
        "builtins": builtins,
        "F": F,
        "autocast": torch.autocast,
        "Function": torch.autograd.Function,
        "Tensor": Tensor,
        "hooks": saved_tensors_hooks,
        "Module": nn.Module,
        "mha": torch.backends.mha,
        "mkldnn": vars(torch.backends.mkldnn),
        "Logger": logging.Logger,
        "compiler": torch.compiler,
        "fx": torch.fx._symbolic_trace,
        "here": {name: value for name, value in globals().items() if not name.startswith("@")},
    }
    return {
        f"{owner}.{name}": value
        for owner, thing in owners.items()
        for name, value in (thing if isinstance(thing, dict) else vars(thing)).items()
        if name not in ("CURRENT_PATCHER", "meeting")
    }


def generators() -> list[Any]:
    numpy = np.random.get_state()
    return [random.getstate(), torch.get_rng_state().tolist(), numpy[1].tolist(), numpy[2:]]  # type: ignore[index]


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = everything()
    yield
    after = everything()
    assert before.keys() == after.keys()
    assert [name for name, value in before.items() if after[name] is not value] == []


class Tripled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 3.0


kept_apply = Tripled.apply


class Busy(nn.Module):
    """A feed-forward network that does all that a graph would lose."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            for draw in (random.random, kept_random, kept_uniform, np.random.rand, kept_rand):
                if float(draw(*(0.0, 1.0) if draw is kept_uniform else ())) < 0.0:
                    raise ValueError("never")
        with torch.autocast("cpu", torch.bfloat16):
            y = self.fc1(x)
        y = y.float() + torch.zeros(x.shape[-1]) + torch.full((DIM,), 0.1)
        with saved_tensors_hooks(lambda t: t * 0.5, lambda t: t * 2.0):
            y = y.sin()
        y = kept_apply(Tripled.apply(y))  # type: ignore[no-untyped-call]
        if y.requires_grad:
            y.register_hook(lambda gradient: gradient * 0.5)
        for reentrant in (False, True) if y.requires_grad else (False,):
            y = checkpoint(self.fc2, y, use_reentrant=reentrant)
        return self.drop(y) * len((1, 2))


def busy_block() -> Block:
    return Block(mlp=Busy())


class Trainer:
    """Trains a model, and remembers every loss and what else could have changed."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.train()
        self.optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
        self.attention = nn.MultiheadAttention(DIM, 4, batch_first=True).eval()
        scramble(self.attention)
        self.seen: list[tuple[Any, ...]] = []
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(7)

    def step(self) -> None:
        x = image(seed=len(self.seen))
        loss = self.model(x).square().mean()
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        with torch.no_grad():
            y = x.flatten(2)[:, :, :DIM]
            fast = self.attention(y, y, y)[0].sum().item()
        compiling = torch.compiler.is_compiling(), torch.backends.mha.get_fastpath_enabled()
        self.seen.append(
            (loss.item(), fast, random.gauss(0.0, 1.0), torch.rand(2).tolist(), compiling)
        )


def trained_beside(model: nn.Module, work: Callable[[], None], least: int = 20) -> list[Any]:
    """What a trainer of ``model`` sees while another thread works."""
    trainer, done, failures = Trainer(model), threading.Event(), []

    def other() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=other)
    thread.start()
    try:
        while not done.is_set() or len(trainer.seen) < least:
            trainer.step()
            done.wait(0.002)  # let the other thread have most of the time
    finally:
        thread.join()
    assert failures == []
    return trainer.seen


def trained_alone(model: nn.Module, steps: int) -> list[Any]:
    trainer = Trainer(model)
    for _ in range(steps):
        trainer.step()
    return trainer.seen


class Draws(Block):
    """Refused amid its forward."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x) * random.random()
        return y


@pytest.mark.parametrize("same", [False, True], ids=["another-model", "that-model"])
@pytest.mark.slow
def test_training_does_not_notice_rewrites(same: bool) -> None:
    assert_unnoticed(same, 10)


@pytest.mark.slow
@pytest.mark.parametrize("same", [False, True], ids=["another-model", "that-model"])
def test_training_does_not_notice_fifty_rewrites(same: bool) -> None:
    assert_unnoticed(same, 50)


def assert_unnoticed(same: bool, times: int) -> None:
    model, refused = odd(busy_block), odd(Draws)
    rewritten = model if same else odd(busy_block)
    alone = odd(busy_block)
    alone.load_state_dict(model.state_dict())

    def work() -> None:
        for i in range(times):
            rewrite(
                rewritten, PLAN, frontend="export" if i % 8 == 7 else "symbolic", validate=not same
            )
            if i % 8 == 3:
                with pytest.raises(TraceError, match="draws random numbers from random"):
                    rewrite(refused, PLAN)

    seen = trained_beside(model, work)
    assert seen == trained_alone(alone, len(seen))


def test_a_rewrite_within_autocast_leaves_the_model_as_it_was() -> None:
    """What autocast keeps of the parameters of both is real."""
    model = odd(busy_block)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted = model(image())
        rewrite(model, PLAN)
        assert torch.is_autocast_cache_enabled()
        assert torch.equal(model(image()), wanted)


@pytest.mark.slow
@pytest.mark.parametrize(
    "frontends", [("symbolic", "symbolic"), ("symbolic", "export"), ("export", "export")]
)
def test_two_threads_that_rewrite(frontends: tuple[str, str]) -> None:
    models = [odd(busy_block), odd(lambda: Block())]
    with torch.no_grad():
        wanted = [
            rewrite(m, PLAN, frontend=f)(image()) for m, f in zip(models, frontends, strict=True)
        ]
    start, found = threading.Barrier(2), [[], []]  # type: list[list[Any]]

    def work(i: int) -> None:
        start.wait()
        for _ in range(2):
            found[i].append(rewrite(models[i], PLAN, frontend=frontends[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(fasts) for fasts in found] == [2, 2]
    with torch.no_grad():
        assert all(
            torch.equal(fast(image()), w)
            for fasts, w in zip(found, wanted, strict=True)
            for fast in fasts
        )


# -- in the middle of a capture ---------------------------------------------------------------------------------------


class Meeting:
    """Where the capturing thread waits until the other has looked around."""

    def __init__(self) -> None:
        self.reached, self.over = threading.Event(), threading.Event()

    def __call__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            self.reached.set()
            assert self.over.wait(60)


meeting = Meeting()


class MeetsAround(Odd):
    def layers(self, x: Tensor) -> Tensor:
        meeting()
        return super().layers(x)


class Met(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        meeting()
        return super().forward(x)


@contextlib.contextmanager
def captured_meanwhile(phase: str, frontend: str) -> Iterator[None]:
    """Another thread is in the middle of a capture: in the model's forward, or in a module that stays as it is."""
    global meeting
    model = odd(lambda: Block(mlp=Met(DIM, DIM))) if phase == "stay" else odd(kind=MeetsAround)
    meeting = Meeting()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            watching = [torch.backends.mha.get_fastpath_enabled()]
            rewrite(model, PLAN, frontend=frontend)
            assert watching == [True]
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(1 if phase == "watched" else 2):
            assert meeting.reached.wait(60)
            if phase != "watched":  # the first call is that which notes the modules
                meeting.over, old = threading.Event(), meeting.over
                meeting.reached.clear()
                old.set()
                assert meeting.reached.wait(60)
            break
        yield
    finally:
        meeting.over.set()
        thread.join()
    assert failures == []


def twice(draw: Callable[[], Any], seed: Callable[[int], Any]) -> bool:
    """Whether ``seed`` works and is what ``draw`` depends on."""
    drawn = []
    for _ in range(2):
        seed(3)
        drawn.append(torch.as_tensor(draw()).tolist())
    seed(4)
    return drawn[0] == drawn[1] != torch.as_tensor(draw()).tolist()


def gradient_of(function: Callable[[Tensor], Tensor]) -> float:
    x = torch.ones((), requires_grad=True)
    y: Any = function(x)
    y.backward()
    assert x.grad is not None
    return float(x.grad)


def hooked(x: Tensor) -> Tensor:
    y = x * 1.0
    y.register_hook(lambda gradient: gradient * 5.0)
    return y


def halved_when_saved(x: Tensor) -> Tensor:
    with saved_tensors_hooks(lambda t: t * 0.5, lambda t: t):
        return x * x


def autocast_dtype() -> torch.dtype:
    with torch.autocast("cpu", torch.bfloat16):
        return nn.Linear(2, 2)(torch.ones(1, 2)).dtype


def fused_attention_ran() -> bool:
    layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True).eval()
    with torch.no_grad(), torch.profiler.profile() as profile:
        layer(torch.ones(1, 3, 8))
    return any("transformer_encoder_layer" in event.name for event in profile.events())


def kernels() -> list[bool]:
    """Which backends may be used."""
    return [torch._C._get_mkldnn_enabled(), torch._C._get_cudnn_enabled()]


KERNELS = kernels()
PROBES: dict[str, Callable[[], bool]] = {
    "factories": lambda: torch.arange(3).tolist() == [0, 1, 2] and torch.zeros(2).sum() == 0.0,
    "limits": lambda: torch.finfo(torch.float32).bits == 32 and torch.iinfo(torch.int8).max == 127,
    "modules": lambda: nn.Linear(2, 3)(torch.ones(1, 2)).shape == (1, 3),
    "len": lambda: len([1, 2]) == 2 and len(torch.ones(4)) == 4,
    "max": lambda: max(2, 3, 1) == 3 and min([2, 3]) == 2 and math.sqrt(4) == 2.0,
    "random": lambda: twice(random.random, random.seed),
    "random by name": lambda: twice(kept_random, random.seed),
    "uniform by name": lambda: twice(lambda: kept_uniform(0, 1), random.seed),
    "gauss": lambda: twice(lambda: random.gauss(0, 1), random.seed),
    "shuffle": lambda: twice(lambda: random.sample(range(99), 9), random.seed),
    "numpy": lambda: twice(np.random.rand, np.random.seed),
    "numpy by name": lambda: twice(kept_rand, np.random.seed),
    "torch": lambda: twice(lambda: torch.rand(3), torch.manual_seed),
    "torch by name": lambda: twice(lambda: kept_torch_rand(3), torch.manual_seed),
    "dropout": lambda: twice(lambda: F.dropout(torch.ones(20)), torch.manual_seed),
    "function": lambda: gradient_of(Tripled.apply) == 3.0,  # type: ignore[arg-type]
    "function by name": lambda: gradient_of(kept_apply) == 3.0,  # type: ignore[arg-type]
    "hook": lambda: gradient_of(hooked) == 5.0,
    "saved": lambda: gradient_of(halved_when_saved) == 1.0,
    "checkpoint": lambda: gradient_of(lambda x: checkpoint(torch.exp, x, use_reentrant=True)) > 2.7,
    "checkpoint 2": lambda: (
        gradient_of(lambda x: checkpoint(torch.exp, x, use_reentrant=False)) > 2.7
    ),
    "autocast": lambda: autocast_dtype() == torch.bfloat16,
    "fast path": fused_attention_ran,
    "kernels": lambda: kernels() == KERNELS,
    "compiling": lambda: not torch.compiler.is_compiling() and not torch.compiler.is_exporting(),
    "fx": lambda: len(fx.symbolic_trace(nn.Linear(2, 2)).graph.nodes) == 5,
}


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("phase", ["watched", "followed", "stay"])
@pytest.mark.slow
def test_another_thread_sees_nothing(phase: str, frontend: str) -> None:
    with captured_meanwhile(phase, frontend):
        wrong = [name for name, probe in PROBES.items() if not probe()]
    assert wrong == []


@pytest.mark.slow
def test_the_probes_can_fail() -> None:
    """In the capturing thread itself most of them do."""
    found: dict[str, bool] = {}

    class Probes(Odd):
        def layers(self, x: Tensor) -> Tensor:
            for name, probe in PROBES.items():
                try:
                    found[name] = probe()
                except Exception:
                    found[name] = False
            return super().layers(x)

    with contextlib.suppress(SkipViTError):
        rewrite(odd(kind=Probes), PLAN, frontend="symbolic", validate=False)
    assert sum(not right for right in found.values()) > 12


# -- random numbers ---------------------------------------------------------------------------------------------------

GENERATOR, OWN = torch.Generator(), random.Random(5)
HELD = {"random": random.random, "rand": np.random.mtrand._rand.rand, "bits": random.getrandbits}
"""Where nobody looks for them."""


def forked() -> Any:
    with torch.random.fork_rng():
        return 1.0


IN_PYTHON: dict[str, Callable[[], Any]] = {
    "random": lambda: random.random(),
    "uniform": lambda: random.uniform(0, 1),
    "gauss": lambda: random.gauss(0, 1),
    "normalvariate": lambda: random.normalvariate(0, 1),
    "betavariate": lambda: random.betavariate(1, 2),
    "randint": lambda: random.randint(0, 9),
    "randrange": lambda: random.randrange(9),
    "choice": lambda: random.choice([1, 2, 3]),
    "choices": lambda: random.choices([1, 2, 3])[0],
    "sample": lambda: random.sample([1, 2, 3], 2)[0],
    "shuffle": lambda: random.shuffle([1, 2, 3]) or 1.0,
    "getrandbits": lambda: random.getrandbits(5),
    "randbytes": lambda: random.randbytes(2)[0],
    "seed": lambda: random.seed(1) or 1.0,
    "random by name": lambda: kept_random(),
    "uniform by name": lambda: kept_uniform(0, 1),
    "its own": lambda: OWN.random(),
    "its own gauss": lambda: OWN.gauss(0, 1),
    "its own choice": lambda: OWN.choice([1, 2]),
    "np rand": lambda: np.random.rand(),
    "np randn": lambda: np.random.randn(),
    "np randint": lambda: np.random.randint(9),
    "np choice": lambda: np.random.choice([1, 2]),
    "np permutation": lambda: np.random.permutation(3)[0],
    "np ranf": lambda: np.random.sample(),
    "np seed": lambda: np.random.seed(1) or 1.0,
    "np rand by name": lambda: kept_rand(),
    "np default_rng": lambda: np.random.default_rng().random(),
    "manual_seed": lambda: torch.manual_seed(1) and 1.0,
    "fork_rng": forked,
}
OF_TORCH: dict[str, Callable[[], Any]] = {
    "rand": lambda: torch.rand(1),
    "rand by name": lambda: kept_torch_rand(1),
    "randn": lambda: torch.randn(1),
    "randint": lambda: torch.randint(9, (1,)),
    "randperm": lambda: torch.randperm(3)[0],
    "uniform_": lambda: torch.empty(1).uniform_(),
    "bernoulli": lambda: torch.bernoulli(torch.full((1,), 0.5)),
    "multinomial": lambda: torch.multinomial(torch.ones(3), 1),
    "dropout": lambda: F.dropout(torch.ones(1), 0.5),
    "its own generator": lambda: torch.rand(1, generator=GENERATOR),
}
PAST_ALL: dict[str, Callable[[], Any]] = {
    "random": lambda: HELD["random"](),
    "bits": lambda: HELD["bits"](3),
    "rand": lambda: HELD["rand"](),
    "torch": lambda: torch.default_generator.manual_seed(3) and 1.0,
}


def scaled(x: Tensor, draw: Callable[[], Any]) -> Tensor:
    return x * (1.0 + 0.1 * float(draw() or 0.0))


def drawing(draw: Callable[[], Any], *, leaf: bool) -> Odd:
    class Draws(nn.Linear if leaf else Block):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = super().forward(x)
            return scaled(y, draw) if self.training else y

    return odd((lambda: Block(mlp=Draws(DIM, DIM))) if leaf else Draws)


DRAWN = r"draws random numbers from (random|numpy\.random|torch) in its Python"
CASES = [
    *[(name, draw, FRONTENDS[i % 2]) for i, (name, draw) in enumerate(IN_PYTHON.items())],
    ("random", IN_PYTHON["random"], "export"),
    ("np rand", IN_PYTHON["np rand"], "symbolic"),
    *[(name, draw, "symbolic") for name, draw in OF_TORCH.items()],
]


@pytest.mark.parametrize(("name", "draw", "frontend"), CASES, ids=[f"{c[0]}-{c[2]}" for c in CASES])
def test_what_is_drawn_around_attention_is_refused(
    name: str, draw: Callable[[], Any], frontend: str
) -> None:
    model, before = drawing(draw, leaf=False), generators()
    with pytest.raises(TraceError, match=DRAWN):
        rewrite(model, PLAN, frontend=frontend)
    assert generators() == before


@pytest.mark.parametrize("name", PAST_ALL)
def test_what_is_drawn_past_all_replacements(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is seen as long as no other thread can have drawn it."""
    monkeypatch.setattr(threading, "active_count", lambda: 1)
    random.seed(0)
    torch.manual_seed(0)
    model, before = drawing(PAST_ALL[name], leaf=False), generators()
    with pytest.raises(TraceError, match=DRAWN):
        rewrite(model, PLAN, frontend="symbolic")
    assert generators() == before


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.slow
def test_modules_that_stay_may_draw_and_seed(frontend: str) -> None:
    def draw() -> float:
        return sum(float(draw() or 0.0) for draw in IN_PYTHON.values())

    model = drawing(draw, leaf=True)
    own = OWN.getstate()
    before = generators()
    fast = rewrite(model, PLAN, frontend=frontend)
    skipvit_fx.inspect(fast)
    skipvit_fx.find_attention(model.train(), example_inputs=image())
    assert generators() == before
    OWN.setstate(own)


def test_a_function_kept_under_a_name_is_refused() -> None:
    class Kept(Block):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = kept_apply(super().forward(x))  # type: ignore[no-untyped-call]
            return y

    for frontend in FRONTENDS:
        with pytest.raises(TraceError, match=r"calls a torch\.autograd\.Function around attention"):
            rewrite(odd(Kept), PLAN, frontend=frontend)


def test_a_replacement_of_somebody_elses_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The originals are those of the moment, not of the import."""
    calls = []
    zeros = torch.zeros

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args)
        return zeros(*args, **kwargs)

    class Zeros(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.zeros(DIM)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "zeros", counted)
        rewrite(odd(lambda: Block(mlp=Zeros(DIM, DIM))), PLAN)
        assert torch.zeros is counted
    assert len(calls) > 3
