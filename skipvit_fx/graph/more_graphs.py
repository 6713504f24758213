"""Further graphs of a rewritten model: for another kind of call, or because a module has changed."""

from __future__ import annotations

import copy
import types
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

from skipvit_fx.errors import GuardError, TraceError, UnsupportedModelError
from skipvit_fx.graph.calls import (
    Call,
    Form,
    differing_numbers,
    form_of,
    kinds_of,
    signature_of,
    with_data,
    with_live,
)
from skipvit_fx.graph.inputs import places_of
from skipvit_fx.graph.own import set_settings, settings_of
from skipvit_fx.graph.traced_through import NOT_THE_AUTHORS, StayAway, Traced
from skipvit_fx.names import CONSTANT_BUFFER, INSERTED, OWN_CHILD
from skipvit_fx.ops.following import in_jit_trace
from skipvit_fx.torch_internals import HOOKS, buffers_of, children_of, hooks_before

if TYPE_CHECKING:
    from skipvit_fx.graph.module import SkipViTModule

MOST_CALLS = 16
"""The largest number of graphs of one rewritten model."""


def another_form(
    fast: SkipViTModule,
    method: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    refused: list[Call],
) -> Form:
    """A form for a call that has none yet, for an existing graph or a new one."""
    own = fast.own
    signature = signature_of(own.method(method))
    places = places_of(signature, args, kwargs)
    kinds = kinds_of(signature, places, args, kwargs)
    alike = [
        c
        for c in own.calls
        if c.method == method and differing_numbers(kinds, c.kinds) == c.numbers
    ]
    fitting = (c for c in alike if c.recorded.is_so(training=fast.training))
    call = next((c for c in fitting if c not in refused), None)
    if call is None:
        call = capture_call(fast, method, args, kwargs, _numbers(fast, method, kinds))
    args, kwargs = with_live(call.numbers, places, args, kwargs)
    form = form_of(call, places, args, kwargs)
    own.forms.append(form)
    return form


def _numbers(fast: SkipViTModule, method: str, kinds: dict[str, Any]) -> set[str]:
    """The numbers that differ from another call like this one, so that not every value gets a graph of its own."""
    others = (c for c in fast.own.calls if c.method == method)
    found = (differing_numbers(kinds, other.kinds) for other in others)
    return next((names for names in found if names), set()) - fast.own.built_in


def capture_call(
    fast: SkipViTModule,
    method: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    numbers: Collection[str] = (),
) -> Call:
    """A new graph for this kind of call, which takes these number arguments as inputs if it can."""
    own = fast.own
    if numbers:
        places = places_of(signature_of(own.method(method)), args, kwargs)
        try:
            return capture_call(fast, method, *with_live(numbers, places, args, kwargs))
        except (TraceError, UnsupportedModelError):  # they are used as more than factors
            own.built_in |= set(numbers)
    if in_jit_trace():
        raise not_now("traced")
    if len(own.calls) >= MOST_CALLS:
        raise GuardError(
            f"the model was called in {MOST_CALLS} ways, each with its own graph, and this is another one",
            hint="pass the argument that changes from call to call as a tensor",
        )
    assert own.rewrite is not None
    author = author_of(fast)
    if method != "forward":
        author.__dict__["forward"] = types.MethodType(own.method(method), author)
    made = own.rewrite(author, args, kwargs)
    call = _take_over(fast, made)
    call.method = method
    return call


def _take_over(fast: SkipViTModule, made: SkipViTModule) -> Call:
    """Run the graph of another rewritten model, made from the same author's model, on the modules of this one."""
    own = fast.own
    (call,) = made.own.calls
    group = f"call_{len(own.calls) + 1}"
    inserted = nn.Module()
    for name, child in made.own.named_children():
        inserted.add_module(name, child)
    set_settings(inserted, settings_of(own))
    own.add_module(group, inserted.train(own.training))
    for node in made.graph.nodes:
        target = str(node.target)
        if node.op == "call_module" and target.startswith(INSERTED):
            node.target = f"{OWN_CHILD}.{group}{target.removeprefix(OWN_CHILD)}"
        elif node.op == "get_attr" and target.startswith(CONSTANT_BUFFER):
            node.target = f"{target}_{group}"
            if node.target not in buffers_of(fast):
                fast.register_buffer(node.target, getattr(made, target), persistent=False)
    made.recompile()
    call.record = call.record.within(group)
    own.calls.append(call)
    assert own.traced is not None
    assert made.own.traced is not None
    watch(fast, {*own.traced.modules, *made.own.traced.modules}, made.own.traced.attention)
    if own.replacements is not None and made.own.replacements is not None:
        own.replacements = own.replacements.with_more(made.own.replacements.uses)
    return call


def start_anew(
    fast: SkipViTModule, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Replace all graphs, because a module that they were traced through has changed."""
    own = fast.own
    if method != "forward":
        args, kwargs = with_data(own.calls[0].example, fast)
    assert own.rewrite is not None
    made = own.rewrite(author_of(fast), args, kwargs)
    settings = settings_of(own)
    for name in [name for name in buffers_of(fast) if name.startswith(CONSTANT_BUFFER)]:
        del buffers_of(fast)[name]
    for name, constant in made.named_buffers(recurse=False):
        if name.startswith(CONSTANT_BUFFER):
            fast.register_buffer(name, constant, persistent=False)
    kept = children_of(own)
    kept.clear()
    kept.update(children_of(made.own.train(own.training)))
    own.calls, own.forms = made.own.calls, made.own.forms
    set_settings(own, settings)
    fast.meta |= made.meta
    fast.graph = made.graph
    traced = made.own.traced
    assert traced is not None
    watch(fast, traced.modules, traced.attention)
    if made.own.replacements is not None:
        own.replacements = made.own.replacements.of_copy(fast)


def not_now(
    followed: str, why: str = "the model is called in a way that no graph was made for yet"
) -> GuardError:
    """The error of a call that needs a new graph while something else follows it."""
    return GuardError(
        f"{why}, and the model is being {followed}",
        hint=f"call the rewritten model once like this before it is {followed}",
    )


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
        if not str(node.target).startswith(INSERTED)
    }
    fast.own.traced = Traced(fast, traced, attention, called)
