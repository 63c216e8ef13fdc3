"""Measured rates of this machine's CPU or GPU."""

from __future__ import annotations

import torch

from .rates import Rates


def measured(device: torch.device) -> Rates:
    """Measure the rates of a device.

    Raises:
        ImportError: the device is a GPU and Triton is not installed.
    """
    if device.type == "cpu":
        from . import cpu

        return cpu.measured()
    from . import gpu

    return gpu.measured(device)
