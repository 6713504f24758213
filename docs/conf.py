"""How the documentation is built: `make docs`."""

import importlib.metadata

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
