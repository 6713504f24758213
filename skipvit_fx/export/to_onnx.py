"""From a model to an ONNX file."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from skipvit_fx.arguments import check_model
from skipvit_fx.ascend.atc import CANN, SOC, AtcReport, atc_check, check_target
from skipvit_fx.capture.cloning import clone_structure
from skipvit_fx.capture.example import batch_size, has_samples
from skipvit_fx.errors import ExportError, GuardError, SkipViTError, first_line
from skipvit_fx.export.decompose import decompose, free_attention_matrices
from skipvit_fx.export.files import write_model
from skipvit_fx.export.inputs import inputs_of
from skipvit_fx.export.kept import add_kept
from skipvit_fx.export.names import add_inserted, name_batch, name_by_module, take_names
from skipvit_fx.export.profiles import LAYER_NORM_OPSET, Profile, Target, profile_of
from skipvit_fx.export.verify import verified
from skipvit_fx.files import check_folder
from skipvit_fx.graph.module import SkipViTModule
from skipvit_fx.graph.record import RewriteRecord, find_record
from skipvit_fx.ops.score import ScoreAtRandom
from skipvit_fx.ops.switch import Switchable
from skipvit_fx.reports.environment import version_of
from skipvit_fx.torch_internals import pytree

if TYPE_CHECKING:
    import onnx_ir as ir

EXPORTER_OPSET = 18
"""The opset that torch's exporter writes before it is lowered."""


@dataclass(frozen=True)
class ExportedFile:
    """What was written.

    Attributes:
        path: the ONNX file.
        files: all files: ``path``, and the weights beside it if they are too large for one file.
        target, opset: as written.
        batch: the fixed batch size; ``None`` if it is dynamic.
        inputs, outputs: their names, in order.
        check: for Ascend, what is known about ATC and this file; ATC was not run.
        difference: the largest difference of onnxruntime from the PyTorch module, relative to the largest output;
            ``None`` unless verified.
    """

    path: Path
    files: tuple[Path, ...]
    target: str
    opset: int
    batch: int | None
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    check: AtcReport | None
    difference: float | None


def export_onnx(
    model: nn.Module,
    path: str | PathLike[str],
    *,
    target: Target | None = None,
    example_inputs: Any = None,
    opset: int | None = None,
    batch: int | Literal["dynamic"] | None = None,
    cann: str = CANN,
    soc: str = SOC,
    expose_kept: bool = False,
    verify: bool = False,
) -> ExportedFile:
    """Write a model, rewritten or not, as ONNX, in eval mode. The model itself and its mode are not changed.

    Args:
        model: a rewritten model with skipping on, or any other model, to compare with.
        path: the file; it is replaced as a whole if it exists.
        target: ``"ascend"`` writes the form that ATC is documented to read (opset 13, fixed batch, LayerNorm and GELU
            spelled out, int32 indices); ``None`` is ``"onnxruntime"``.
        example_inputs: a tensor, a tuple or a dict, as for :func:`skipvit_fx.rewrite`, with the same default.
        opset: 11 to 16 for Ascend, 11 to 18 for onnxruntime.
        batch: a fixed batch size, or ``"dynamic"`` (onnxruntime only). Default: for Ascend that of the example, or 1 if
            there is none; for onnxruntime dynamic.
        cann, soc: for Ascend, the release and chip for :func:`atc_check`. A file that would fail there is not written;
            what would be slow or is unknown is in the result.
        expose_kept: add one output per stage that drops, ``kept_1``, ``kept_2``..., int32: the kept patches' positions
            in the full grid. Fused tokens are numbered after the grid.
        verify: run the written file in onnxruntime and compare it with the module.

    Raises:
        ExportError: skipping is off, an argument is outside the profile, an operator has no ONNX form, the file could
            not be written, or it does not compute the same. No partial file is left behind.
        TypeError: ``model`` is not a module, or it cannot be called with ``example_inputs``.
    """
    check_model(model)
    profile = profile_of(target)
    opset = profile.check_opset(opset)
    check_target(cann, soc)
    destination = Path(path)
    check_folder(destination, ExportError)
    _require("onnx", "onnx_ir", "onnxscript", *(("onnxruntime",) if verify else ()))
    _check_model(model)
    (args, kwargs), fixed = inputs_of(model, example_inputs, batch, profile)
    program, inserted = _exported(model, args, kwargs, expose_kept, dynamic=fixed is None)
    graph = _to_ir(program, opset, profile, inserted)
    _name_outputs(graph, program, expose_kept, bool(inserted))
    graph.metadata_props.update(_about(model, profile))
    differences: list[float] = []
    reports: list[AtcReport] = []

    def check(file: Path) -> None:
        _check_file(file)
        if profile.name == "ascend":
            reports.append(_accepted(atc_check(file, cann=cann, soc=soc), destination))
        if verify:
            differences.append(verified(file, model, (args, kwargs)))

    files = write_model(graph, destination, check)
    return ExportedFile(
        destination,
        files,
        profile.name,
        opset,
        fixed,
        tuple(str(value.name) for value in graph.graph.inputs),
        tuple(str(value.name) for value in graph.graph.outputs),
        reports[0] if reports else None,
        differences[0] if verify else None,
    )


