"""How the documentation is built: `make docs`."""

from __future__ import annotations

import importlib.metadata
import re
from typing import Any

project = "skipvit_fx"
author = copyright = "The skipvit_fx developers"
release = version = importlib.metadata.version("skipvit_fx")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
html_theme = "furo"
html_title = f"skipvit_fx {release}"
html_show_sphinx = False
html_theme_options = {"footer_icons": []}

# Pages are written for GitHub as well: links lead to files, and code without a language is a shell session.
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
highlight_language = "text"

# Docstrings are Google style. Types stand in the signatures.
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False


def _names_as_one(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """`first, second: what both are` is one entry; Sphinx would take the first name for a type."""
    for i, line in enumerate(lines):
        entry = re.match(r" +[a-z_]\w*(, [a-z_]\w*)+:", line)
        if entry:
            lines[i] = entry[0].replace(", ", ",") + line[entry.end() :]


def setup(app: Any) -> None:
    """Sphinx calls this; docstrings are rewritten before napoleon reads them."""
    app.connect("autodoc-process-docstring", _names_as_one, priority=400)
