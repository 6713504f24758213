"""How much of the saved multiply-adds onnxruntime turns into saved time.

Writes the original and the rewritten model, runs both alternately in one process, and compares the measured speed-up
with the ratio of their multiply-adds. Weights are random: the work does not depend on them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import onnxruntime
import timm
import torch

import skipvit_fx
from skipvit_fx.reports.environment import hardware, versions


def session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    """A session on the CPU, with a fixed number of threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--plan", default="6(55%)+11")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--target", default="onnxruntime", choices=["onnxruntime", "ascend"])
    options = parser.parse_args()

    torch.manual_seed(0)
    model = timm.create_model(options.model).eval()
    fast = skipvit_fx.rewrite(model, options.plan)
    report = skipvit_fx.inspect(fast)
    limit = report.baseline_macs / report.macs
    x = torch.randn(options.batch, *model.pretrained_cfg["input_size"]).numpy()
    with tempfile.TemporaryDirectory() as folder:
        sessions = []
        for name, module in (("original", model), ("rewritten", fast)):
            path = Path(folder) / f"{name}.onnx"
            skipvit_fx.export_onnx(module, path, target=options.target, batch=options.batch)
            sessions.append(session(path, options.threads))
        feeds = [{one.get_inputs()[0].name: x} for one in sessions]
        times: list[list[float]] = [[], []]
        for round_ in range(options.rounds + 2):
            for i, (one, feed) in enumerate(zip(sessions, feeds, strict=True)):
                start = time.perf_counter()
                one.run(None, feed)
                if round_ >= 2:  # the first two warm up
                    times[i].append(time.perf_counter() - start)
    ratios = [a / b for a, b in zip(*times, strict=True)]
    speedup = statistics.median(ratios)
    original, rewritten = (statistics.median(t) * 1e3 for t in times)
    print(f"{options.model} {options.plan}, batch {options.batch}, target {options.target}")
    print(
        f"{hardware()}; onnxruntime with {options.threads} threads; {options.rounds} alternating rounds"
    )
    print(versions("onnxruntime", "timm", "skipvit_fx"))
    print(f"original {original:.1f} ms, rewritten {rewritten:.1f} ms")
    print(
        f"speed-up {speedup:.3f} (min {min(ratios):.3f}, max {max(ratios):.3f}), by multiply-adds {limit:.3f}"
    )
    print(f"reached {speedup / limit:.3f} of what the multiply-adds allow")


if __name__ == "__main__":
    main()