def _exported(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    expose_kept: bool,
    *,
    dynamic: bool,
) -> tuple[ExportedProgram, list[str]]:
    """The program of a copy of the model in eval mode, after a trial run on the example.

    Its last outputs are only there to be named; these names are returned as well.
    """
    clone = clone_structure(model).eval()
    if expose_kept:
        add_kept(clone)
    _try(clone, args, kwargs)
    with torch.no_grad():
        inserted = add_inserted(clone, args, kwargs)
    if dynamic:
        _try_alone(clone, args, kwargs)
    return _program(clone, args, kwargs, dynamic=dynamic), inserted


def _accepted(report: AtcReport, destination: Path) -> AtcReport:
    """The report, with the file's final name.

    Raises:
        ExportError: the file would fail.
    """
    if failures := report.of("fail"):
        first = failures[0]
        raise ExportError(
            f"ATC would not accept the file: {first.rule.id}: {first.rule.title}: {first.places[0]}",
            hint=first.rule.advice,
        )
    return report.moved(destination)


def _try(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Run once, to tell an input that does not fit from a model that cannot be translated."""
    try:
        with torch.no_grad():
            module(*args, **kwargs)
    except (RuntimeError, TypeError, ValueError, AssertionError, SkipViTError) as error:
        raise ExportError(
            f"the model does not run on the example inputs: {first_line(error)}",
            hint="pass example_inputs of a shape that the model takes",
        ) from error


def _try_alone(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Run one sample through the graph for several, as ``torch.export`` assumes that both are computed alike."""
    if not isinstance(module, SkipViTModule):
        return
    size = batch_size(args, kwargs)
    form = module.prepare(*args, **kwargs)

    def first(leaf: Any) -> Any:
        return leaf[:1] if has_samples(leaf, size) else leaf

    args, kwargs = pytree.tree_map(first, (args, kwargs))
    try:
        with torch.no_grad():
            form.call.run(module, *form.values(args, kwargs))
    except GuardError as error:
        raise ExportError(
            f"a file of dynamic batch size would also take one sample, which this graph does not: {first_line(error)}",
            hint="give a fixed batch size, batch=2",
        ) from error


def _require(*names: str) -> None:
    from importlib.util import find_spec

    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise ExportError(
            f"writing ONNX needs {', '.join(missing)}", hint="pip install 'skipvit_fx[onnx]'"
        )


def _check_model(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, Switchable) and (module.train_only or not module.enabled):
            raise ExportError(
                "skipping is switched off, so this file would hold the original model",
                hint="export the original model itself, or call set_skipping(fast, True) first "
                "and rewrite without train_only",
            )
        if isinstance(module, ScoreAtRandom):
            raise ExportError(
                "a random score cannot be exported: every run of the file would drop different tokens",
                hint="rewrite with score='auto'",
            )


# -- the graph -----------------------------------------------------------------------------------------------------


def _to_ir(program: ExportedProgram, opset: int, profile: Profile, inserted: list[str]) -> ir.Model:
    from skipvit_fx.export.lower import finish, lower_opset, tidy

    spelled_out = profile.spelled_out_norms or opset < LAYER_NORM_OPSET
    free_attention_matrices(program)
    try:
        program = decompose(program, norms=spelled_out)
        written = torch.onnx.export(
            program, dynamo=True, verbose=False, opset_version=EXPORTER_OPSET, optimize=False
        )
    except (RuntimeError, TypeError, ValueError) as error:
        raise ExportError(
            f"torch.onnx could not translate the model: {first_line(error.__cause__ or error)}",
            hint="the operator that it names has no ONNX form; replace it in the model",
        ) from error
    assert written is not None
    model = written.model
    take_names(model, inserted)
    tidy(model)
    if opset != EXPORTER_OPSET:
        lower_opset(model, opset)
    name_by_module(model, inserted)
    name_batch(model)
    finish(model, profile.ir_version)
    return model


def _about(model: nn.Module, profile: Profile) -> dict[str, str]:
    """What the file says about itself, in its ``metadata_props``."""
    record = find_record(model)
    rewritten = {} if record is None else {"plan": str(record.plan), **_options(record)}
    return {
        "model": type(model).__name__ if record is None else record.model,
        **rewritten,
        "target": profile.name,
        "skipvit_fx_version": version_of("skipvit_fx"),
        "torch_version": torch.__version__,
    }


def _options(record: RewriteRecord) -> dict[str, str]:
    options = record.options
    return {"cut": options.cut, "score": options.score_name, "validated": record.validated}


def _name_outputs(model: ir.Model, program: ExportedProgram, expose_kept: bool, more: bool) -> None:
    """Name outputs: ``output`` for a single one, the keys of a dict or dataclass, and ``kept_1``..."""
    spec = program.call_spec.out_spec
    assert spec is not None
    structure = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    if more:
        structure, _ = structure
    kept: tuple[int, ...] = ()
    if expose_kept:
        structure, kept = structure
    paths = pytree.tree_flatten_with_path(structure)[0]
    names = [
        re.sub(r"\W+", "_", pytree.keystr(path)).strip("_") if path else "output"
        for path, _ in paths
    ]
    names = [f"output_{name}" if name.isdigit() else name or "output" for name in names]
    names += [f"kept_{index + 1}" for index in range(len(kept))]
    taken = {value.name for node in model.graph for value in node.outputs}
    taken |= {value.name for value in model.graph.inputs} | set(model.graph.initializers)
    for value, name in zip(model.graph.outputs, names, strict=True):
        value.name = name if name not in taken else f"{name}_out"


def _check_file(path: Path) -> None:
    import onnx

    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(
            f"the model has no valid form in this opset: {first_line(error)}",
            hint="choose a higher opset within the target's range",
        ) from error


def _program(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, dynamic: bool
) -> ExportedProgram:
    shapes: Any = None
    if dynamic:
        size = batch_size(args, kwargs)

        def axes(leaf: Any) -> Any:
            has = isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == size
            return {0: Dim("batch", min=1)} if has else None

        shapes = pytree.tree_map(axes, kwargs if kwargs else args)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.")
            return torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)
    except (RuntimeError, TypeError, ValueError) as error:
        hint = "call the model with these example inputs first: does it run?"
        if dynamic:
            hint = "give a fixed batch size, batch=1: the model may depend on the batch size"
        raise ExportError(
            f"torch.export could not capture the model: {first_line(error)}", hint=hint
        ) from error
