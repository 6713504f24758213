"""Pages in a real browser: Chromium, driven by Playwright, one for the whole run of the tests."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")


class Page:
    """A page opened from disk, with what it said and asked for.

    Attributes:
        page: Playwright's.
        complaints: its console errors and warnings, and the exceptions that its scripts did not catch.
        requests: every address that it asked for, other than its own file and what is inside it.
    """

    def __init__(self, page: Any) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.requests: list[str] = []
        page.on("console", self._said)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self._asked(request.url))
        self._file = ""

    def open(self, file: Path) -> Any:
        """Open a file and return Playwright's page."""
        self._file = file.resolve().as_uri()
        self.page.goto(self._file)
        return self.page

    def serious(self) -> list[str]:
        """What axe-core finds to be a serious or critical violation, with the elements."""
        from axe_playwright_python.sync_playwright import Axe

        found = Axe().run(self.page).response["violations"]
        return [
            f"{violation['id']}: {[node['html'][:200] for node in violation['nodes']]}"
            for violation in found
            if violation["impact"] in ("serious", "critical")
        ]

    def sideways(self) -> int:
        """By how many pixels the page can be scrolled to the side."""
        root = "document.scrollingElement"
        return int(self.page.evaluate(f"{root}.scrollWidth - {root}.clientWidth"))

    def _said(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def _asked(self, url: str) -> None:
        if url.partition("#")[0] != self._file and not url.startswith(("data:", "blob:", "about:")):
            self.requests.append(url)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium. Tests that need it are left out where there is none, but not in continuous integration."""
    missing = _missing()
    if missing and os.environ.get("CI") == "true":
        pytest.fail(missing)
    if missing:
        pytest.skip(missing)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=_executable(), args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Page]]:
    """Makes pages: ``open_page(width=390, height=844, dark=True)``."""
    contexts = []

    def made(width: int = 1280, height: int = 900, *, dark: bool = False) -> Page:
        scheme = "dark" if dark else "light"
        viewport = {"width": width, "height": height}
        contexts.append(
            browser.new_context(viewport=viewport, color_scheme=scheme, reduced_motion="reduce")
        )
        return Page(contexts[-1].new_page())

    yield made
    for context in contexts:
        context.close()


def _executable() -> str | None:
    return next((found for name in NAMES if (found := shutil.which(name))), None)


def _missing() -> str:
    """What is needed and not installed, in words; empty if nothing is."""
    from importlib.util import find_spec

    if not _executable():
        return f"there is no browser: none of {', '.join(NAMES)} is installed"
    wanted = ("playwright", "axe_playwright_python")
    missing = [name for name in wanted if find_spec(name) is None]
    return f"a browser is driven by {', '.join(missing)}, not installed" if missing else ""
