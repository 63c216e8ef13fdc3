"""Machine, versions and commit of a result."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ...engine.runtime.machine import cpu_model

Result = dict[str, Any]
CPU = torch.device("cpu")


def machine_name(device: torch.device = CPU) -> str:
    """A folder name such as intel-xeon-avx512-2core or nvidia-h200."""
    if device.type == "cuda":
        return "-".join(re.findall(r"[a-z0-9]+", gpu_name(device).lower()))
    words = re.sub(r"\(.*?\)|@.*|\b(CPU|Processor)\b", " ", cpu_model()).lower()
    # Processors of one name may differ in their vector instructions.
    words += f" {torch.backends.cpu.get_cpu_capability().lower()}"
    return "-".join([*re.findall(r"[a-z0-9]+", words), f"{os.cpu_count()}core"])


def gpu_name(device: torch.device) -> str:
    """The GPU's name as the driver reports it; on a CPU the processor's model."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()


def environment(device: torch.device = CPU) -> Result:
    """Everything that a reader needs to judge or repeat the numbers."""
    return (_gpu(device) if device.type == "cuda" else {}) | {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pytorch_metric_learning": _version("pytorch-metric-learning"),
        "torchjd": _version("torchjd"),
        "openmp": {key: value for key, value in os.environ.items() if key.startswith("OMP_")},
    }


def _gpu(device: torch.device) -> Result:
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "gpu_memory_bytes": properties.total_memory,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        or "unknown",
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
    }


def _commit() -> str:
    """Commit of this file's checkout, with "+changes" if files differ from it.

    Result files do not count as changes.
    """
    git = ("git", "-C", str(Path(__file__).parent))
    head = _output(*git, "rev-parse", "HEAD")
    status = _output(*git, "status", "--porcelain", "--", ":/", ":(top,exclude)benchmarks/results")
    if not head or head.startswith("unknown"):
        return head or "none"
    return head + ("+changes" if status else "")


def _output(*command: str) -> str:
    """First line that a program prints; empty if it fails, or says that it is not installed."""
    try:
        answer = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return f"unknown: {command[0]} is not installed"
    return answer.stdout.partition("\n")[0].strip() if answer.returncode == 0 else ""


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "absent"
