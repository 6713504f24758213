"""Fills the templates, and writes what comes of it as files that open from disk and need nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import skipvit_fx.page as here
from skipvit_fx.errors import ReportError
from skipvit_fx.files import appearing
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


def write(path: Path, text: str) -> None:
    """Write a page, so that no reader ever finds a part of it.

    Raises:
        ReportError: it cannot be written.
    """
    try:
        with appearing(path) as unfinished:
            unfinished.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ReportError(
            f"{path} could not be written: {error.strerror or error}", hint="choose another folder"
        ) from error
