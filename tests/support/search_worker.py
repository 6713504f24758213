"""Search on a tiny model in a process of its own: ``python -m support.search_worker STORAGE TRIALS SECONDS_A_PLAN``."""

from __future__ import annotations

import json
import sys
import time

import torch

import skipvit_fx as sv
from support.models import scramble
from support.tiny import Tiny


def main(storage: str, trials: str, seconds: str) -> None:
    """Print the number of each evaluation, then the plans of the front."""
    torch.set_num_threads(1)
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def slowly(progress: sv.Progress) -> None:
        print(json.dumps([progress.evaluated, str(progress.last.plan)]), flush=True)
        time.sleep(float(seconds))

    result = sv.search(
        scramble(Tiny()).eval(),
        [images],
        metric="cosine",
        trials=int(trials),
        storage=storage,
        measure=False,
        progress=slowly,
    )
    print(json.dumps([str(one.plan) for one in result.front]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
