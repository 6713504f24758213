"""Where in the model a node comes from."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator

from torch import fx

from skipvit_fx.errors import TraceError, UnsupportedModelError
from skipvit_fx.names import INSERTED


def module_path(node: fx.Node) -> str:
    """Path of the module whose forward made the node; for a call of an author's module, that of the module itself."""
    stack = node.meta.get("nn_module_stack")
    if node.op == "call_module" and not (stack and str(node.target).startswith(INSERTED)):
        return str(node.target)
    return next(reversed(stack.values()))[0] if stack else ""


def module_calls(node: fx.Node) -> tuple[str, ...]:
    """The module calls in which the node was made, outermost first, without that of the model itself.

    A module's first call is named by its path, later ones also by a number: ``blocks.0@1`` is the second of
    ``blocks.0``.
    """
    stack = node.meta.get("nn_module_stack", {})
    return tuple(call for call, (path, _) in stack.items() if path)


def called_module(call: str) -> str:
    """The path of the module of a call that :func:`module_calls` returned."""
    return call.partition("@")[0]


def module_after(node: fx.Node, way: Collection[fx.Node]) -> str:
    """Path of the next module that reads ``node``, directly or not; only the nodes in ``way`` are followed."""
    here = module_calls(node)
    reader = node
    while readers := [user for user in reader.users if user in way]:
        reader = min(readers)
        if begun := [call for call in module_calls(reader) if call not in here]:
            return called_module(begun[0])
    return "the output"


def module_before(
    node: fx.Node, way: Collection[fx.Node], since: fx.Node, sources: Iterable[fx.Node]
) -> str:
    """The module that ends where ``node`` is made: the one that holds the ``sources``, or else the last one before it.

    Modules that had begun before ``since`` do not count.
    """
    here = module_calls(node)
    readers = [user for user in node.users if user in way]
    beyond = {*module_calls(since), *(module_calls(min(readers)) if readers else ())}
    if ended := [call for call in here if call not in beyond]:
        return called_module(ended[0])
    for source in sources:
        held = [call for call in module_calls(source) if call not in here]
        return (
            called_module(held[0])
            if held
            else f"the attention in {module_path(node) or 'the model'}"
        )
    source = node
    while given := [argument for argument in source.all_input_nodes if argument in way]:
        source = max(given)
        if held := [call for call in module_calls(source) if call not in here]:
            return called_module(held[0])
    return "the input"


_TOWERS = 3
"""The most modules with attention side by side that count as towers; more are stages of one network."""


@contextlib.contextmanager
def naming_parts(opened: Iterable[str]) -> Iterator[None]:
    """Let a refusal say which part of the model could be rewritten instead.

    Args:
        opened: paths of the modules around attention.
    """
    try:
        yield
    except (TraceError, UnsupportedModelError) as error:
        if isinstance(error, UnsupportedModelError) and (not error.node or error.in_every_part):
            raise  # it is not about a place, or not about this one alone
        if parts := _encoders(opened, getattr(error, "module_path", "")):
            which = f"one of {', '.join(parts)}" if len(parts) > 1 else parts[0]
            error.hint += (
                f"; or rewrite {which} alone and put it back: model.{parts[-1]} = "
                f"skipvit_fx.rewrite(model.{parts[-1]}, ...)"
            )
        raise


def _encoders(opened: Iterable[str], place: str) -> list[str]:
    """Paths of the parts that could be rewritten on their own, where the model as a whole cannot.

    Args:
        opened: paths of the modules around attention.
        place: path of the module in the way. The parts do not contain it.
    """
    paths = {path for path in opened if path}
    sites = {p for p in paths if not any(q.startswith(f"{p}.") for q in paths)}
    top = {p for p in paths if not any(p.startswith(f"{q}.") for q in paths)}
    found: list[str] = []
    for path in sorted(top):
        below = {p for p in paths if p.startswith(f"{path}.")}
        if len(below & sites) < 2:
            continue
        if place == path or place.startswith(f"{path}."):
            found += _encoders(below, place)
        else:
            found.append(path)
    return found if len(found) <= _TOWERS else []
