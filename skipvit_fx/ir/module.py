"""The graph module that owns a whole model: its state is the model's, also what the graph never touches."""

from __future__ import annotations

import copy
from typing import Any, NoReturn

from torch import fx, nn

OWN_CHILD = "skipvit"
"""Name of the one child that the compiler adds; everything inserted lives below it and holds no state."""

_GRAPH_STATE = frozenset(vars(fx.GraphModule(nn.Module(), fx.Graph()))) - frozenset(
    vars(nn.Module())
)


class SkipViTModule(fx.GraphModule):
    """A ``torch.fx.GraphModule`` with every submodule, parameter, buffer and plain attribute of the model.

    ``state_dict`` keys and their order are the model's. ``copy.deepcopy`` keeps them; pickling is refused.
    """

    def adopt(self, owner: dict[str, Any]) -> None:
        """Take over a module's ``__dict__``, all but what belongs to a graph."""
        for name, value in owner.items():
            if name not in _GRAPH_STATE:
                self.__dict__[name] = value

    def __deepcopy__(self, memo: dict[int, Any]) -> SkipViTModule:
        copied = super().__deepcopy__(memo)
        assert isinstance(copied, SkipViTModule)
        copied.adopt(copy.deepcopy(self.__dict__, memo))
        return copied

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a rewritten model is not pickled: use skipvit_fx.save(fast, path) and skipvit_fx.load(path, model), "
            "or torch.save(fast.state_dict(), path)"
        )


def own(model: nn.Module, graph: fx.Graph) -> SkipViTModule:
    """``model``'s state under ``graph``. ``model`` must be a structural clone that nobody else uses."""
    module = SkipViTModule(nn.Module(), fx.Graph(), class_name=f"SkipViT{type(model).__name__}")
    module.adopt(vars(model))
    if OWN_CHILD not in module._modules:
        module.add_module(OWN_CHILD, nn.Module())
    module.graph = graph
    return module
