"""Rates of the machine at hand, measured."""

from __future__ import annotations

import torch

from .rates import Rates


def measured(device: torch.device) -> Rates:
    """The rates of the machine at hand, instead of its vendor's."""
    if device.type == "cpu":
        from . import cpu as cpu_rates

        return cpu_rates.measured()
    from . import gpu as gpu_rates

    return gpu_rates.measured(device)
