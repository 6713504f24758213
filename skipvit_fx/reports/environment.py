"""The hardware and software of a run, stated with every published figure."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

import torch


def versions(*packages: str) -> str:
    """Python, torch and the given packages with their versions; packages that are not installed are left out."""
    parts = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    for package in packages:
        try:
            parts.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(parts)


def version_of(package: str) -> str:
    """The installed version of a package, or ``unknown``."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that was not installed
        return "unknown"


def hardware() -> str:
    """The processor, and how many of its threads torch uses."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        fields = (line.partition(":") for line in cpuinfo.read_text(encoding="utf-8").splitlines())
        name = next(
            (value.strip() for key, _, value in fields if key.strip() == "model name"), name
        )
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


def device_name(device: torch.device) -> str:
    """The name of an accelerator, or of the processor."""
    if device.type == "cpu":
        return hardware()
    return str(torch.get_device_module(device).get_device_name(device))
