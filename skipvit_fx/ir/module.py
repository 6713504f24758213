"""The graph module that owns a whole model: its state is the model's, also what the graph never touches."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NoReturn

from torch import Tensor, fx, nn

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
        fixed: arguments that the graph has built in, by name; a call may repeat them, and not change them.
        drops: whether the plan drops anything at all.
        enabled, train_only: the switches of :class:`skipvit_fx.ops.switch.Switchable`, for the module as a whole.
    """

    author: type[nn.Module] = nn.Module
    fixed: Mapping[str, Any] = MappingProxyType({})
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
        """Run the graph, whatever the switches say; what it returns is the model's own output."""
        raise NotImplementedError("made by recompile()")

    @property
    def skipping(self) -> bool:
        """Whether the graph runs, rather than the author's forward."""
        return self.drops and self.enabled and (self.training or not self.train_only)

    def recompile(self) -> Any:
        """Make the graph's code anew, behind the choice between it and the author's forward."""
        code = super().recompile()
        owner: Any = type(self)
        owner.graph_forward = owner.forward
        owner.forward = _forward
        return code

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


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    if self.skipping:
        for name in [name for name in kwargs if name in self.fixed]:
            given, fixed = kwargs.pop(name), self.fixed[name]
            if isinstance(given, Tensor) or given != fixed:
                raise ValueError(
                    f"{name} was {fixed!r} when the model was rewritten, and that is built in; rewrite it with "
                    f"example_inputs in which {name} is what it shall be"
                )
        return self.graph_forward(*args, **kwargs)
    return self.__dict__[_AUTHOR].forward(*args, **kwargs)


def own(model: nn.Module, graph: fx.Graph, fixed: dict[str, Any]) -> SkipViTModule:
    """``model``'s state under ``graph``. ``model`` must be a structural clone that nobody else uses."""
    module = SkipViTModule(nn.Module(), fx.Graph(), class_name=f"SkipViT{type(model).__name__}")
    module.__dict__.update(author=type(model), fixed=fixed)
    module.adopt(vars(model))
    if OWN_CHILD not in module._modules:
        module.add_module(OWN_CHILD, nn.Module())
    module.graph = graph
    return module
