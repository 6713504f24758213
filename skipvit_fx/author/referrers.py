"""What refers to an object."""

from __future__ import annotations

import gc
from typing import Any


def referrers_of(thing: object) -> list[Any]:
    """The objects that refer to ``thing`` directly.

    The garbage collector does not look at objects that ``gc.freeze()`` set aside, as servers do after their imports.
    They are put back for as long as it searches; garbage is collected before the others are set aside as well.
    """
    if not gc.get_freeze_count():
        return gc.get_referrers(thing)
    gc.unfreeze()
    try:
        return gc.get_referrers(thing)
    finally:
        gc.collect()
        gc.freeze()
