"""The rewritten model: an object of the model's class that is also a graph module."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from skipvit_fx.errors import GuardError, SavedModelError
from skipvit_fx.graph import recompute
from skipvit_fx.graph.calls import Call, Form, with_data
from skipvit_fx.graph.more_graphs import another_form, author_of, capture_call, not_now, start_anew
from skipvit_fx.graph.own import Own, Rewrite, Settings, set_settings, settings_of
from skipvit_fx.graph.traced_through import AUTHOR, NOT_THE_AUTHORS, PastTheGraphError
from skipvit_fx.names import OWN_CHILD
from skipvit_fx.ops.following import in_compilation
from skipvit_fx.torch_internals import HOOKS, children_of, graph_of, pytree


class SkipViTModule(fx.GraphModule):
    """A ``torch.fx.GraphModule`` that is also an object of the model's class, with all its attributes.

    ``state_dict`` keys and their order are the model's. It can be called in every way that the model can, and so can
    its methods: a call that has no graph yet is captured, rewritten and validated when it is made. ``graph`` is the
    graph of the example call.

    While nothing is skipped, the author's forward runs on this state. The result is bit-identical, even where PyTorch
    takes inference kernels that a graph cannot show.
    """

    @property
    def own(self) -> Own:
        """The compiler's own child of the module."""
        child = children_of(self)[OWN_CHILD]
        assert isinstance(child, Own)
        return child

    @property
    def skipping(self) -> bool:
        """Whether the graph runs, rather than the author's forward."""
        return self.own.skipping

    @property
    def graph(self) -> fx.Graph:
        """The graph of the example call, brought up to date with the modules, since the caller may run it.

        Raises:
            SkipViTError: in the cases in which the next call would.
        """
        self._keep_up("", (), {})
        return graph_of(self)

    @graph.setter
    def graph(self, graph: fx.Graph) -> None:
        fx.GraphModule.graph.fset(self, graph)  # type: ignore[attr-defined]

    # -- calls ------------------------------------------------------------------------------------------------

    def graph_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph for this kind of call, whatever the switches say. It is made if there is none yet.

        Raises:
            GuardError: there are too many graphs, or this call is being compiled.
            SkipViTError: as :func:`skipvit_fx.rewrite` raises, if a graph has to be made.
        """
        return self._run_graph("forward", args, kwargs)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of every rewritten model."""
        if self.skipping:
            return self.graph_forward(*args, **kwargs)
        return self.own.run(self.__dict__[AUTHOR], *args, **kwargs)

    def _call_method(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A method of the author's class: its own code, or a graph of it if that code would run attention."""
        own = self.own
        if own.skipping and any(call.method == name for call in own.calls):
            return self._run_graph(name, args, kwargs)
        try:
            return own.method(name)(self, *args, **kwargs)
        except PastTheGraphError as error:
            if error.owner is not own:
                raise
        return self._run_graph(name, args, kwargs)

    def prepare(self, *args: Any, **kwargs: Any) -> Form:
        """The graph for this kind of call, and how it takes the arguments. It is made if there is none yet.

        Raises:
            SkipViTError: as :func:`skipvit_fx.rewrite` does.
        """
        self._keep_up("forward", args, kwargs)
        there = next(self._forms_for("forward", args, kwargs), None)
        return there or another_form(self, "forward", args, kwargs, [])

    def _forms_for(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Iterator[Form]:
        """The forms that were made for this kind of call."""
        for form in self.own.forms:
            if form.fits(method, args, kwargs) and form.call.recorded.is_so(training=self.training):
                yield form

    def _keep_up(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Make sure that the graphs still match the modules that they were traced through."""
        traced = self.own.traced
        if traced is not None:
            traced.refuse_hooks()
            if traced.changed():
                if in_compilation():
                    raise not_now("compiled", "a module was changed since the last call")
                start_anew(self, method, args, kwargs)
            if traced.moved:
                traced.moved = False
                for call in self.own.calls:
                    call.at_hand = None
        if (replacements := self.own.replacements) is not None:
            replacements.check()

    def _run_graph(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._keep_up(method, args, kwargs)
        refused: list[Call] = []
        for form in self._forms_for(method, args, kwargs):
            # a branch in the author's code may depend on more than the kinds of arguments
            try:
                return form.call.compute(self, form.values(args, kwargs))
            except GuardError:
                refused.append(form.call)
        if in_compilation():
            raise not_now("compiled")
        if any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves((args, kwargs))):
            return self._run_traced(method, args, kwargs)
        form = another_form(self, method, args, kwargs, refused)
        return form.call.compute(self, form.values(args, kwargs))

    def _run_traced(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the first graph of a method on the proxies of whoever is tracing it."""
        call = next(call for call in self.own.calls if call.method == method)
        return call.run(self, *self.own.inputs_of(call, args, kwargs))

    def _get_name(self) -> str:
        return f"SkipViT{type(self).__name__}"

    # -- what a graph module does -----------------------------------------------------------------------------

    def recompile(self) -> Any:
        """Regenerate the graph's code; ``forward`` still chooses between the graphs and the author's forward."""
        owner: Any = type(self)
        graph = graph_of(self)
        with graph.on_generate_code(lambda _: recompute.transformer(graph)):
            made = super().recompile()
        code, owner.forward = owner.forward, owner.call
        first = next((call for call in self.own.calls if call.graph is graph), None)
        if first is not None:
            first.run, first.code, first.direct, first.at_hand = code, made, None, None
        return made

    def adopt(self, owner: dict[str, Any]) -> None:
        """Take over a module's ``__dict__``, including the compiler's child, except a graph's state and ``forward``."""
        for name, value in owner.items():
            if name not in NOT_THE_AUTHORS or name in vars(nn.Module()):
                self.__dict__[name] = value
        self._show_author()

    def _show_author(self) -> None:
        view = object.__new__(self.own.author)
        object.__setattr__(view, "__dict__", self.__dict__)
        self.__dict__[AUTHOR] = view

    def __deepcopy__(self, memo: dict[int, Any]) -> SkipViTModule:
        copied: SkipViTModule = object.__new__(type(self))
        memo[id(self)] = copied
        state = {name: value for name, value in self.__dict__.items() if name != AUTHOR}
        copied.__dict__.update(copy.deepcopy(state, memo))
        copied._show_author()
        graph_of(copied).owning_module = copied
        if self.own.traced is not None:
            copied.own.traced = self.own.traced.of_copy(copied)
        if self.own.replacements is not None:
            copied.own.replacements = self.own.replacements.of_copy(copied)
        return copied

    def __copy__(self) -> SkipViTModule:
        copied: SkipViTModule = object.__new__(type(self))
        copied.__dict__.update(self.__dict__)
        for name in ("_modules", "_parameters", "_buffers"):
            copied.__dict__[name] = dict(self.__dict__[name])
        copied._show_author()
        return copied

    def __reduce__(self) -> Any:
        own = self.own
        calls = [(c.method, c.example, c.recorded.told, c.record.before) for c in own.calls]
        hooks = {name: self.__dict__[name] for name in HOOKS}
        return _rebuild, (author_of(self), own.rewrite, calls, own.drops, settings_of(own), hooks)


def _rebuild(
    author: nn.Module,
    rewrite: Rewrite,
    calls: list[tuple[str, Any, bool, tuple[str, ...]]],
    drops: bool,
    settings: Settings,
    hooks: dict[str, Any],
) -> SkipViTModule:
    """A rewritten model from a pickle: rewritten again, with the calls that it had.

    Raises:
        SavedModelError: it does not compute what the pickled model did.
    """
    (_, example, recorded, _), *others = calls
    args, kwargs = with_data(example, author)
    with torch.set_grad_enabled(recorded):
        fast = rewrite(author, args, kwargs)
    fast.own.rewrite, fast.own.drops = rewrite, drops
    for method, example, recorded, _ in others:
        args, kwargs = with_data(example, author)
        with torch.set_grad_enabled(recorded):
            capture_call(fast, method, args, kwargs)
    for call, (_, _, _, lines) in zip(fast.own.calls, calls, strict=True):
        if call.record.before != lines:
            raise SavedModelError(
                f"{type(author).__name__} does not compute what it did when it was pickled",
                hint="unpickle it with the library versions that it was pickled with, or rewrite the model again",
            )
    set_settings(fast.own, settings)
    fast.__dict__.update(hooks)
    return fast
