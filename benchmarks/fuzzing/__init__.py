"""Random models, plans and calls: each is refused, or equals the reference of the tests."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))  # the reference, and the models
