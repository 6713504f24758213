"""Features that are read between a drop and its return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from skipvit_fx.analysis.tokens import carries_tokens
from skipvit_fx.errors import UnsupportedModelError
from skipvit_fx.ir.places import module_path
from skipvit_fx.ops.skip import Merge
from skipvit_fx.pipeline.rewriting import Rewriting


@dataclass(frozen=True)
class FillTaps:
    """A reader that is not on the way to the return sees all tokens: the dropped ones as they were when they left.

    Before (``y`` has fewer tokens)::

        feature = y.transpose(1, 2).reshape(b, c, h, w)      # returned by the model
        y = y + mlp(norm(y))

    After::

        full = stage_1.tap_1(y, around, kept, dropped)
        feature = full.transpose(1, 2).reshape(b, c, h, w)
        y = y + mlp(norm(y))
    """

    name: ClassVar[str] = "fill-taps"
    requires: ClassVar[frozenset[str]] = frozenset({"skips"})
    provides: ClassVar[frozenset[str]] = frozenset()
    invalidates: ClassVar[frozenset[str]] = frozenset()

    def run(self, rewriting: Rewriting) -> None:
        """Insert one merge for every drop that a tapped node is under."""
        editor, stream = rewriting.editor, rewriting.stream
        place = (stream.dim, stream.tokens.lead, stream.tokens.tail)
        for count, (node, readers) in enumerate(rewriting.taps.items(), start=1):
            current = node
            for stage in reversed(rewriting.active(node)):
                current = editor.insert_module(
                    f"{stage.name}.tap_{count}",
                    Merge(*place, fused=rewriting.plan.fused),
                    (current, stage.around, stage.kept, stage.dropped),
                    after=current,
                )
            if current is not node:
                for reader in readers:
                    editor.rewire(reader, node, current)


def refuse_taps(rewriting: Rewriting) -> None:
    """Refuse taps that nobody asked to fill, and those that have no state to be filled with.

    Raises:
        UnsupportedModelError: the tapped node and its reader are named.
    """
    for node, (reader, *_) in rewriting.taps.items():
        if not rewriting.fill_taps:
            reason = "is read there, off the way to its return"
            hint = (
                "choose a plan that returns before this place or drops after it; or pass fill_taps=True, which hands "
                "out the dropped tokens as they were when they left"
            )
        elif not _is_state(rewriting, node):
            reason = "is read there, and is not the residual stream, so dropped tokens have no value in it"
            hint = "choose a plan that returns before this place or drops after it"
        else:
            continue
        _refuse(rewriting, node, f"{reason}, by {reader.name}", hint)
    for reader in rewriting.editor.graph.nodes if rewriting.fill_taps else ():
        if reader.op == "output" or rewriting.active(reader):
            continue
        for node in reader.all_input_nodes:
            shorter = rewriting.active(node) and carries_tokens(rewriting.analysis[node])
            tapped = reader in rewriting.taps.get(node, ())
            if shorter and not tapped and node is not rewriting.return_node:
                reason = f"is read together with a filled tap, by {reader.name}"
                _refuse(rewriting, node, reason, "choose a plan that returns before this place")


def _refuse(rewriting: Rewriting, node: fx.Node, reason: str, hint: str) -> None:
    layer = next(s.layer.index for s in rewriting.stages if node in s.span or node is s.cut)
    raise UnsupportedModelError(
        f"{node.name} is under the drop at layer {layer}, and {reason}",
        node=node.name,
        module_path=module_path(node),
        hint=hint,
    )


def _is_state(rewriting: Rewriting, node: fx.Node) -> bool:
    layers = rewriting.stream.layers
    return any(node in (layer.input, layer.cut, layer.end) for layer in layers)
