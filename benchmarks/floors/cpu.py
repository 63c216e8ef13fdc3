"""What the CPU at hand can do a second: matrix products, exponentials, bytes copied and read.

The products and exponentials are of blocks as the tiled loss has them, at its width, into memory
that is already there; they take their turns among the contestants, so that a busy machine slows the
floor as much as what is held against it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..measuring.clock import interleave_on
from ..measuring.environment import CPU, gpu_name
from ..measuring.memory import cache_bytes
from .rates import Rates

# Rows of the blocks with which the rates are measured.
BLOCK = 512
# Calls in a row per sample of a rate.
RATE_CALLS = 20
ROUNDS = 5
# Where no case says another: the width of BERT-base.
WIDTH = 768


def machine_rates(
    width: int, dtype: torch.dtype = torch.float32
) -> dict[str, Callable[[], object]]:
    """RATE_CALLS products and exponentials of one block, into memory that is already there."""
    left, right = torch.randn(2, BLOCK, width).to(dtype)
    out = torch.empty(BLOCK, BLOCK, dtype=dtype)
    exponents = torch.rand(BLOCK, BLOCK)

    def gemm() -> None:
        for _ in range(RATE_CALLS):
            torch.mm(left, right.t(), out=out)

    def exp() -> None:
        for _ in range(RATE_CALLS):
            torch.exp(exponents, out=out)

    return {"gemm": gemm, "exp": exp}


def memory_rates() -> dict[str, Callable[[], object]]:
    """A copy and a dot product of two vectors that together are far larger than the cache."""
    source, target = torch.ones(2, max(2**22, cache_bytes() // 2))
    return {"copy": lambda: target.copy_(source), "read": lambda: torch.dot(source, target)}


def product_rate(times: Mapping[str, Any], width: int) -> float:
    """FLOPs a second, by the median of the products of `machine_rates`."""
    return 2 * BLOCK**2 * width * RATE_CALLS / (times["p50_ms"] / 1e3)


def rates_from(times: Mapping[str, Mapping[str, Any]], width: int) -> Rates:
    """Rates by the medians of `machine_rates` and `memory_rates`, whichever took part.

    Bytes are those of the faster of copying and reading, so that the floor stays one.
    """
    seconds = {name: times[name]["p50_ms"] / 1e3 for name in times}
    flops, exponentials, rate_of_bytes = {}, float("inf"), float("inf")
    if "gemm" in seconds:
        # 16 bits are computed in float32 where the CPU has no products of them.
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
    """All of them, by themselves, at a run's begin."""
    calls = machine_rates(WIDTH) | memory_rates()
    return rates_from(interleave_on(CPU, calls, rounds=ROUNDS), WIDTH)
