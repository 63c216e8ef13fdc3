"""Names and versions of the hardware and packages that a result was made with."""

from __future__ import annotations

import contextlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = (
    "fusedacl",
    "torch",
    "triton",
    "transformers",
    "datasets",
    "tokenizers",
    "safetensors",
    "numpy",
    "deepspeed",
)


def versions() -> dict[str, str]:
    """Return package -> version for Python and the installed packages of `PACKAGES`."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def machine_name(device: torch.device | None = None) -> str:
    """Return the GPU's name, or the CPU's with the number of torch's threads."""
    if device is not None and device.type == "cuda":
        return torch.cuda.get_device_name(device)
    number = torch.get_num_threads()
    return f"{cpu_model()}, {number} thread{'' if number == 1 else 's'}"


def num_cores() -> int:
    """Return the number of cores that this process may use; Slurm and taskset allow it a part."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_model() -> str:
    """Return the CPU's name as the system reports it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
