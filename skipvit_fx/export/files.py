"""Writes files completely or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from skipvit_fx.errors import ExportError

if TYPE_CHECKING:
    import onnx_ir as ir

EXTERNAL_ABOVE = 2**31 - 2**20
"""Bytes of weights above which they go into a separate file: a protobuf ends at 2**31 - 1 bytes."""

KEPT_INSIDE = 2**16
"""Bytes up to which a constant stays in the model file even then: shapes, axes, indices, biases."""


def write_model(
    model: ir.Model, path: Path, check: Callable[[Path], None] = lambda path: None
) -> tuple[Path, ...]:
    """Write ``model`` to ``path``, and large weights beside it if one file cannot hold them.

    Everything is first written under another name and passed to ``check``, and only then moved into place. Returns the
    files, the model first.

    Raises:
        ExportError: the disk is full or writing fails; nothing is left behind then.
    """
    import onnx_ir as ir

    size = sum(
        value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value
    )
    data = path.name + ".data" if size > EXTERNAL_ABOVE else None
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            ir.save(
                model,
                Path(folder) / path.name,
                external_data=data,
                size_threshold_bytes=KEPT_INSIDE,
            )
            names = [path.name] if data is None else [path.name, data]
            for name in reversed(names):
                with open(Path(folder) / name, "rb+") as file:
                    os.fsync(file.fileno())
            check(Path(folder) / path.name)
            for name in reversed(names):
                os.replace(Path(folder) / name, path.parent / name)
    except OSError as error:
        raise ExportError(
            f"{path} could not be written: {error.strerror or error}",
            hint="free some space or choose another folder; nothing was left behind",
        ) from error
    return tuple(path.parent / name for name in names)
