"""The graph module that owns a whole model: its state is the model's, also what the graph never touches."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NoReturn

from torch import Tensor, fx, nn

from skipvit_fx.ir.inputs import Inputs

OWN_CHILD = "skipvit"
"""Name of the one child that the compiler adds; everything inserted lives below it and holds no state."""

_AUTHOR = "_author"
"""Where a module keeps itself as its author's class sees it: an object of that class, with the same ``__dict__``."""

_GRAPH_STATE = frozenset(vars(fx.GraphModule(nn.Module(), fx.Graph()))) - frozenset(
    vars(nn.Module())
)


class SkipViTModule(fx.GraphModule):
    """A ``torch.fx.GraphModule`` with every submodule, parameter, buffer and plain attribute of the model.

    ``state_dict`` keys and their order are the model's. ``copy.deepcopy`` keeps them; pickling is refused.

    Where nothing is skipped, the author's own forward runs on this state: the same bits, whatever inference kernels
    PyTorch takes in it that a graph cannot show.

    Attributes:
        author: class of the model.
        built_in, defaults: arguments that the graph has built in, by name, as the example call passed them, and where
            it passed none. A call may repeat them, and not change them.
        drops: whether the plan drops anything at all.
        enabled, train_only: the switches of :class:`skipvit_fx.ops.switch.Switchable`, for the module as a whole.
    """

    author: type[nn.Module] = nn.Module
    built_in: Mapping[str, Any] = MappingProxyType({})
    defaults: Mapping[str, Any] = MappingProxyType({})
    _run_code: Callable[..., Any]
    drops: bool = True
    enabled: bool = True
    train_only: bool = False

    def adopt(self, owner: dict[str, Any]) -> None:
        """Take over a module's ``__dict__``, all but what belongs to a graph."""
        for name, value in owner.items():
            if name not in _GRAPH_STATE and name != _AUTHOR:
                self.__dict__[name] = value
        view = object.__new__(self.author)
        object.__setattr__(view, "__dict__", self.__dict__)
        self.__dict__[_AUTHOR] = view

    def graph_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph, whatever the switches say.

        Raises:
            ValueError: an argument differs from what is built into the graph.
        """
        for name in [name for name in kwargs if name in self.built_in or name in self.defaults]:
            fixed = self.built_in[name] if name in self.built_in else self.defaults[name]
            given = kwargs.pop(name)
            if isinstance(given, Tensor) or given != fixed:
                raise ValueError(
                    f"{name} was {fixed!r} when the model was rewritten, and that is built in; rewrite it with "
                    f"example_inputs in which {name} is what it shall be"
                )
        return self._run_code(*args, **kwargs)

    def author_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the author's forward on this state, with the options that the example call passed."""
        view: nn.Module = self.__dict__[_AUTHOR]
        return view.forward(*args, **{**self.built_in, **kwargs})

    @property
    def skipping(self) -> bool:
        """Whether the graph runs, rather than the author's forward."""
        return self.drops and self.enabled and (self.training or not self.train_only)

    def recompile(self) -> Any:
        """Make the graph's code anew, behind the choice between it and the author's forward."""
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


def own(model: nn.Module, graph: fx.Graph, inputs: Inputs) -> SkipViTModule:
    """``model``'s state under ``graph``. ``model`` must be a structural clone that nobody else uses."""
    module = SkipViTModule(nn.Module(), fx.Graph(), class_name=f"SkipViT{type(model).__name__}")
    module.__dict__.update(author=type(model), built_in=inputs.built_in, defaults=inputs.defaults)
    module.adopt(vars(model))
    if OWN_CHILD not in module._modules:
        module.add_module(OWN_CHILD, nn.Module())
    module.graph = graph
    return module
