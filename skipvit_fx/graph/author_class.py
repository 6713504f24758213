"""The class of a rewritten model, derived from the author's class and from the graph module's."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any, cast

from torch import fx, nn

from skipvit_fx.author.questions import Recorded
from skipvit_fx.errors import TraceError
from skipvit_fx.graph.calls import Call, form_of, kinds_of, signature_of, without_data
from skipvit_fx.graph.inputs import Inputs, places_of
from skipvit_fx.graph.module import SkipViTModule
from skipvit_fx.graph.own import Own
from skipvit_fx.graph.traced_through import AUTHOR, NOT_THE_AUTHORS, names_in
from skipvit_fx.names import OWN_CHILD
from skipvit_fx.torch_internals import buffers_of, children_of, parameters_of, pytree


@functools.cache
def _class_of(author: Any, children: frozenset[str]) -> type[SkipViTModule]:
    """A class of both kinds, for a model whose children have these names."""

    @functools.wraps(author.forward)
    def call(self: SkipViTModule, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def body(names: dict[str, Any]) -> None:
        names |= {name: _method(name, method) for name, method in _methods_of(author, children)}
        names |= {"forward": call, "call": call, "__module__": author.__module__}
        names["__doc__"] = f"A rewritten :class:`{author.__name__}`."
        if issubclass(author, fx.GraphModule):  # its own __call__ would call ours again
            names["__call__"] = nn.Module.__call__

    # the author's class name: tools write it into files
    bases = (SkipViTModule, author)
    try:
        made: type[SkipViTModule] = types.new_class(author.__name__, bases, {}, body)
    except TypeError as error:
        raise TraceError(
            f"no class can derive from {author.__name__}: {error}",
            hint="rewrite a module that has the model as a child and calls it in its forward",
        ) from error
    return made


def _methods_of(
    author: type[nn.Module], children: frozenset[str]
) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The author's public methods that may call a child or the forward.

    This is told by the names in their code. Other methods are left alone, since libraries ask whether they are
    overridden.
    """
    methods = {name: inspect.getattr_static(author, name) for name in dir(author)}
    named = {name: names_in(method) for name, method in methods.items()}
    calling = {"forward", *children}
    while more := {name for name, names in named.items() if names & calling} - calling:
        calling |= more
    taken = {*dir(fx.GraphModule), *dir(SkipViTModule)}
    for name, method in methods.items():
        if isinstance(method, types.FunctionType) and name in calling - taken and name[0] != "_":
            yield name, method


def _method(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: SkipViTModule, *args: Any, **kwargs: Any) -> Any:
        return self._call_method(name, args, kwargs)

    return method


def forward_of(model: nn.Module) -> Callable[..., Any]:
    """The function that ``model`` runs, which takes it first: its class's, or that of a method set on the instance."""
    return getattr(model.forward, "__func__", type(model).forward)


_TAKEN = {OWN_CHILD, AUTHOR, *vars(SkipViTModule)} - set(dir(nn.Module()))
_OF_GRAPHS = {*NOT_THE_AUTHORS, *vars(fx.GraphModule)} - set(dir(nn.Module())) - {AUTHOR}


def refuse_taken_names(model: nn.Module) -> None:
    """Check that :func:`own` can take ``model`` over.

    Raises:
        TraceError: an attribute of the model would hide one of the rewritten module, or be hidden by it.
    """
    of_graphs = _OF_GRAPHS | {"recompile"}
    taken = _TAKEN - of_graphs if isinstance(model, fx.GraphModule) else _TAKEN | of_graphs
    clash = taken & {
        *dir(type(model)),
        *vars(model),
        *parameters_of(model),
        *buffers_of(model),
        *children_of(model),
    }
    if clash:
        raise TraceError(
            f"{type(model).__name__} has names that a rewritten model needs for itself: {', '.join(sorted(clash))}",
            hint="rewrite a module that has the model as a child and calls it in its forward",
        )


def own(model: nn.Module, graph: fx.Graph, inputs: Inputs, recorded: Recorded) -> SkipViTModule:
    """``model``'s state under ``graph``. ``model`` must be a structural clone that nothing else uses."""
    skeleton = fx.GraphModule(nn.Module(), fx.Graph())
    module: SkipViTModule = object.__new__(
        _class_of(cast(Any, type(model)), frozenset(children_of(model)))
    )
    object.__setattr__(module, "__dict__", dict(vars(skeleton)))
    child = Own(type(model), forward_of(model))
    model.add_module(OWN_CHILD, child.train(model.training))
    module.adopt(vars(model))
    args, kwargs = inputs.args, inputs.kwargs
    signature = signature_of(child.run)
    places = places_of(signature, args, kwargs)
    call = Call(
        "forward",
        kinds_of(signature, places, args, kwargs),
        tuple(inputs.taken()),
        graph,
        child.run,
        pytree.tree_map(without_data, (args, kwargs)),
        recorded,
    )
    child.calls.append(call)
    child.forms.append(form_of(call, places, args, kwargs))
    module.graph = graph
    return module
