"""What a model's code reaches outside the model while it is followed, and how it is restored."""

from __future__ import annotations

import collections
import contextlib
import cProfile
import dis
import operator
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import CellType, CodeType, FrameType, FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from skipvit_fx.author.nested import nested
from skipvit_fx.author.questions import STAND_INS, TYPE_QUESTIONS, compares_class
from skipvit_fx.author.referrers import referrers_of
from skipvit_fx.errors import TraceError
from skipvit_fx.torch_internals import FakeTensor, FunctionalTensor

_SPARED = frozenset({"numpy", "skipvit_fx", "sympy", "torch"}) | sys.stdlib_module_names
_TRACED = (fx.Proxy, FakeTensor, FunctionalTensor, torch.SymInt, torch.SymFloat, torch.SymBool)
_MISSING = object()

_MAPPINGS = (dict, collections.OrderedDict, collections.defaultdict, collections.Counter)
_SEQUENCES = (list, collections.deque, set)
_PLAIN = (bool, int, float, str, type(None), torch.Tensor, nn.Module, ModuleType)
_FUNCTIONS = (FunctionType, type(len))


class _Kept(NamedTuple):
    """A mutable object, and what it held."""

    thing: Any
    content: Any
    read: Callable[[Any], Any]
    write: Callable[[Any, Any], None]

    def changed(self) -> bool:
        now = self.read(self.thing)
        if len(now) != len(self.content):
            return True
        if isinstance(now, dict) and not all(map(operator.is_, now, self.content)):
            return True
        return not all(map(operator.is_, _values(now), _values(self.content)))


class Surroundings:
    """The global names that a model's code sees and the containers that it can reach, as they were at first.

    An author's function that keeps a table in a global dict, in a class or in a default argument would keep one that
    tracing made, and return it to the author's model later.
    """

    def __init__(self) -> None:
        self._kept: dict[int, _Kept] = {}
        self._names: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}
        self._put: list[tuple[dict[str, Any], str, Any]] = []
        self._seen: set[CodeType] = set()
        self._spared: set[str] = set()
        self._made: dict[int, Any] = {}
        self._of_class: list[str] = []

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Restore everything on leaving."""
        try:
            yield
        finally:
            for names, name, value in reversed(self._put):
                _assign(names, name, value)
            self.restore()
            for noted in (
                self._put,
                self._kept,
                self._names,
                self._seen,
                self._spared,
                self._made,
                self._of_class,
            ):
                noted.clear()

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """While the author's code runs, note what it can reach before it does, and answer its questions about types."""
        before: Any = sys.getprofile()
        sys.setprofile(self._enter)
        try:
            yield
        finally:
            if isinstance(before, cProfile.Profile):  # cannot be called, unlike other profilers
                before.enable()
            else:
                sys.setprofile(before)

    @contextlib.contextmanager
    def unwatched(self) -> Iterator[None]:
        """While torch's own code runs, note nothing: it makes most of the calls that would be looked at."""
        before = sys.getprofile()
        if before != self._enter:
            yield
            return
        sys.setprofile(None)
        try:
            yield
        finally:
            sys.setprofile(before)

    def refuse_unanswered(self) -> None:
        """Check the questions that the author's code asked.

        Raises:
            TraceError: only a real tensor could answer one of them.
        """
        if self._of_class:
            raise TraceError(
                f"{self._of_class[0]} compares the __class__ of a value, which only a real tensor can answer",
                hint="write isinstance(x, torch.Tensor), or type(x) is torch.Tensor",
            )

    def restore(self) -> None:
        """Restore everything if anything holds values that tracing made."""
        changed = [kept for kept in self._kept.values() if kept.changed()]
        rebound = [
            (names, name, value, now)
            for names, content in self._names.values()
            for name, value in content.items()
            if (now := names.get(name, _MISSING)) is not value and not isinstance(now, ModuleType)
        ]
        caught = [kept.read(kept.thing) for kept in changed] + [now for *_, now in rebound]
        if any(map(holds_traced, caught)):
            for kept in changed:
                kept.write(kept.thing, kept.content)
            for names, name, value, _ in rebound:
                _assign(names, name, value)

    # -- what code can reach --------------------------------------------------------------------------------------

    def _enter(self, frame: FrameType, event: str, _: Any) -> None:
        if event != "call" or (module := str(frame.f_globals.get("__name__"))) in self._spared:
            return
        if _is_spared(module):  # asked once: this runs at every function call
            self._spared.add(module)
            return
        values = list(frame.f_locals.values())
        if (
            frame.f_code.co_name == "__init__" and values
        ):  # still empty, and must not be emptied later
            self._made.setdefault(id(values[0]), values[0])
        if frame.f_code not in self._seen:
            self._seen.add(frame.f_code)
            if compares_class(frame.f_code):
                self._of_class.append(frame.f_code.co_qualname)
            values += self._globals(frame.f_code, frame.f_globals)
            values += _cells(frame.f_code)
            self._answer(frame.f_globals)
        self._look_into(values)

    def _globals(self, code: CodeType, names: dict[str, Any]) -> list[Any]:
        """Record what the names in a code object stand for, and return it."""
        found: list[Any] = []
        scopes = [names]
        for name in code.co_names:
            value = names.get(name)
            if isinstance(value, ModuleType) and not _is_spared(value.__name__):
                scopes.append(vars(value))
        for scope in scopes:
            _, content = self._names.setdefault(id(scope), (scope, {}))
            for name in code.co_names:
                if name in scope or scope is names:
                    content.setdefault(name, scope.get(name, _MISSING))
                    found.append(scope.get(name))
        return found

    def _answer(self, names: dict[str, Any]) -> None:
        """Let code with these global names ask about types, and get the answer for what a value stands for."""
        stand_ins = {k: v for k, v in TYPE_QUESTIONS.items() if k not in names}
        for name, value in names.items():
            if isinstance(value, _FUNCTIONS) and value in STAND_INS:
                stand_ins[name] = STAND_INS[value]
        for name, value in stand_ins.items():
            self._put.append((names, name, names.get(name, _MISSING)))
            names[name] = value

    def _look_into(self, things: Iterable[Any]) -> None:
        waiting = list(things)
        while waiting:
            thing = waiting.pop()
            if id(thing) not in self._kept and id(thing) not in self._made:
                waiting += self._parts(thing)

    def _parts(self, thing: Any) -> Iterable[Any]:
        """Record an object, and return what it holds."""
        kind = type(thing)
        if issubclass(kind, nn.Module):
            return kind.__mro__
        if issubclass(kind, _PLAIN) or issubclass(kind, _TRACED):
            return ()
        if kind in _MAPPINGS:
            return _values(self._keep(thing, dict, _put_items))
        if kind in _SEQUENCES:
            return _values(self._keep(thing, list, _put_elements))
        if kind is tuple:
            return tuple(thing)
        if kind is CellType:
            return _values(self._keep(thing, _cell, _put_cell))
        if _is_spared(
            getattr(thing, "__module__", None) if issubclass(kind, type) else kind.__module__
        ):
            return (vars(thing),) if kind is FunctionType else ()
        if issubclass(kind, type):
            return _values(self._keep(thing, _named_in_class, _put_in_class))
        return (kind, vars(thing)) if hasattr(thing, "__dict__") else ()

    def _keep(
        self, thing: Any, read: Callable[[Any], Any], write: Callable[[Any, Any], None]
    ) -> Any:
        content = read(thing)
        self._kept[id(thing)] = _Kept(thing, content, read, write)
        return content


