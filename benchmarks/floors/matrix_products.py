"""The floor of whole steps: their own matrix products, at the rate measured in turns with them."""

from collections.abc import Callable, Mapping

import torch

from ..measuring.counting import count
from ..measuring.environment import Result
from .cpu import machine_rates, product_rate

# The rate's name among the contestants while they take turns.
PRODUCTS = "matrix products"
EXPLAINED = (
    "The floor of each is the time of its own matrix products, counted, at the rate of one that "
    "took turns with them."
)


def flops_of(call: Callable[[], object], calls: int = 1) -> int:
    """FLOPs of matrix products in a call that does the same thing `calls` times."""
    counts, _ = count(call)
    return counts.flops // calls


def product_turn(width: int, dtype: torch.dtype = torch.float32) -> Callable[[], object]:
    """What takes a turn beside the contestants, as PRODUCTS."""
    return machine_rates(width, dtype)["gemm"]


def add_floors(times: dict[str, Result], flops: Mapping[str, int], width: int) -> Result:
    """Takes PRODUCTS out of the times; the others get "flops" and "over_floor".

    Returns:
        "gigaflops" of the products, to add to the result.
    """
    rate = product_rate(times.pop(PRODUCTS), width)
    for name, number in flops.items():
        floor_ms = number / rate * 1e3
        times[name] |= {"flops": number, "over_floor": times[name]["p50_ms"] / floor_ms}
    return {"gigaflops": rate / 1e9}
