"""Support of this machine for Triton kernels."""

import functools
import importlib
import importlib.util
import os
import re
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

import torch

OLDEST_TRITON = (3, 3)


def interpreting() -> bool:
    """Return whether Triton's interpreter is on, which runs kernels on the CPU, slowly."""
    return os.environ.get("TRITON_INTERPRET") == "1"


Function = TypeVar("Function", bound=Callable[..., Any])


def assume_constant_result(function: Function) -> Function:
    """Do as `torch.compiler.assume_constant_result`, which imports torch._dynamo, slowly."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@assume_constant_result
def capability(device: torch.device) -> int | None:
    """Return a compute capability as an integer, 90 for 9.0; None without NVIDIA's CUDA.

    For the interpreter it is 80, the oldest that runs every kernel.
    """
    if interpreting():
        return 80
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@assume_constant_result
def triton_obstacle(device: torch.device) -> str | None:
    """Return why no Triton kernel can run on this device, or None."""
    reason = version_obstacle()
    if reason is not None:
        return reason
    compute_capability = capability(device)
    if compute_capability is None:
        if device.type == "cuda":
            return "Triton kernels are made for NVIDIA GPUs, and this torch is built for ROCm"
        return (
            f"the tensors are on the {device.type} and Triton needs an NVIDIA GPU "
            "(TRITON_INTERPRET=1 in the environment runs the kernels slowly on the CPU, for tests)"
        )
    if compute_capability < 70:
        number = compute_capability / 10
        return f"compute capability {number} is too old: Triton needs 7.0 (V100) or newer"
    return None


def version_obstacle() -> str | None:
    """Return why the installed Triton cannot compile the kernels, or None."""
    found = triton_version()
    if found is None:
        return "Triton is not installed (pip install triton; it exists for Linux)"
    if found < OLDEST_TRITON:
        words, oldest = (".".join(map(str, number)) for number in (found, OLDEST_TRITON))
        return f"Triton {words} is too old: {oldest} or newer is needed (pip install -U triton)"
    return None


@functools.cache
def triton_version() -> tuple[int, ...] | None:
    """Return (major, minor) of the installed Triton; None if it is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        found = version("triton")
    except PackageNotFoundError:
        # A folder on PYTHONPATH may lack the distribution's metadata.
        found = importlib.import_module("triton").__version__
    return tuple(int(number) for number in re.findall(r"\d+", found)[:2])
