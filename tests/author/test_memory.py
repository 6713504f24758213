"""What a model remembers: refused by name where it is read, left as it was where it is only kept."""

from __future__ import annotations

import contextlib
import gc
import types
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import skipvit_fx
from skipvit_fx.author import caches
from skipvit_fx.errors import TraceError, UnsupportedModelError
from support import caching
from support.checks import rewrite
from support.models import scramble
from support.odd_models import Block, Mlp, Odd, image
from support.reference import masked_reference

FRONTENDS = ["symbolic", "export"]
PLAN = "1(40%)+3"
STAGES: Any = {"stages": [(1, "0.4")], "return_layer": 3}


def odd(block: Callable[[], nn.Module]) -> Odd:
    return scramble(Odd([block() for _ in range(2)])).eval()


# -- what is read ------------------------------------------------------------------------------------------------


class Context:
    """An object that an author hands around."""

    def __init__(self) -> None:
        self.maps: list[Tensor] = []
        self.seen: dict[str, Any] = {}
        self.steps = 0


class Remembers(Block):
    """Subclasses say what is kept, and how it is read."""

    last: Tensor | None = None
    shared: ClassVar[list[Tensor]] = []

    def __init__(self) -> None:
        super().__init__()
        self.context = Context()
        self.table: dict[str, Any] = {}

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.remember(self.norm1(x)))
        return x + self.mlp(self.norm2(x))

    def remember(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class InAnAttribute(Remembers):
    def remember(self, x: Tensor) -> Tensor:
        y = x if self.last is None else x + self.last.mean() * 0.1
        self.last = x
        return y


class InATable(Remembers):
    def remember(self, x: Tensor) -> Tensor:
        y = x + self.table.get("last", 0.0)
        self.table["last"] = x.mean((0, 1))
        return y


class InAContext(Remembers):
    def remember(self, x: Tensor) -> Tensor:
        y = x + self.context.seen["last"] if "last" in self.context.seen else x
        self.context.seen["last"] = x.mean((0, 1))
        return y


class OfAllMaps(Remembers):
    def remember(self, x: Tensor) -> Tensor:
        self.context.maps.append(x.mean((0, 1)))
        return x + torch.stack(self.context.maps).mean(0)


class InAClass(Remembers):
    def remember(self, x: Tensor) -> Tensor:
        Remembers.shared.append(x.mean((0, 1)))
        return x + Remembers.shared[-2] if len(Remembers.shared) > 2 else x


class CountsInAContext(Remembers):
    def remember(self, x: Tensor) -> Tensor:
        self.context.steps += 1
        return x * (1 + 0.1 * self.context.steps)


class OfTheLastBatch(Remembers):
    def remember(self, x: Tensor) -> Tensor:
        y = x * self.table.get("batch", 1)
        self.table["batch"] = x.shape[0]
        return y


class InTrainingOnly(Remembers):
    def remember(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        y = x + self.context.seen.get("last", 0.0)
        self.context.seen["last"] = x.mean((0, 1))
        return y


READ = [
    (InAnAttribute, "blocks.0.last"),
    (InATable, "blocks.0.table"),
    (InAContext, "blocks.0.context"),
    (OfAllMaps, "blocks.0.context"),
    (InAClass, "outside the model"),
    (CountsInAContext, "blocks.0.context"),
    (OfTheLastBatch, "blocks.0.table"),
    (InTrainingOnly, "blocks.0.context"),
]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    yield
    Remembers.shared.clear()
    caching.clear()


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
@pytest.mark.parametrize("calls", [0, 2])
@pytest.mark.parametrize(("block", "where"), READ)
def test_memory_that_is_read(block: type[Remembers], where: str, calls: int, grad: bool) -> None:
    model = odd(block)
    with torch.set_grad_enabled(grad):
        for _ in range(calls):
            model(image())
    with pytest.raises(TraceError, match=where) as caught:
        rewrite(model, PLAN, frontend="symbolic", validate=False)
    assert f"{block.__name__}.remember" in str(caught.value)
    assert caught.value.hint
    with pytest.raises(TraceError, match=where):
        rewrite(model, PLAN, frontend="export", validate=False)


class KeepsOnly(Remembers):
    def remember(self, x: Tensor) -> Tensor:
        self.context.maps.append(x)
        self.table["last"] = x
        return x + self.context.maps[-1] * 0.1 + self.table["last"] * 0.1


class Scales(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn(y + y * 0.1 + y * 0.1)
        return x + self.mlp(self.norm2(x))


@pytest.mark.filterwarnings(
    "ignore:.*of every call:UserWarning", "ignore:.*during export:UserWarning"
)
@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("calls", [0, 2])
@pytest.mark.slow
def test_what_is_read_in_the_same_call_alone(calls: int, frontend: str) -> None:
    model = odd(KeepsOnly)
    for _ in range(calls):
        model(image())
    kept = [len(block.context.maps) for block in model.blocks]  # type: ignore[union-attr,arg-type]
    fast = rewrite(model, PLAN, frontend=frontend, validate=False)
    assert [len(block.context.maps) for block in model.blocks] == kept  # type: ignore[union-attr,arg-type]
    twin = odd(Scales)
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        wanted = masked_reference(twin, image(3), twin.layout(), **STAGES).output
        torch.testing.assert_close(fast(image(3)), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*of every call:UserWarning")
def test_a_leaf_may_remember() -> None:
    class Forgetful(Mlp):
        calls = 0
        last: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            z = y if self.last is None else y + self.last.mean() * 0.1
            self.last = x
            return z

    with contextlib.suppress(
        UnsupportedModelError
    ):  # under the drop it may be refused, but not for its memory
        rewrite(odd(lambda: Block(mlp=Forgetful())), PLAN, frontend="symbolic", validate=False)


# -- what is kept ------------------------------------------------------------------------------------------------


class Cached(Block):
    """Keeps a table somewhere, in the layers or in a module that runs no attention."""

    def __init__(self, keep: Callable[[Tensor], Tensor], *, leaf: bool) -> None:
        super().__init__(mlp=CachedMlp(keep) if leaf else None)
        self.keep = None if leaf else keep

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn(y if self.keep is None else self.keep(y))
        return x + self.mlp(self.norm2(x))


class CachedMlp(Mlp):
    def __init__(self, keep: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.keep = keep

    def forward(self, x: Tensor) -> Tensor:
        return self.keep(super().forward(x))


class Mixes(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + x.mean(1, keepdim=True))


def cached(keep: Callable[[Tensor], Tensor], *, leaf: bool, mixes: bool) -> Odd:
    blocks = [Cached(keep, leaf=leaf) if i != 1 or not mixes else Mixes() for i in range(2)]
    return scramble(Odd(blocks)).eval()


def check_cache(
    keep: Callable[[Tensor], Tensor], frontend: str, *, leaf: bool, mixes: bool, filled: bool
) -> None:
    caching.clear()
    model = cached(keep, leaf=leaf, mixes=mixes)
    with torch.no_grad():
        wanted = model(image(3))
    if not filled:
        caching.clear()
    before = caching.tables()
    assert bool(before) == filled
    try:
        fast = rewrite(model, PLAN, frontend=frontend, validate=False)
    except (TraceError, UnsupportedModelError):
        assert mixes
        fast = None
    assert mixes == (fast is None)
    after = caching.tables()
    # of what functools keeps, nothing can be taken out alone
    assert len(after) == len(before) or (keep is caching.in_functools and not after)
    assert all(a is b for a, b in zip(after, before, strict=False))
    with torch.no_grad():
        assert torch.equal(model(image(3)), wanted)
        if fast is not None:
            reference = masked_reference(model, image(3), model.layout(), **STAGES).output
            torch.testing.assert_close(fast(image(3)), reference, rtol=1e-4, atol=1e-4)
    assert all(type(table) is Tensor for table in caching.tables())


@pytest.mark.parametrize("keep", caching.PLACES)
@pytest.mark.slow
def test_caches_are_as_before(keep: Callable[[Tensor], Tensor]) -> None:
    index = caching.PLACES.index(keep)
    for filled in (False, True):
        frontend = FRONTENDS[(index + filled) % 2]
        check_cache(keep, frontend, leaf=index % 4 < 2, mixes=False, filled=filled)


@pytest.mark.every_case
@pytest.mark.parametrize("keep", [caching.in_functools, caching.in_a_closure])
def test_caches_are_found_where_the_collector_does_not_look(
    keep: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a server that calls ``gc.freeze()`` after its imports."""
    monkeypatch.setattr(caches, "_imported", caches._Imported())
    gc.freeze()
    try:
        check_cache(keep, "symbolic", leaf=True, mixes=False, filled=False)
        assert gc.get_freeze_count()
    finally:
        gc.unfreeze()


class Watching(Block):
    """A layer that notes whether the collector may run."""

    seen: ClassVar[list[bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(gc.isenabled())
        return super().forward(x)


@pytest.mark.every_case
@pytest.mark.parametrize("plan", [PLAN, "9(40%)"], ids=["right", "refused"])
@pytest.mark.parametrize("on", [True, False], ids=["on", "off"])
def test_the_collector_pauses_and_is_as_before(
    on: bool, plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Watching, "seen", [])
    refusal = contextlib.nullcontext() if plan == PLAN else pytest.raises(skipvit_fx.PlanError)
    if not on:
        gc.disable()
    try:
        with refusal:
            skipvit_fx.rewrite(odd(Watching), plan, example_inputs=image())
        assert gc.isenabled() == on
    finally:
        gc.enable()
    assert Watching.seen
    assert not any(Watching.seen)


@pytest.mark.slow
@pytest.mark.parametrize("filled", [False, True], ids=["empty", "filled"])
@pytest.mark.parametrize("mixes", [False, True], ids=["right", "refused"])
@pytest.mark.parametrize("leaf", [False, True], ids=["layers", "leaf"])
@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("keep", caching.PLACES)
def test_caches_are_as_before_everywhere(
    keep: Callable[[Tensor], Tensor], frontend: str, leaf: bool, mixes: bool, filled: bool
) -> None:
    check_cache(keep, frontend, leaf=leaf, mixes=mixes, filled=filled)


OF_OPERATORS: dict[str, Tensor] = {}


@torch.library.custom_op("skipvit_tests::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    """An author's operator, whose shapes are computed by code that keeps what it sees."""
    return x * 2


@doubled.register_fake
def _(x: Tensor) -> Tensor:
    return OF_OPERATORS.setdefault("first", torch.empty_like(x)).new_empty(x.shape)


class Doubles(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(doubled(x))


def test_an_authors_operator_leaves_nothing_behind() -> None:
    """Calls are not looked at in torch's own operators, but in this one."""
    with pytest.raises(UnsupportedModelError, match=r"doubled"):
        rewrite(odd(Doubles), PLAN, validate=False)
    assert not OF_OPERATORS


@pytest.mark.parametrize(
    "look",
    [skipvit_fx.find_attention, lambda m, x: skipvit_fx.inspect(rewrite(m, PLAN, validate=False))],
)
def test_looking_leaves_no_cache_behind(look: Callable[..., Any]) -> None:
    caching.clear()
    model = cached(caching.in_a_dict, leaf=False, mixes=False)
    look(model, image()) if look is not skipvit_fx.find_attention else look(
        model, example_inputs=image()
    )
    assert not caching.tables()


class Monitor:
    """Watches over something as long as the process runs, as progress bars have one."""

    def __init__(self) -> None:
        self.own = {"ready": False}
        self.start()

    def start(self) -> None:
        self.own["ready"] = True


MONITORS: Any = types.SimpleNamespace(all=())  # of the standard library: left alone


def in_a_dict_monitored(x: Tensor) -> Tensor:
    MONITORS.all += (Monitor(),)
    return caching.in_a_dict(x)


def test_what_is_made_meanwhile_is_whole() -> None:
    caching.clear()
    rewrite(cached(in_a_dict_monitored, leaf=False, mixes=False), PLAN, validate=False)
    assert not caching.tables()
    assert MONITORS.all
    assert all(monitor.own == {"ready": True} for monitor in MONITORS.all)
