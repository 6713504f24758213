"""What a graph took from the modules that it was traced through and does not call. It is watched for changes."""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Iterable
from types import CodeType
from typing import Any, NamedTuple

from torch import fx, nn
from torch.compiler import is_compiling

from skipvit_fx.author.nested import functions_in
from skipvit_fx.errors import UnsupportedModelError
from skipvit_fx.graph.kept import Contents, Kept, same
from skipvit_fx.names import INSERTED
from skipvit_fx.ops.following import sizes
from skipvit_fx.torch_internals import call_hooks_of, children_of, hooks_made, parameters_of

AUTHOR = "_author"
"""Where a rewritten model keeps a view of itself as an object of its author's class, with the same ``__dict__``."""

NOT_THE_AUTHORS = frozenset(vars(fx.GraphModule(nn.Module(), fx.Graph()))) | {AUTHOR, "forward"}
"""Attributes of a rewritten model that do not come from its author."""

_MISSING = object()


class PastTheGraphError(UnsupportedModelError):
    """A module that a graph was traced through was called on its own, with every token.

    Attributes:
        owner: the compiler's child of the rewritten model, which tells it from others.
    """

    def __init__(self, owner: nn.Module, path: str) -> None:
        super().__init__(
            f"module {path!r} was called on its own and would see every token: its computation is part of the graph "
            "of the rewritten model",
            module_path=path,
            hint="call the rewritten model, or one of its methods; skipvit_fx.set_skipping(fast, False) lets all "
            "modules run as the author wrote them",
        )
        self.owner = owner


class StayAway:
    """A forward pre-hook of a module whose attention is in a graph.

    Args:
        owner: its ``skipping`` says whether the graph runs in place of the author's code.
        path: of the module.
    """

    def __init__(self, owner: Any, path: str) -> None:
        self.owner = owner
        self.path = path

    def __call__(self, module: nn.Module, args: Any) -> None:
        if self.owner.skipping:
            raise PastTheGraphError(self.owner, self.path)


class Seen(NamedTuple):
    """What Python read from a module, or may have read, while a graph was made.

    Attributes:
        module: the module.
        attributes: its attributes, with their values.
        held: the number of all entries in its ``__dict__``.
        names: the attributes that the author's code may read.
    """

    module: nn.Module
    attributes: list[tuple[str, Any]]
    held: int
    names: set[str]


