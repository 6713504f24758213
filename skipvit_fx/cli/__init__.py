"""The command ``skipvit``."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the command."""
    try:
        from skipvit_fx.cli.app import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit(f"skipvit needs {error.name}: pip install 'skipvit_fx[cli]'")
    app()
