"""Rewritten models on disk: safetensors, with the plan and a fingerprint in the header. Nothing is ever pickled."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from skipvit_fx.api import rewrite
from skipvit_fx.arguments import check_model
from skipvit_fx.capture.example import floating_like
from skipvit_fx.errors import SavedModelError
from skipvit_fx.files import appearing
from skipvit_fx.graph.fingerprint import (
    fingerprint,
    first_difference,
    module_lines,
    state_lines,
    tied_names,
)
from skipvit_fx.graph.module import SkipViTModule
from skipvit_fx.graph.record import RewriteRecord, record_of
from skipvit_fx.names import RECORD, SEARCH
from skipvit_fx.ops.switch import switches
from skipvit_fx.planner.result import SearchResult
from skipvit_fx.reports.environment import version_of
from skipvit_fx.scores import known_scores, name_of

_FORMAT = 3


@dataclass(frozen=True)
class _Header:
    """What the file holds besides the weights.

    Attributes:
        format: the format of this header.
        versions: versions of the packages that wrote the file, for information.
        model: class name of the model.
        options: the options of the rewrite; ``frontend`` is the one that was used.
        inputs: the example inputs: positional, and by name.
        graph, modules, state: the lines that the fingerprint is made of, so that a difference can be named.
        tied: for names of tied tensors, the name of the same tensor in the file.
    """

    format: int
    versions: dict[str, str]
    model: str
    options: dict[str, Any]
    inputs: list[Any]
    fingerprint: str
    graph: list[str]
    modules: list[str]
    state: list[str]
    tied: dict[str, str]


def save(
    fast: nn.Module, path: str | os.PathLike[str], *, search: SearchResult | None = None
) -> None:
    """Write a rewritten model: its weights, its plan, and a fingerprint of the model that it was made from.

    The file appears complete or not at all. The model's code is not in it: :func:`load` takes a freshly built model.
    Train or eval mode, the skipping switch and the progress of a schedule are not saved.

    Args:
        fast: from :func:`skipvit_fx.rewrite`.
        path: of the file.
        search: the search that found the plan. The file then says on which model, on how many images, and with what
            quality; ``inspect(load(...))`` shows it. What a loaded model's file said is kept.

    Raises:
        NotRewrittenError: ``fast`` does not come from :func:`skipvit_fx.rewrite`.
        SavedModelError: the rewrite holds something that a file cannot (a score function without a name), or the file
            cannot be written.
        SearchError: the search did not evaluate the plan.
    """
    record = record_of(fast)
    state = fast.state_dict()
    _check_savable(fast, record, state)
    assert isinstance(fast, SkipViTModule)
    found = fast.meta.get(SEARCH) if search is None else search.summary(record.plan)
    train_only = any(switch.train_only for switch in switches(fast))
    modules, lines = module_lines(fast), state_lines(state)
    tied = tied_names(state)
    header = _Header(
        format=_FORMAT,
        versions={name: version_of(name) for name in ("skipvit_fx", "torch")},
        model=record.model,
        options=replace(record.options, frontend=record.frontend, train_only=train_only).to_dict(),
        inputs=[_describe(record.args), _describe(record.kwargs)],
        fingerprint=fingerprint(record.computation, modules, lines),
        graph=list(record.computation),
        modules=list(modules),
        state=list(lines),
        tied=tied,
    )
    # safetensors refuses tensors that share memory; tensors that overlap without being tied are copied
    weights = {
        name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in state.items()
        if name not in tied
    }
    extra = {} if found is None else {SEARCH: json.dumps(found)}
    _write(Path(path), weights, {RECORD: json.dumps(asdict(header)), **extra})


def load(path: str | os.PathLike[str], model: nn.Module, *, validate: bool = True) -> SkipViTModule:
    """Rewrite a freshly built model as the saved one was, and load the saved weights.

    The result shares its parameters with ``model``, which thereby gets the weights as well. If anything does not fit,
    ``model`` is left unchanged.

    Args:
        path: a file that :func:`save` wrote.
        model: built like the original model, with the same dtype, on any device.
        validate: as for :func:`skipvit_fx.rewrite`.

    Raises:
        ValidationError: as :func:`skipvit_fx.rewrite` does.
        SavedModelError: the file cannot be read, or ``model`` is not what was saved; the error says what differs.
        TypeError: ``model`` is not a module, or ``path`` not a path.
    """
    check_model(model)
    path = Path(path)
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise SavedModelError(
            "the model to load into is on the meta device, which holds no weights",
            hint="build it on a real device, or call model.to_empty(device=...) first",
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            header = _read_header(path, metadata)
            names = file.keys()
            weights = {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise SavedModelError(
            f"cannot read {os.fspath(path)!r}: {error}",
            hint="give a file that skipvit_fx.save wrote",
        ) from error
    _check_parts(header, model)
    _check_score(header)
    args, kwargs = (_build(inputs, model) for inputs in header.inputs)
    fast = rewrite(
        model,
        example_inputs=kwargs or args,
        **{**header.options, "validate": validate},
    )
    _check_graph(header, fast)
    weights |= {name: weights[other] for name, other in header.tied.items()}
    fast.load_state_dict(weights)
    if SEARCH in metadata:
        fast.meta[SEARCH] = json.loads(metadata[SEARCH])
    return fast


def _check_savable(fast: nn.Module, record: RewriteRecord, state: Mapping[str, Any]) -> None:
    score = record.options.score
    if callable(score) and name_of(score) is None:
        raise SavedModelError(
            f"the score is a function ({record.options.score_name}), and code is not saved",
            hint="give it a name by skipvit_fx.register_score(name, function); or save fast.state_dict(), and rewrite "
            "with the function again before loading it",
        )
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
            kind = f"a {value.layout} tensor" if isinstance(value, Tensor) else "not a tensor"
            where = " on the meta device" if isinstance(value, Tensor) and value.is_meta else ""
            raise SavedModelError(
                f"{name!r} in the state_dict is {kind}{where}, which safetensors cannot hold",
                hint="turn it into an ordinary dense tensor before saving",
            )


def _write(path: Path, weights: dict[str, Tensor], header: dict[str, str]) -> None:
    """Write weights and header, so that no reader ever finds a partial file."""
    try:
        with appearing(path) as unfinished:
            # safetensors makes a file that only its owner may read
            mode = unfinished.stat().st_mode
            save_file(weights, unfinished, metadata=header)
            unfinished.chmod(mode)
            with unfinished.open("rb") as file:
                os.fsync(file.fileno())
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise SavedModelError(
            f"cannot write {os.fspath(path)!r}: {reason}",
            hint="give the name of a file in a directory that exists and may be written to",
        ) from error


def _read_header(path: Path, metadata: Mapping[str, str] | None) -> _Header:
    if not metadata or RECORD not in metadata:
        raise SavedModelError(
            f"{os.fspath(path)!r} holds weights but no plan: skipvit_fx.save did not write it",
            hint="load the weights into the model, and call skipvit_fx.rewrite(model, plan)",
        )
    try:
        fields = json.loads(metadata[RECORD])
        known = fields["format"] == _FORMAT
        header = _Header(**fields) if known else None
    except (ValueError, KeyError, TypeError) as error:
        raise SavedModelError(
            f"the header of {os.fspath(path)!r} is damaged: {error}",
            hint="save the model again",
        ) from error
    if header is None:
        raise SavedModelError(
            f"{os.fspath(path)!r} has format {fields['format']}, but this version reads {_FORMAT}",
            hint="use the version of skipvit_fx that wrote it, or a later one",
        )
    return header


def _check_parts(header: _Header, model: nn.Module) -> None:
    """Check before rewriting that submodules and names, shapes, dtypes and ties of tensors are the same."""
    name = type(model).__name__
    prefix = "" if name == header.model else f"{header.model} in the file, {name} in the model; "
    for stored, found in (
        (header.state, state_lines(model.state_dict())),
        (header.modules, module_lines(model)),
    ):
        if difference := first_difference(stored, found):
            what = "{!r} in the file, {!r} in the model".format(*difference)
            raise _another_model(header, prefix + what)


def _check_score(header: _Header) -> None:
    """Check that the score of the file is known here, as its code is not in the file."""
    score = header.options.get("score")
    if score not in known_scores():
        raise SavedModelError(
            f"the score {score!r} of the file is not registered",
            hint=f"call skipvit_fx.register_score({score!r}, function), with the function that it was saved with, "
            "before loading",
        )


def _check_graph(header: _Header, fast: SkipViTModule) -> None:
    graph = record_of(fast).computation
    if difference := first_difference(header.graph, graph):
        what = "{!r} in the file, {!r} in the model".format(*difference)
        raise _another_model(header, f"it does not compute the same: {what}")
    found = fingerprint(graph, module_lines(fast), state_lines(fast.state_dict()))
    if found != header.fingerprint:
        raise _another_model(header, "the file's fingerprint does not match its own header")


def _another_model(header: _Header, what: str) -> SavedModelError:
    versions = ", ".join(f"{name} {number}" for name, number in header.versions.items())
    return SavedModelError(
        f"the model is not the one that was saved: {what}",
        hint=f"build it with the same options, dtype and library versions (saved with {versions})",
    )


# -- example inputs -----------------------------------------------------------------------------------------------


def _describe(value: Any) -> Any:
    """A value as JSON: containers as ``[kind, items]``, tensors by shape and dtype."""
    if isinstance(value, Tensor):
        return ["tensor", list(value.shape), str(value.dtype).removeprefix("torch.")]
    if isinstance(value, Mapping):
        return ["dict", [[name, _describe(item)] for name, item in value.items()]]
    if isinstance(value, (tuple, list)):
        return [type(value).__name__, [_describe(item) for item in value]]
    if _is_plain(value):
        return ["plain", value]
    raise SavedModelError(
        f"an example input is a {type(value).__name__}, which cannot be saved",
        hint="rewrite with example inputs that are tensors, numbers, strings, or containers of these",
    )


def _is_plain(value: Any) -> TypeGuard[bool | int | float | str | None]:
    return value is None or isinstance(value, (bool, int, float, str))


def _build(described: Any, model: nn.Module) -> Any:
    """The example input from :func:`_describe`: zeros on the model's device, floating-point ones of its dtype."""
    kind, value, *rest = described
    if kind == "tensor":
        like = floating_like(model)
        dtype = getattr(torch, rest[0])
        dtype = like.dtype if dtype.is_floating_point else dtype
        return torch.zeros(value, dtype=dtype, device=like.device)
    if kind == "dict":
        return {name: _build(item, model) for name, item in value}
    if kind == "plain":
        return value
    items = [_build(item, model) for item in value]
    return tuple(items) if kind == "tuple" else items