class Traced:
    """The modules that a graph was traced through, as they were then.

    Args:
        root: the model.
        paths: paths of these modules; the empty one is the model itself.
        attention: the paths of those that hold the attention of a layer.
        called: paths of the modules that the graph calls.

    Attributes:
        moved: whether a module was put in the place of another since this was last set to false.
    """

    def __init__(
        self,
        root: nn.Module,
        paths: Iterable[str],
        attention: frozenset[str],
        called: Iterable[str],
    ) -> None:
        self.attention = attention
        self.called = frozenset(called)
        self.stale = self.moved = False
        self.modules = {path: root.get_submodule(path) for path in sorted(paths)}
        above = {a for path in {*self.modules, *self.called} for a in _ancestors(path)}
        self.above = {path: root.get_submodule(path) for path in sorted({*above, *self.modules})}
        idle = [
            (module, name, child)
            for path, module in self.modules.items()
            for name, child in module.named_children()
            if self._is_idle(f"{path}.{name}".removeprefix("."))
        ]
        self.read = [*self.modules.values(), *(child for _, _, child in idle)]
        self.children = [(children_of(module), name, child) for module, name, child in idle] + [
            (self.above[path.rpartition(".")[0]]._modules, path.rpartition(".")[2], module)
            for path, module in self.above.items()
            if path
        ]
        self.shapes = [
            (module, name, tuple(tensor.shape))
            for module in self.modules.values()
            for name, tensor in parameters_of(module).items()
            if tensor is not None
        ]
        self.hooks = [
            (path, module, _hooks_on(module)) for path, module in self.modules.items() if path
        ]
        self._handles = hooks_made()
        self._look()

    def _look(self) -> None:
        self.attributes = [
            Seen(
                module,
                [(name, v) for name, v in vars(module).items() if name not in NOT_THE_AUTHORS],
                len(module.__dict__),
                _names(module),
            )
            for module in self.read
        ]
        self.named = [(path, [*children_of(module)]) for path, module in self.above.items()]
        self._kept = Kept(value for seen in self.attributes for _, value in seen.attributes)
        seen = [(vars(s.module), name, v) for s in self.attributes for name, v in s.attributes]
        self._owners = [owner for owner, _, _ in seen]
        self._names = [name for _, name, _ in seen]
        self._values = [value for _, _, value in seen]
        self._dicts = [vars(module) for module in self.read]
        self._sizes = [*map(len, self._dicts)]
        self._parts = Contents(children_of(module) for module in self.above.values())

    def _is_idle(self, path: str) -> bool:
        """Whether a child of a traced module is not called but may be read, such as the dropout of fused attention."""
        return path not in self.above and path not in self.called and f"{path}." != INSERTED

    def of_copy(self, root: nn.Module) -> Traced:
        """The same for a copy of the model; it counts as changed if this one does."""
        copied = Traced(root, self.modules, self.attention, self.called)
        copied.stale = self.changed()
        copied.hooks = [(path, copied.modules[path], count) for path, _, count in self.hooks]
        copied._handles = self._handles
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Return ``None``: the modules that it refers to may not be copied, or not yet. See :meth:`of_copy`."""

    def changed(self) -> bool:
        """Whether Python might now take another path through them than it took."""
        if self.stale:
            return True
        if is_compiling():
            return self._differs()
        if self._is_as_it_was():
            return False
        if self._differs():
            return True
        self.moved = True  # what changed does not matter, or is equal, or is called
        self._look()
        return False

    def _is_as_it_was(self) -> bool:
        """The fast check, by identity, done at every call."""
        return (
            [*map(len, self._dicts)] == self._sizes
            and all(map(operator.is_, map(dict.get, self._owners, self._names), self._values))
            and self._parts.are_so()
            and self._kept.is_so()
            and not self._reshaped()
        )

    def _differs(self) -> bool:
        for module, attributes, count, names in self.attributes:
            held = module.__dict__
            for name, value in attributes:
                if not same(held.get(name, _MISSING), value):
                    return True
            # a new attribute may hide one of the class; torch.compile adds its own while it traces
            if not is_compiling() and len(held) != count and _names(module) - names:
                return True
        for children, name, child in self.children:
            if children.get(name) is not child:
                return True
        for path, names_then in self.named:
            module = self.above[path]
            if [*children_of(module)] != names_then and self._matters(path, names_then):
                return True
        return not self._kept.is_so() or self._reshaped()

    def _matters(self, path: str, before: list[str]) -> bool:
        """Whether an added or removed child makes a difference: to a container, or to code that spells its name."""
        module = self.above[path]
        kind: Any = type(module)
        changed = {*children_of(module)} ^ {*before}
        return path not in self.modules or not changed.isdisjoint(_spelled(kind))

    def _reshaped(self) -> bool:
        for module, name, shape in self.shapes:
            now = parameters_of(module).get(name)
            if now is None or tuple(sizes(now)) != shape:
                return True
        return False

    def refuse_hooks(self) -> None:
        """Check that no hook was put on a module that is not called.

        Raises:
            UnsupportedModelError: one was.
        """
        if self._handles == hooks_made():  # torch counts them
            return
        for path, module, count in self.hooks:
            if _hooks_on(module) != count:
                raise UnsupportedModelError(
                    f"module {path!r} has a hook that never runs: the graph was traced through this module",
                    module_path=path,
                    hint=f"put it on a module that is called, such as {self._called_in(path)!r}; with "
                    "skipvit_fx.set_skipping(fast, False) all modules run as the author wrote them",
                )
        if not is_compiling():
            self._handles = hooks_made()

    def _called_in(self, path: str) -> str:
        """Path of a module that the graph calls, below one that was traced through."""
        module = self.modules[path]
        below = (
            f"{path}.{name}"
            for name, child in module.named_modules()
            if name
            and f"{path}.{name}" not in self.modules
            and next(child.children(), None) is None
        )
        return next(below, path)


def _ancestors(path: str) -> list[str]:
    """The paths of the modules that contain a module, the model's first."""
    names = path.split(".")
    return [".".join(names[:i]) for i in range(len(names))]


def _hooks_on(module: nn.Module) -> tuple[int, ...]:
    """The number of hooks of each kind."""
    return tuple(map(len, call_hooks_of(module)))


def _names(module: nn.Module) -> set[str]:
    """Attributes that the author's code may read; tools add theirs, too, which do not count."""
    kind: Any = type(module)
    spelled = _spelled(kind)
    return {
        name
        for name in vars(module).keys() - NOT_THE_AUTHORS
        if hasattr(kind, name) or name in spelled
    }


@functools.cache
def _spelled(kind: Any) -> frozenset[str]:
    """The names and strings in the code of a class, and of the Python modules that it and its bases are written in."""
    spelled: set[str] = set()
    for base in kind.__mro__:
        written_in = sys.modules.get(base.__module__)
        if base.__module__.partition(".")[0] not in ("torch", "builtins"):
            around = vars(written_in).values() if written_in else ()  # exec leaves none
            for value in [*vars(base).values(), *around]:
                spelled |= names_in(value)
    return frozenset(spelled)


def names_in(function: Any) -> set[str]:
    """The names and strings in the code of a function or property and of all that it wraps; empty for anything else."""
    found: set[str] = set()
    for inner in functions_in(function):
        waiting = [inner.__code__]
        while waiting:
            code = waiting.pop()
            found.update(code.co_names)
            found.update(text for text in code.co_consts if isinstance(text, str))
            waiting += [part for part in code.co_consts if isinstance(part, CodeType)]
    return found
