"""Measured rates of the CPU: matrix products, exponentials, bytes copied and read.

Products and exponentials have the block size of the tiled loss and write into existing memory.
They take turns with the providers, so that a busy machine slows the floor and the providers alike.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from ..measuring.clock import interleave_on
from ..measuring.environment import CPU, gpu_name
from ..measuring.memory import cache_bytes
from .rates import Rates

# Rows of the blocks with which rates are measured.
BLOCK = 512
# Calls in a row per sample of a rate.
RATE_CALLS = 20
ROUNDS = 5
# Width of BERT-base, for the rates that are measured once at the start of a run.
WIDTH = 768


def machine_rates(
    width: int, dtype: torch.dtype = torch.float32
) -> dict[str, Callable[[], object]]:
    """Calls that compute RATE_CALLS products, or exponentials, of one block."""
    left, right = torch.randn(2, BLOCK, width).to(dtype)
    out = torch.empty(BLOCK, BLOCK, dtype=dtype)
    exponents = torch.rand(BLOCK, BLOCK)

    def repeat(function: Callable[..., object], *inputs: torch.Tensor) -> None:
        for _ in range(RATE_CALLS):
            function(*inputs, out=out)

    return {
        "gemm": partial(repeat, torch.mm, left, right.t()),
        "exp": partial(repeat, torch.exp, exponents),
    }


def memory_rates() -> dict[str, Callable[[], object]]:
    """A copy and a dot product of two vectors that are far larger than the cache together."""
    source, target = torch.ones(2, max(2**22, cache_bytes() // 2))
    return {"copy": lambda: target.copy_(source), "read": lambda: torch.dot(source, target)}


def product_rate(times: Mapping[str, Any], width: int) -> float:
    """FLOP per second, from the median time of the products of `machine_rates`."""
    return 2 * BLOCK**2 * width * RATE_CALLS / (times["p50_ms"] / 1e3)


def rates_from(times: Mapping[str, Mapping[str, Any]], width: int) -> Rates:
    """Rates from the median times of `machine_rates` and `memory_rates`; either may be missing.

    The memory rate is the higher one of copying and reading, so that it stays an upper bound.
    """
    seconds = {name: times[name]["p50_ms"] / 1e3 for name in times}
    flops, exponentials, rate_of_bytes = {}, float("inf"), float("inf")
    if "gemm" in seconds:
        # A CPU without 16-bit products computes them in float32.
        flops = dict.fromkeys(
            (torch.float32, torch.float16, torch.bfloat16), product_rate(times["gemm"], width)
        )
        exponentials = BLOCK**2 * RATE_CALLS / seconds["exp"]
    if "copy" in seconds:
        moved = 8 * max(2**22, cache_bytes() // 2)
        rate_of_bytes = moved / min(seconds["copy"], seconds["read"])
    return Rates(
        f"{gpu_name(CPU)}, measured", flops, exponentials, rate_of_bytes, overlaps_units=False
    )


def measured() -> Rates:
    """Measure all rates, with nothing else running in this process."""
    calls = machine_rates(WIDTH) | memory_rates()
    return rates_from(interleave_on(CPU, calls, rounds=ROUNDS), WIDTH)
