"""Fills the templates, and writes what comes of it as files that open from disk and need nothing else."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import skipvit_fx.page as here
from skipvit_fx.errors import ReportError
from skipvit_fx.optional import need


def page_template(
    name: str,
    *,
    styles: Sequence[str],
    scripts: Sequence[str],
    licences: Mapping[str, str] | None = None,
) -> Any:
    """A template with everything that it inserts escaped, and with these files of ``static/`` in it.

    Args:
        name: of the file in ``templates/``.
        styles, scripts: names of files, in their order.
        licences: names of files, by what each is of.

    Raises:
        ReportError: jinja2 is not installed.
    """
    jinja2 = need("jinja2", "report", ReportError)
    own = need("markupsafe", "report", ReportError).Markup
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("skipvit_fx.page", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}

    def text(file: str) -> Any:
        return own((files(here) / "static" / file).read_text(encoding="utf-8"))

    return environment.get_template(
        name,
        globals={
            "styles": [text(file) for file in styles],
            "scripts": [text(file) for file in scripts],
            "licences": {of: text(file) for of, file in (licences or {}).items()},
        },
    )


def check_folder(path: Path) -> None:
    """Check early that a file can be written later.

    Raises:
        ReportError: its folder does not exist, or it is itself a folder.
    """
    if path.is_dir():
        raise ReportError(f"{path} is a folder", hint="give the name of a file in it")
    if not path.parent.is_dir():
        raise ReportError(f"the folder {path.parent} does not exist", hint="create it first")


def write(path: Path, text: str) -> None:
    """Write to a file beside ``path`` and rename it, so that no reader ever finds a partial file.

    Raises:
        ReportError: it cannot be written.
    """
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        raise ReportError(
            f"{path} could not be written: {error.strerror or error}", hint="choose another folder"
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)
