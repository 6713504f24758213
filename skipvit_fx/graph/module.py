"""The rewritten model: an object of the model's class that is also a graph module."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Collection, Iterable, Iterator
from fractions import Fraction
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, fx, nn

from skipvit_fx.errors import GuardError, SavedModelError, TraceError, UnsupportedModelError
from skipvit_fx.graph import recompute
from skipvit_fx.graph.calls import (
    Call,
    Form,
    differing_numbers,
    form_of,
    kinds_of,
    signature_of,
    with_live,
)
from skipvit_fx.graph.inputs import places_of
from skipvit_fx.graph.traced_through import (
    AUTHOR,
    NOT_THE_AUTHORS,
    PastTheGraphError,
    StayAway,
    Traced,
)
from skipvit_fx.names import CONSTANT_BUFFER, OWN_CHILD
from skipvit_fx.ops.following import in_compilation, in_jit_trace
from skipvit_fx.ops.select import Select
from skipvit_fx.ops.switch import Switchable
from skipvit_fx.torch_internals import (
    HOOKS,
    buffers_of,
    children_of,
    graph_of,
    hooks_before,
    pytree,
)

MOST_CALLS = 16
"""The largest number of graphs of one rewritten model."""

_SMALL = 4096
"""The largest number of elements of an integer tensor whose values an example keeps."""

Rewrite = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], "SkipViTModule"]


class Replacements(Protocol):
    """Judges the modules that were replaced since a graph was made; ``uses`` says how the graph calls them."""

    uses: dict[str, Any]

    def check(self) -> None:
        """Raise if one of them would give wrong results."""

    def of_copy(self, root: nn.Module) -> Replacements:
        """The same for a copy of the model."""

    def with_more(self, uses: Any) -> Replacements:
        """The same for one more graph."""


class Own(Switchable):
    """The only child that the compiler adds: the inserted modules, and the state of the rewritten model as a whole.

    It is not kept on the module itself, because the author's attributes there may have any name.

    Attributes:
        author: the class of the model.
        run: its forward, or the method set on the model instance in its place; takes the model as its first argument.
        calls: the graphs; the one for the example call comes first.
        forms: the ways in which their arguments were passed so far.
        drops: whether the plan drops anything at all.
        rewrite: rewrites the author's model for another call.
        traced: the modules that the graphs were traced through; ``None`` until the first graph is complete.
        replacements: the modules that they call on fewer tokens.
        built_in: names of number arguments that a graph cannot take as inputs, so that each value needs its own graph.
    """

    def __init__(self, author: type[nn.Module], run: Callable[..., Any]) -> None:
        super().__init__()
        self.author = author
        self.run = run
        self.calls: list[Call] = []
        self.forms: list[Form] = []
        self.drops = True
        self.rewrite: Rewrite | None = None
        self.traced: Traced | None = None
        self.replacements: Replacements | None = None
        self.built_in: set[str] = set()

    @property
    def skipping(self) -> bool:
        """Whether the graph runs, rather than the author's code."""
        return self.drops and self.active

    def method(self, name: str) -> Callable[..., Any]:
        """A method of the author's class; takes the model as its first argument."""
        method: Callable[..., Any] = getattr(self.author, name)
        return self.run if name == "forward" else method

    def inputs_of(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The arguments that the graph of a call takes, in its order, from those of a call like it."""
        places = places_of(signature_of(self.method(call.method)), args, kwargs)
        return form_of(call, places, args, kwargs).values(args, kwargs)

    def forward(self, x: Any) -> Any:
        """Return the input: some models call all their children in turn."""
        return x


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

    def author_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the author's forward on this state."""
        return self.own.run(self.__dict__[AUTHOR], *args, **kwargs)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of every rewritten model."""
        run = self.graph_forward if self.skipping else self.author_forward
        return run(*args, **kwargs)

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
        return there or self._another_form("forward", args, kwargs, [])

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
                    raise _not_now("compiled", "a module was changed since the last call")
                self._start_anew(method, args, kwargs)
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
            raise _not_now("compiled")
        if any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves((args, kwargs))):
            return self._run_traced(method, args, kwargs)
        form = self._another_form(method, args, kwargs, refused)
        return form.call.compute(self, form.values(args, kwargs))

    def _run_traced(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the first graph of a method on the proxies of whoever is tracing it."""
        call = next(call for call in self.own.calls if call.method == method)
        return call.run(self, *self.own.inputs_of(call, args, kwargs))

    def _another_form(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], refused: list[Call]
    ) -> Form:
        """A form for a call that has none yet, for an existing graph or a new one."""
        own = self.own
        signature = signature_of(own.method(method))
        places = places_of(signature, args, kwargs)
        kinds = kinds_of(signature, places, args, kwargs)
        alike = [
            c
            for c in own.calls
            if c.method == method and differing_numbers(kinds, c.kinds) == c.numbers
        ]
        fitting = (c for c in alike if c.recorded.is_so(training=self.training))
        call = next((c for c in fitting if c not in refused), None)
        if call is None:
            call = self._capture(method, args, kwargs, self._numbers(method, kinds))
        args, kwargs = with_live(call.numbers, places, args, kwargs)
        form = form_of(call, places, args, kwargs)
        own.forms.append(form)
        return form

    def _numbers(self, method: str, kinds: dict[str, Any]) -> set[str]:
        """The numbers that differ from another call like this one, so that not every value gets a graph of its own."""
        others = (c for c in self.own.calls if c.method == method)
        found = (differing_numbers(kinds, other.kinds) for other in others)
        return next((names for names in found if names), set()) - self.own.built_in

    def _capture(
        self,
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        numbers: Collection[str] = (),
    ) -> Call:
        own = self.own
        if numbers:
            places = places_of(signature_of(own.method(method)), args, kwargs)
            try:
                return self._capture(method, *with_live(numbers, places, args, kwargs))
            except (TraceError, UnsupportedModelError):  # they are used as more than factors
                own.built_in |= set(numbers)
        if in_jit_trace():
            raise _not_now("traced")
        if len(own.calls) >= MOST_CALLS:
            raise GuardError(
                f"the model was called in {MOST_CALLS} ways, each with its own graph, and this is another one",
                hint="pass the argument that changes from call to call as a tensor",
            )
        assert own.rewrite is not None
        author = author_of(self)
        if method != "forward":
            author.__dict__["forward"] = types.MethodType(own.method(method), author)
        made = own.rewrite(author, args, kwargs)
        call = self._take_over(made)
        call.method = method
        return call

    def _take_over(self, made: SkipViTModule) -> Call:
        """Run the graph of another rewritten model, made from the same author's model, on the modules of this one."""
        own = self.own
        (call,) = made.own.calls
        group = f"call_{len(own.calls) + 1}"
        inserted = nn.Module()
        for name, child in made.own.named_children():
            inserted.add_module(name, child)
        _set(inserted, _settings(own))
        own.add_module(group, inserted.train(own.training))
        for node in made.graph.nodes:
            target = str(node.target)
            if node.op == "call_module" and target.startswith(f"{OWN_CHILD}."):
                node.target = f"{OWN_CHILD}.{group}{target.removeprefix(OWN_CHILD)}"
            elif node.op == "get_attr" and target.startswith(CONSTANT_BUFFER):
                node.target = f"{target}_{group}"
                if node.target not in buffers_of(self):
                    self.register_buffer(node.target, getattr(made, target), persistent=False)
        made.recompile()
        call.record = call.record.within(group)
        own.calls.append(call)
        assert own.traced is not None
        assert made.own.traced is not None
        watch(self, {*own.traced.modules, *made.own.traced.modules}, made.own.traced.attention)
        if own.replacements is not None and made.own.replacements is not None:
            own.replacements = own.replacements.with_more(made.own.replacements.uses)
        return call

    def _start_anew(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Replace all graphs, because a module that they were traced through has changed."""
        own = self.own
        if method != "forward":
            args, kwargs = with_data(own.calls[0].example, self)
        assert own.rewrite is not None
        made = own.rewrite(author_of(self), args, kwargs)
        settings = _settings(own)
        for name in [name for name in buffers_of(self) if name.startswith(CONSTANT_BUFFER)]:
            del buffers_of(self)[name]
        for name, constant in made.named_buffers(recurse=False):
            if name.startswith(CONSTANT_BUFFER):
                self.register_buffer(name, constant, persistent=False)
        kept = children_of(own)
        kept.clear()
        kept.update(children_of(made.own.train(own.training)))
        own.calls, own.forms = made.own.calls, made.own.forms
        _set(own, settings)
        self.meta = made.meta
        self.graph = made.graph
        traced = made.own.traced
        assert traced is not None
        watch(self, traced.modules, traced.attention)
        if made.own.replacements is not None:
            own.replacements = made.own.replacements.of_copy(self)

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
        return _rebuild, (author_of(self), own.rewrite, calls, own.drops, _settings(own), hooks)


def _not_now(
    followed: str, why: str = "the model is called in a way that no graph was made for yet"
) -> GuardError:
    return GuardError(
        f"{why}, and the model is being {followed}",
        hint=f"call the rewritten model once like this before it is {followed}",
    )


class _Settings(NamedTuple):
    """The settings that change while a model is trained.

    Attributes:
        enabled, train_only: of every inserted module.
        ratios: the ratios that apply now, by the path of the selecting module.
    """

    enabled: bool
    train_only: bool
    ratios: dict[str, Fraction]


def _settings(own: Own) -> _Settings:
    ratios = {path: m.current for path, m in own.named_modules() if isinstance(m, Select)}
    return _Settings(own.enabled, own.train_only, ratios)


def _set(inserted: nn.Module, settings: _Settings) -> None:
    for path, module in inserted.named_modules():
        if isinstance(module, Switchable):
            module.enabled, module.train_only = settings.enabled, settings.train_only
        if isinstance(module, Select):
            module.current = settings.ratios.get(path, module.current)


def _rebuild(
    author: nn.Module,
    rewrite: Rewrite,
    calls: list[tuple[str, Any, bool, tuple[str, ...]]],
    drops: bool,
    settings: _Settings,
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
            fast._capture(method, args, kwargs)
    for call, (_, _, _, lines) in zip(fast.own.calls, calls, strict=True):
        if call.record.before != lines:
            raise SavedModelError(
                f"{type(author).__name__} does not compute what it did when it was pickled",
                hint="unpickle it with the library versions that it was pickled with, or rewrite the model again",
            )
    _set(fast.own, settings)
    fast.__dict__.update(hooks)
    return fast


# -- the author's model -----------------------------------------------------------------------------------------------


def without_data(leaf: Any) -> Any:
    """A tensor without its values, except for a small integer tensor."""
    if not isinstance(leaf, Tensor):
        return leaf
    few = leaf.numel() <= _SMALL and not leaf.is_floating_point()
    return leaf.detach().clone() if few else torch.empty_like(leaf, device="meta")


def with_data(example: Any, model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of an example whose tensors hold no values: zeros, on the device of the model's parameters."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def filled(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return torch.zeros_like(leaf, device=device) if leaf.is_meta else leaf.to(device)

    found: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(filled, example)
    return found


def author_of(fast: SkipViTModule) -> nn.Module:
    """The model that was rewritten: a copy of its structure, of the author's class, that shares all tensors."""
    own = fast.own
    every = vars(nn.Module())
    bare: nn.Module = object.__new__(own.author)
    bare.__dict__.update(
        {n: v for n, v in vars(fast).items() if n not in NOT_THE_AUTHORS or n in every}
    )
    for name in HOOKS:  # they run around any forward
        bare.__dict__[name] = every[name]
    bare.__dict__["_modules"] = {n: m for n, m in children_of(fast).items() if n != OWN_CHILD}
    bare.__dict__["_buffers"] = {
        n: b for n, b in buffers_of(fast).items() if not n.startswith(CONSTANT_BUFFER)
    }
    known: dict[int, Any] = {id(t): t for t in [*bare.parameters(), *bare.buffers()]}
    copied = copy.deepcopy(bare, {**known, id(own): None})
    for module in copied.modules():
        hooks = hooks_before(module)
        for key in [key for key, hook in hooks.items() if isinstance(hook, StayAway)]:
            del hooks[key]
    if own.run is not own.author.forward:
        copied.__dict__["forward"] = types.MethodType(own.run, copied)
    return copied


def watch(fast: SkipViTModule, traced: Iterable[str], attention: Iterable[str]) -> None:
    """Keep the graph and the modules that it was traced through in step.

    Args:
        fast: complete.
        traced: paths of these modules.
        attention: the paths of those that hold the attention of a layer.
    """
    attention = frozenset(attention)
    for path in sorted(attention):
        hooks = hooks_before(fast.get_submodule(path))
        if not any(isinstance(hook, StayAway) for hook in hooks.values()):
            fast.get_submodule(path).register_forward_pre_hook(StayAway(fast.own, path))
    called = {
        str(node.target)
        for call in fast.own.calls
        for node in call.graph.find_nodes(op="call_module")
        if not str(node.target).startswith(f"{OWN_CHILD}.")
    }
    fast.own.traced = Traced(fast, traced, attention, called)
