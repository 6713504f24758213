"""``skipvit doctor``: what is installed, what works, and what to do about the rest.

Everything that could bring the process down is tried in a separate one.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

State = Literal["ok", "missing", "broken", "info"]

Run = Callable[[str, Mapping[str, str]], tuple[int, str]]
"""Runs Python code with an environment; returns the exit status and the last line of the output."""

AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"

_CANN_HOMES = ("ASCEND_TOOLKIT_HOME", "ASCEND_HOME_PATH")
_CANN_DEFAULT = Path("/usr/local/Ascend/ascend-toolkit/latest")

_PACKAGES = {
    "timm": "pip install 'skipvit_fx[timm]', for models by name",
    "onnx": "pip install 'skipvit_fx[onnx]', to export and to check files",
    "onnxscript": "pip install 'skipvit_fx[onnx]', to export",
    "onnxruntime": "pip install 'skipvit_fx[onnx]', to verify what was exported",
}


@dataclass(frozen=True)
class Line:
    """One thing that was examined.

    Attributes:
        what: its name.
        state: ``ok``, ``missing``, ``broken``, or ``info`` if none of these applies.
        detail: version, or what went wrong.
        advice: what to do; empty if nothing.
    """

    what: str
    state: State
    detail: str
    advice: str = ""


def run_python(code: str, environment: Mapping[str, str]) -> tuple[int, str]:
    """Run code in a separate process, which may crash or hang."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return 124, "no answer within two minutes"
    except OSError as error:
        return 127, str(error)
    lines = (done.stdout if done.returncode == 0 else done.stderr or done.stdout).split("\n")
    said = [line for line in lines if line.strip()]
    return done.returncode, said[-1].strip() if said else f"exit status {done.returncode}"


def examine(run: Run = run_python) -> list[Line]:
    """Examine everything.

    Args:
        run: runs code in a separate process.
    """
    lines = [Line("python", "ok", sys.version.split()[0])]
    lines += _torch(run)
    lines += [_package(name, advice, run) for name, advice in _PACKAGES.items()]
    lines += _accelerators(run)
    lines += _npu(run)
    lines += _cann()
    return lines


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _package(name: str, advice: str, run: Run) -> Line:
    version = _version(name)
    if version is None:
        return Line(name, "missing", "not installed", advice)
    status, said = run(f"import {name}", {AUTOLOAD: "0"})
    if status:
        return Line(name, "broken", f"{version}: {said}", f"pip install --force-reinstall {name}")
    return Line(name, "ok", version)


def _torch(run: Run) -> list[Line]:
    version = _version("torch") or "unknown version"
    status, said = run("import torch; print(torch.__version__)", {AUTOLOAD: "1"})
    if status == 0:
        return [Line("torch", "ok", said)]
    status_alone, _ = run("import torch", {AUTOLOAD: "0"})
    if status_alone == 0:
        advice = (
            f"a backend extension of torch is broken; set {AUTOLOAD}=0 to use torch without it, uninstall it "
            "(pip uninstall torch-npu), or install what it needs (for torch-npu: CANN, then source its set_env.sh)"
        )
        return [Line("torch", "broken", f"{version}: {said}", advice)]
    return [Line("torch", "broken", f"{version}: {said}", "reinstall torch")]


def _accelerators(run: Run) -> list[Line]:
    code = (
        "import torch\n"
        "names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]\n"
        "names += ['mps'] if torch.backends.mps.is_available() else []\n"
        "print(', '.join(names))"
    )
    status, said = run(code, {AUTOLOAD: "0"})
    if status:
        return [Line("accelerators", "broken", said, "check the driver; the CPU works anyway")]
    none = said.startswith("exit status")
    return [Line("accelerators", "info", "none, the CPU is used" if none else said)]


def _npu(run: Run) -> list[Line]:
    version = _version("torch-npu")
    if version is None:
        advice = "only needed to run PyTorch on an Ascend NPU: install CANN, then torch-npu with torch's minor version"
        return [Line("torch-npu", "missing", "not installed", advice)]
    torch = _version("torch") or ""
    if torch.split(".")[:2] != version.split(".")[:2]:
        wanted = ".".join(torch.split(".")[:2])
        advice = f"install torch-npu {wanted}.* for this torch, or the torch of torch-npu {version}"
        return [Line("torch-npu", "broken", f"{version} beside torch {torch}", advice)]
    code = "import torch, torch_npu; print(torch.npu.is_available(), torch.npu.device_count())"
    status, said = run(code, {AUTOLOAD: "0"})
    if status:
        advice = "install CANN and source its set_env.sh; without an NPU, uninstall torch-npu"
        return [Line("torch-npu", "broken", f"{version}: {said}", advice)]
    if not said.startswith("True"):
        advice = "check npu-smi info, the driver, and that this user may open /dev/davinci*"
        return [Line("torch-npu", "broken", f"{version}, but no device is available", advice)]
    advice = "set TORCH_NPU_FALLBACK_CPU_DISABLE=1 when testing, so that a fallback to the CPU is an error"
    return [Line("torch-npu", "ok", f"{version}, {said.split()[-1]} devices", advice)]


def _cann() -> list[Line]:
    homes = [Path(os.environ[name]) for name in _CANN_HOMES if os.environ.get(name)]
    home = next((path for path in [*homes, _CANN_DEFAULT] if path.is_dir()), None)
    lines = [
        Line("CANN", "info", str(home))
        if home
        else Line("CANN", "missing", "not found", "only needed on a machine that converts or runs")
    ]
    for tool, use in (("atc", "convert ONNX to .om"), ("npu-smi", "see the NPUs")):
        path = shutil.which(tool)
        advice = "" if path else f"comes with CANN or its driver, to {use}"
        lines.append(Line(tool, "info" if path else "missing", path or "not on the path", advice))
    return lines
