"""Run the first example of a README, with the package that is installed: ``python -P readme_example.py README.md``."""

from __future__ import annotations

import re
import sys
from pathlib import Path


def first_example(readme: str) -> str:
    """Its first block of Python."""
    found = re.search(r"```python\n(.*?)```", readme, re.DOTALL)
    assert found, "no example"
    return found[1]


if __name__ == "__main__":
    code = first_example(Path(sys.argv[1]).read_text(encoding="utf-8"))
    names = {"__name__": "readme"}
    exec(compile(code, sys.argv[1], "exec"), names)
    print("ran with", sys.modules["skipvit_fx"].__file__)
