"""The kept patches as additional outputs of the file."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from skipvit_fx.errors import ExportError
from skipvit_fx.graph.record import find_record
from skipvit_fx.names import INSERTED
from skipvit_fx.ops.rows import rows_of, same_rows

_KEPT = f"{INSERTED}kept_positions"


def add_kept(module: nn.Module) -> None:
    """Add the kept positions of every stage to the outputs, in place: pass a copy.

    Raises:
        ExportError: the module does not come from :func:`skipvit_fx.rewrite`.
    """
    record = find_record(module)
    if record is None or not isinstance(module, fx.GraphModule):
        raise ExportError(
            "only a rewritten model keeps tokens",
            hint="leave expose_kept out for the original model",
        )
    graph = module.graph
    calls = {str(node.target): node for node in graph.nodes if node.op == "call_module"}
    selects = [calls[f"{stage.path}.select"] for stage in record.stages]
    kept = tuple(next(u for u in select.users if u.args[1] == 0) for select in selects)
    spans = [(stage.span, record.plan.spans[stage.span].fused) for stage in record.stages]
    module.add_submodule(_KEPT, KeptPositions(record.patches, spans))
    output = graph.output_node()
    with graph.inserting_before(output):
        positions = graph.call_module(_KEPT, kept)
    output.args = ((output.args[0], positions),)
    module.recompile()


class KeptPositions(nn.Module):
    """The kept patches of every stage, by their position in the full grid.

    Args:
        patches: the number of patches in the full grid; fused tokens are numbered from there.
        spans: by stage, the span of the plan that it is in, and whether a fused token comes after the kept patches.
    """

    def __init__(self, patches: int, spans: list[tuple[int, bool]]) -> None:
        super().__init__()
        self.patches = patches
        self.spans = spans

    def forward(self, *kept: Tensor | None) -> tuple[Tensor, ...]:
        """``[batch, k]`` per stage, from the choice of each among those before it; no entry if nothing is dropped."""
        found: list[Tensor] = []
        current, earlier = -1, 0
        for (span, fused), choice in zip(self.spans, kept, strict=True):
            if choice is None:
                continue
            current, earlier = span, earlier if span == current else 0
            before = found[-1] if earlier else None
            if before is not None and fused:
                name = self.patches + earlier - 1
                before = torch.cat([before, same_rows(name, name + 1, before)], 1)
            found.append(choice if before is None else rows_of(before, choice))
            earlier += 1
        return tuple(found)
