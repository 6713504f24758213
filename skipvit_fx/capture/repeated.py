"""A model called several times: whether a call computes the same after other calls, and for a single sample."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from skipvit_fx.author.code import AuthorError, author_code
from skipvit_fx.author.nested import nested
from skipvit_fx.author.questions import (
    OF_GRADIENTS,
    asked_by_a_library,
    author_frame,
    spelled_place,
)
from skipvit_fx.capture.cloning import fake_structure
from skipvit_fx.capture.fakes import TracelessFakeMode, fake_inputs
from skipvit_fx.errors import TraceError
from skipvit_fx.graph.inputs import Inputs
from skipvit_fx.torch_internals import pytree, tensor_leaves

_PLAIN = (bool, int, float, str)

SourceLine = tuple[str, int, str]
"""A line of source: file, line number, function."""


@dataclass(frozen=True)
class Alone:
    """What a batch of one sample shows.

    Attributes:
        differs: whether its computation differs from that for several samples.
        asked: the functions, methods and attributes of tensors, such as ``dtype``, that the code around attention uses;
            those about gradients only if the author's code itself asks.
    """

    differs: bool
    asked: frozenset[str]


def refuse_calls_that_remember(
    model: nn.Module, mode: TracelessFakeMode, inputs: Inputs, opened: frozenset[str]
) -> None:
    """Call the model in eval mode, then in train mode with a larger batch, then both again.

    Raises:
        TraceError: around attention, a call reads what another call left, or computes something different after it.
    """
    calls = _Calls(model, mode, inputs, opened)
    firsts = []
    for training in (False, True):
        kept = _numbers_kept(calls.model, opened)
        firsts.append((training, kept, _called(calls, training)))
    for training, kept, first in firsts:
        meanwhile = _numbers_kept(calls.model, opened)
        again = _called(calls, training)
        if first is None or again is None:
            continue  # tracing fails as well, and says why
        if step := _first_difference(first, again):
            changed = [name for name, numbers in meanwhile.items() if numbers != kept.get(name)]
            raise TraceError(
                "the model's second call computes something different from its first, because of what it keeps: "
                f"{', '.join(changed) or 'something outside the model'}, in {spelled_place(*step.place)}",
                hint="a graph is the same in every call; keep what changes in a module that runs no attention",
            )


def _called(calls: _Calls, training: bool) -> list[_Step] | None:
    """What a call computes in this mode, which has its own batch size; None if the model cannot be called like this."""
    calls.model.train(training)
    seen = calls.surroundings.watched() if training else contextlib.nullcontext()
    try:
        with seen:
            return calls.try_run(calls.batch + training)
    except _StaleError as error:
        raise _remembers(calls.model, error) from error


def call_alone(
    model: nn.Module, mode: TracelessFakeMode, inputs: Inputs, opened: frozenset[str]
) -> Alone:
    """Compare a batch of one with larger ones in eval mode. What the code asks for is noted in train mode as well.

    Raises:
        TraceError: around attention, a call reads what another call left.
    """
    calls = _Calls(model, mode, inputs, opened)
    try:
        runs = [calls.try_run(batch) for batch in (1, 2, 3)]
        calls.model.train()
        calls.try_run(2)
    except _StaleError as error:
        raise _remembers(calls.model, error) from error
    alike = None not in runs and all(len(run or ()) == len(runs[1] or ()) for run in runs)
    differs = not alike or not all(map(_alike, *(run or () for run in runs)))
    return Alone(differs, frozenset(calls.recorder.asked))


class _StaleError(Exception):
    """A tensor that an earlier call computed from its inputs is read."""

    def __init__(self, tensor: Tensor, place: SourceLine) -> None:
        super().__init__()
        self.tensor = tensor
        self.place = place


# -- one call ---------------------------------------------------------------------------------------------------------


class _Step(NamedTuple):
    """A torch function, or a leaf module, that worked on values computed from the inputs.

    Attributes:
        function: its name, or the module's path.
        operands: where its tensors came from: the number of a step of this call, the ``id`` of one that existed before,
            None for one that was made without the inputs.
        numbers, others: its other arguments.
        place: its line in the author's code.
    """

    function: str
    operands: tuple[int | None, ...]
    numbers: tuple[float, ...]
    others: tuple[str, ...]
    place: SourceLine


def _first_difference(one: list[_Step], other: list[_Step]) -> _Step | None:
    for a, b in zip(one, other, strict=False):
        if a[:-1] != b[:-1]:
            return b
    longer = max(one, other, key=len)
    return longer[min(len(one), len(other))] if len(one) != len(other) else None


def _alike(one: _Step, two: _Step, three: _Step) -> bool:
    """Whether a step is the same for batches of one, two and three, except for numbers linear in the batch size."""
    kinds = {(s.function, s.operands, s.others, len(s.numbers)) for s in (one, two, three)}
    numbers = zip(one.numbers, two.numbers, three.numbers, strict=True) if len(kinds) == 1 else ()
    return len(kinds) == 1 and all(b - a == c - b for a, b, c in numbers)


class _Origin(NamedTuple):
    """Where a tensor came from: a call, and a step in it; None if it does not depend on the inputs."""

    tensor: Tensor
    call: int
    step: int | None


class _Recorder(TorchFunctionMode):
    """Notes what is computed from the inputs around attention. What happens inside leaf modules does not matter."""

    def __init__(self) -> None:
        super().__init__()
        self.call = 0
        self.in_leaves = 0
        self.steps: list[_Step] = []
        self.asked: dict[str, None] = {}
        self._origins: dict[int, _Origin] = {}

    def begin(self, inputs: Any) -> None:
        """Note that another call begins."""
        self.call += 1
        self.steps = []
        self._made(tensor_leaves(inputs), 0)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if self.in_leaves:
            return func(*args, **(kwargs or {}))
        self.see((args, kwargs))
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", str(func))
        question = func.__self__.__name__ if name == "__get__" else name
        if question not in OF_GRADIENTS or not asked_by_a_library(sys._getframe(1)):
            self.asked[question] = None
        self.note(name, (args, kwargs), args[0] if name == "__setitem__" else out)
        return out

    def note(self, function: str, given: Any, out: Any) -> None:
        """Note that something was computed."""
        outs, leaves = tensor_leaves(out), _leaves(given)
        tensors = tensor_leaves(leaves)
        if not outs:
            return
        if not any(self._of_inputs(tensor) for tensor in tensors):
            self._made(outs, None)
            return
        place = _author_place()
        rest = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
        numbers = tuple(leaf for leaf in rest if isinstance(leaf, (bool, int, float)))
        others = tuple(str(leaf) for leaf in rest if not isinstance(leaf, (bool, int, float)))
        operands = tuple(map(self._operand, tensors))
        self.steps.append(_Step(function, operands, numbers, others, place))
        self._made(outs, len(self.steps))

    def see(self, given: Any) -> None:
        """Note that tensors are about to be read.

        Raises:
            _StaleError: an earlier call made one of them.
        """
        for tensor in tensor_leaves(given):
            if self._of_inputs(tensor) and self._origins[id(tensor)].call != self.call:
                raise _StaleError(tensor, _author_place())

    def _of_inputs(self, tensor: Tensor) -> bool:
        origin = self._origins.get(id(tensor))
        return origin is not None and origin.step is not None

    def _operand(self, tensor: Tensor) -> int | None:
        before = _Origin(tensor, 0, None)  # kept alive, so that no other tensor gets its id
        origin = self._origins.setdefault(id(tensor), before)
        return origin.step if origin.call else id(tensor)

    def _made(self, tensors: list[Tensor], step: int | None) -> None:
        for tensor in tensors:
            self._origins[id(tensor)] = _Origin(tensor, self.call, step)


class _Calls:
    """Calls of one fake copy of a model, one after another."""

    def __init__(
        self,
        model: nn.Module,
        mode: TracelessFakeMode,
        inputs: Inputs,
        opened: frozenset[str],
    ) -> None:
        self.recorder = _Recorder()
        self.model = fake_structure(model, mode).eval()
        self.batch = max(
            (t.shape[0] for t in tensor_leaves(inputs.by_parameter(_same)) if t.ndim), default=1
        )
        self.surroundings = mode.surroundings
        self._mode = mode
        self._arguments = pytree.tree_map(_first_sample, (inputs.args, inputs.kwargs))
        for path, module in self.model.named_modules():
            if path not in opened:
                module.register_forward_pre_hook(self._enter, with_kwargs=True)
                module.register_forward_hook(
                    lambda _, args, kwargs, out, path=path: self._leave(path, (args, kwargs), out),
                    with_kwargs=True,
                    always_call=True,
                )

    def run(self, batch: int) -> list[_Step]:
        """What a call with this many samples computes."""
        args, kwargs = fake_inputs(self._mode, self._arguments, more_batch=batch - 1)
        self.recorder.begin((args, kwargs))
        quiet = warnings.catch_warnings(action="ignore")  # it warns again when it is traced
        with quiet, self._mode, torch.no_grad(), self.recorder, author_code():
            out = self.model(*args, **kwargs)
        self.recorder.see(out)
        return self.recorder.steps

    def try_run(self, batch: int) -> list[_Step] | None:
        """The same; None if the model cannot be called like this."""
        try:
            return self.run(batch)
        except AuthorError:
            self.recorder.in_leaves = 0
            return None

    def _enter(self, _: nn.Module, *given: Any) -> None:
        if not self.recorder.in_leaves:
            self.recorder.see(given)
        self.recorder.in_leaves += 1

    def _leave(self, path: str, given: Any, out: Any) -> None:
        self.recorder.in_leaves -= 1
        if not self.recorder.in_leaves:
            self.recorder.note(path, given, out)


def _same(leaf: Any) -> Any:
    return leaf


def _first_sample(leaf: Any) -> Any:
    return leaf[:1] if isinstance(leaf, Tensor) and leaf.ndim else leaf


def _leaves(value: Any) -> list[Any]:
    """The leaves of arguments, including those of slices."""
    parts = pytree.tree_map(
        lambda v: (v.start, v.stop, v.step) if isinstance(v, slice) else v, value
    )
    return pytree.tree_leaves(parts)


def _author_place() -> SourceLine:
    frame = author_frame()
    return frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_qualname


# -- where it was left ------------------------------------------------------------------------------------------------


def _numbers_kept(model: nn.Module, paths: frozenset[str]) -> dict[str, list[Any]]:
    """The plain values in the attributes of modules, however nested."""
    return {
        f"{path}.{name}".removeprefix("."): [p for p in nested(value) if isinstance(p, _PLAIN)]
        for path in sorted(paths)
        for name, value in vars(model.get_submodule(path)).items()
        if name != "training"
    }


def _remembers(model: nn.Module, stale: _StaleError) -> TraceError:
    where = next(_holders(model, stale.tensor), "something outside the model")
    return TraceError(
        f"the model reads in {spelled_place(*stale.place)} what an earlier call left in {where}",
        hint="a graph keeps no state; keep it in a module that runs no attention, or compute it again in every call",
    )


def _holders(model: nn.Module, tensor: Tensor) -> Iterator[str]:
    """Attributes of the model that hold a tensor, however nested."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if any(part is tensor for part in nested(value)):
                yield f"{path}.{name}".removeprefix(".")
