"""Checks that a written file computes what the module computes."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from skipvit_fx.capture.cloning import clone_structure
from skipvit_fx.differences import TOLERANCE
from skipvit_fx.errors import ExportError, first_line
from skipvit_fx.export.inputs import Arguments
from skipvit_fx.graph.record import find_record
from skipvit_fx.reports.tokens import trace_tokens
from skipvit_fx.torch_internals import pytree, tensor_leaves

TIE = 1e-6
"""Scores closer than this, relative to the best, may swap by rounding."""


def verified(file: Path, model: nn.Module, inputs: Arguments) -> float:
    """The difference between a file and the model in eval mode, on random inputs of the given shapes.

    Raises:
        ExportError: it is larger than :data:`skipvit_fx.differences.TOLERANCE`.
    """
    generator = torch.Generator().manual_seed(0)

    def random(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        return torch.randn(leaf.shape, generator=generator, device="cpu").to(leaf)

    inputs = pytree.tree_map(random, inputs)
    reference = clone_structure(model).eval()
    difference = difference_to(file, reference, inputs)
    if difference > TOLERANCE:
        _check_ties(reference, inputs)
        raise ExportError(
            f"the file does not compute what the module does: off by {difference:.2g}",
            hint="please report this with the model and the plan; no file was written",
        )
    return difference


def _check_ties(model: nn.Module, inputs: Arguments) -> None:
    """Tell a wrong file from one that keeps other patches because scores are equal except for rounding.

    Raises:
        ExportError: they are.
    """
    if find_record(model) is None:
        return
    args, kwargs = inputs
    for stage in trace_tokens(model, *args, **kwargs):
        if stage.dropped.shape[1] == 0 or (
            stage.fused_kept is not None and stage.fused_kept.numel()
        ):
            continue  # nothing was chosen, or there is a fused token, whose score is not known here
        scores = stage.scores.sort(1, descending=True).values
        chosen = stage.kept if stage.owner is None else stage.dropped  # the most similar are merged
        edge = chosen.shape[1]
        gap = scores[:, edge - 1] - scores[:, edge]
        if bool((gap < TIE * scores.abs().amax(1)).any()):
            raise ExportError(
                f"the file and the module choose different patches at layer {stage.layer}: the scores at the edge "
                "differ by no more than rounding",
                hint="fresh weights often make patches equally important; load trained ones, or leave verify out",
            )


def difference_to(path: str | PathLike[str], module: nn.Module, inputs: Arguments, /) -> float:
    """The largest difference of the file's outputs in onnxruntime from the module's, relative to the largest output.

    Outputs after those of the module, such as kept positions, are not compared.

    Raises:
        ExportError: onnxruntime cannot load or run the file.
    """
    import onnxruntime

    args, kwargs = inputs
    with torch.no_grad():
        wanted = tensor_leaves(module(*args, **kwargs))
    tensors = tensor_leaves(inputs)
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_inputs()]
        got = session.run(None, dict(zip(names, (t.cpu().numpy() for t in tensors), strict=True)))
    except (RuntimeError, ValueError, onnxruntime.capi.onnxruntime_pybind11_state.Fail) as error:
        raise ExportError(
            f"onnxruntime does not run the file: {first_line(error)}",
            hint="choose another opset within the target's range",
        ) from error
    differences = []
    for ours, theirs in zip(got, wanted, strict=False):
        reference = theirs.cpu().double()
        scale = max(1.0, float(reference.abs().max()))
        differences.append(float((torch.from_numpy(ours).double() - reference).abs().max()) / scale)
    return max(differences)
