"""Rates of a machine, and the floor of a case."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...engine.runtime.device import dtype_name
from ..measuring.environment import Result

DTYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Rates:
    """FLOP, exponentials and bytes per second; rates that were not measured are infinite.

    flops: matrix products by dtype; a dtype that the machine cannot multiply is absent.
    overlaps_units: whether products and exponentials run at the same time (GPU) or not (CPU).
    """

    name: str
    flops: dict[torch.dtype, float]
    exponentials: float
    bytes: float
    overlaps_units: bool = True

    def record(self) -> Result:
        """A dictionary for JSON; unknown rates are null, for JSON has no infinity."""
        exponentials, num_bytes = (
            None if rate == float("inf") else rate / 1e9 for rate in (self.exponentials, self.bytes)
        )
        flops = {dtype_name(dtype): rate for dtype, rate in self.flops.items()}
        return {
            "name": self.name,
            "gigaflops": {name: rate / 1e9 for name, rate in flops.items()},
            "giga_exponentials_per_second": exponentials,
            "gigabytes_per_second": num_bytes,
            "overlaps_units": self.overlaps_units,
        }


@dataclass(frozen=True)
class Floor:
    """The least possible seconds, and the unit that sets them."""

    seconds: float
    bound_by: str
