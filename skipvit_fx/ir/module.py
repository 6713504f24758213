"""The graph module that owns a whole model: its state is the model's, also what the graph never touches."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, NoReturn

from torch import Tensor, fx, nn

from skipvit_fx.errors import TraceError
from skipvit_fx.ir import recompute
from skipvit_fx.ir.inputs import Inputs
from skipvit_fx.ops.switch import Switchable

OWN_CHILD = "skipvit"
"""Name of the one child that the compiler adds; everything inserted lives below it and holds no state."""

_AUTHOR = "_author"
"""Where a module keeps itself as its author's class sees it: an object of that class, with the same ``__dict__``."""

_GRAPH_STATE = frozenset(vars(fx.GraphModule(nn.Module(), fx.Graph()))) - frozenset(
    vars(nn.Module())
)
_NOT_ADOPTED = _GRAPH_STATE | {_AUTHOR, "forward"}


class Own(Switchable):
    """The one child that the compiler adds: what it inserts, and what it remembers of the module as a whole.

    Here, and not on the module itself, where the author's attributes are and may have any name.

    Attributes:
        author: class of the model.
        run: its forward, or the method that the model itself has in its place; takes the model first.
        built_in, defaults: arguments that the graph has built in, by name, as the example call passed them, and where
            it passed none. A call may repeat them, and not change them.
        drops: whether the plan drops anything at all.
    """

    def __init__(
        self,
        author: type[nn.Module],
        run: Callable[..., Any],
        built_in: dict[str, Any],
        defaults: dict[str, Any],
    ) -> None:
        super().__init__()
        self.author = author
        self.run = run
        self.built_in = built_in
        self.defaults = defaults
        self.drops = True


class SkipViTModule(fx.GraphModule):
    """A ``torch.fx.GraphModule`` with every submodule, parameter, buffer and plain attribute of the model.

    ``state_dict`` keys and their order are the model's. ``copy.deepcopy`` keeps them; pickling is refused.

    Where nothing is skipped, the author's own forward runs on this state: the same bits, whatever inference kernels
    PyTorch takes in it that a graph cannot show.
    """

    _run_code: Callable[..., Any]

    @property
    def own(self) -> Own:
        """What the compiler keeps in the module."""
        child = self._modules[OWN_CHILD]
        assert isinstance(child, Own)
        return child

    def adopt(self, owner: dict[str, Any]) -> None:
        """Take over a module's ``__dict__`` with the compiler's child, all but a graph's state and a forward."""
        for name, value in owner.items():
            if name not in _NOT_ADOPTED:
                self.__dict__[name] = value
        view = object.__new__(self.own.author)
        object.__setattr__(view, "__dict__", self.__dict__)
        self.__dict__[_AUTHOR] = view

    def graph_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph, whatever the switches say.

        Raises:
            ValueError: an argument differs from what is built into the graph.
        """
        fixed = {**self.own.defaults, **self.own.built_in}
        for name in [name for name in kwargs if name in fixed]:
            given = kwargs.pop(name)
            if isinstance(given, Tensor) or given != fixed[name]:
                raise ValueError(
                    f"{name} was {fixed[name]!r} when the model was rewritten, and that is built in; rewrite it with "
                    f"example_inputs in which {name} is what it shall be"
                )
        return self._run_code(*args, **kwargs)

    def author_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the author's forward on this state, with the options that the example call passed."""
        view: nn.Module = self.__dict__[_AUTHOR]
        return self.own.run(view, *args, **{**self.own.built_in, **kwargs})

    @property
    def skipping(self) -> bool:
        """Whether the graph runs, rather than the author's forward."""
        return self.own.drops and self.own.active

    def recompile(self) -> Any:
        """Make the graph's code anew, behind the choice between it and the author's forward."""
        with self.graph.on_generate_code(lambda _: recompute.transformer(self.graph)):
            made = super().recompile()
        owner: Any = type(self)
        owner._run_code = run_code = owner.forward

        @functools.wraps(run_code)  # with its signature
        def forward(self: SkipViTModule, *args: Any, **kwargs: Any) -> Any:
            run = self.graph_forward if self.skipping else self.author_forward
            return run(*args, **kwargs)

        owner.forward = forward
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> SkipViTModule:
        view = self.__dict__.pop(_AUTHOR)
        try:
            copied = super().__deepcopy__(memo)
            assert isinstance(copied, SkipViTModule)
            copied.adopt(copy.deepcopy(self.__dict__, memo))
        finally:
            self.__dict__[_AUTHOR] = view
        return copied

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a rewritten model is not pickled: use skipvit_fx.save(fast, path) and skipvit_fx.load(path, model), "
            "or torch.save(fast.state_dict(), path)"
        )


def forward_of(model: nn.Module) -> Callable[..., Any]:
    """What ``model`` runs, a function that takes it first: of its class, or a method put on the object itself."""
    return getattr(model.forward, "__func__", type(model).forward)


_TAKEN = {OWN_CHILD, _AUTHOR, *dir(SkipViTModule(nn.Module(), fx.Graph()))} - set(dir(nn.Module()))


def refuse_taken_names(model: nn.Module) -> None:
    """Check that :func:`own` can take ``model`` over.

    Raises:
        TraceError: the model has an attribute that would hide one of the module's, or be hidden by it.
    """
    taken = _TAKEN - _GRAPH_STATE if isinstance(model, fx.GraphModule) else _TAKEN
    clash = taken & {*vars(model), *model._parameters, *model._buffers, *model._modules}
    if clash:
        raise TraceError(
            f"{type(model).__name__} has what a rewritten model needs for itself: {', '.join(sorted(clash))}",
            hint="rewrite a module that has the model as a child, and calls it in its forward",
        )


def own(model: nn.Module, graph: fx.Graph, inputs: Inputs) -> SkipViTModule:
    """``model``'s state under ``graph``. ``model`` must be a structural clone that nobody else uses."""
    module = SkipViTModule(nn.Module(), fx.Graph(), class_name=f"SkipViT{type(model).__name__}")
    child = Own(type(model), forward_of(model), inputs.built_in, inputs.defaults)
    model.add_module(OWN_CHILD, child.train(model.training))
    module.adopt(vars(model))
    module.graph = graph
    return module
