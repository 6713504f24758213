"""The cost of calling a rewritten model, compared with calling its graph as a plain graph module.

`python benchmarks/call_overhead.py` alternately calls a 12-layer model that computes almost nothing and a graph module
of only its graph, and prints the difference: the time to find the graph for the call and to check for changes and
hooks, minus the time saved because modules are not looked up by path.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import fx

import skipvit_fx as sv
from skipvit_fx.reports.environment import hardware, versions

TARGET = 50e-6
"""In seconds."""


def seconds(call: Callable[[], Any]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    """Print the median, minimum and maximum of the differences of blocks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=20, help="blocks of a hundred pairs of calls")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 8, "num_heads": 2}
    model = timm.create_model("vit_small_patch16_224", **size).eval()
    x = torch.randn(1, 3, 32, 32)
    fast = sv.rewrite(model, "6(55%)+11", example_inputs=x)
    bare = fx.GraphModule(fast, fast.graph).eval()
    found = []
    with torch.no_grad():
        for _ in range(rounds):
            pairs = [(seconds(lambda: fast(x)), seconds(lambda: bare(x))) for _ in range(100)]
            found.append(
                statistics.median(a for a, _ in pairs) - statistics.median(b for _, b in pairs)
            )
    median = statistics.median(found)
    print(f"{hardware()}; {versions('timm', 'skipvit_fx')}")
    print(
        f"a call takes {median * 1e6:+.0f} microseconds against the graph ({min(found) * 1e6:+.0f} to "
        f"{max(found) * 1e6:+.0f}); target at most {TARGET * 1e6:+.0f}: {'met' if median <= TARGET else 'missed'}"
    )


if __name__ == "__main__":
    main()