def _is_spared(module: Any) -> bool:
    known = isinstance(module, str) and module in sys.modules
    return not known or module.partition(".")[0] in _SPARED


def _cells(code: CodeType) -> list[CellType]:
    """The variables of enclosing functions that a code object assigns to."""
    assigned = {
        step.argval for step in dis.get_instructions(code) if step.opname == "STORE_DEREF"
    } & set(code.co_freevars)
    if not assigned:
        return []
    functions = [f for f in referrers_of(code) if isinstance(f, FunctionType)]
    return [cell for function in functions for cell in function.__closure__ or ()]


def _values(content: Any) -> Iterable[Any]:
    return content.values() if isinstance(content, Mapping) else content


def _assign(names: dict[str, Any], name: str, value: Any) -> None:
    if value is _MISSING:
        names.pop(name, None)
    else:
        names[name] = value


def _put_items(thing: Any, content: dict[Any, Any]) -> None:
    thing.clear()
    thing.update(content)


def _put_elements(thing: Any, content: list[Any]) -> None:
    thing.clear()
    if isinstance(thing, set):
        thing.update(content)
    else:
        thing.extend(content)


def _named_in_class(kind: type) -> dict[str, Any]:
    return {name: value for name, value in vars(kind).items() if not name.startswith("__")}


def _put_in_class(kind: type, content: dict[str, Any]) -> None:
    now = _named_in_class(kind)
    for name in [name for name in now if name not in content]:
        type.__delattr__(kind, name)
    for name, value in content.items():
        if now.get(name, _MISSING) is not value:
            type.__setattr__(kind, name, value)


def _cell(cell: CellType) -> list[Any]:
    try:
        return [cell.cell_contents]
    except ValueError:  # empty
        return []


def _put_cell(cell: CellType, content: list[Any]) -> None:
    if content:
        cell.cell_contents = content[0]
    else:
        del cell.cell_contents


def holds_traced(thing: Any) -> bool:
    """Whether it holds something that tracing made, however nested."""
    return any(issubclass(type(part), _TRACED) for part in nested(thing))
