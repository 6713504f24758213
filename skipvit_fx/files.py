"""Files that appear completely or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from skipvit_fx.errors import SkipViTError


def check_folder(path: Path, error: type[SkipViTError]) -> None:
    """Check early that ``path`` can be written later.

    Raises:
        SkipViTError: of the given kind: the folder does not exist or is not writable, or ``path`` is itself a folder.
    """
    folder = path.parent
    if not folder.is_dir():
        raise error(f"the folder {folder} does not exist", hint="create it first")
    if path.is_dir():
        raise error(f"{path} is a folder", hint="give the name of a file in it")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise error(f"the folder {folder} is not writable", hint="choose another folder")


@contextlib.contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A new file beside ``path``, which gets its name when the context ends without an error, and else is removed.

    Raises:
        OSError: it cannot be made or renamed.
    """
    try:
        unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
        unfinished.touch(exist_ok=False)
    except ValueError as error:  # an empty name, or one with a zero byte
        raise OSError(errno.EINVAL, str(error)) from error
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
