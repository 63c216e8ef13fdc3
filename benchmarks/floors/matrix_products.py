"""Floor of a whole step: the time of its matrix products at the rate measured in turns with it."""

from collections.abc import Callable, Mapping

import torch

from ..measuring.counting import count
from ..measuring.environment import Result
from .cpu import machine_rates, product_rate

# Name of the rate among the providers that take turns.
PRODUCTS = "matrix products"
EXPLAINED = (
    "The floor of each row is the time that its own matrix products, which were counted, take at "
    "the rate of a matrix product that was timed in turns with them."
)


def flops_of(call: Callable[[], object], calls: int = 1) -> int:
    """FLOP of matrix products, per repetition, in a call that repeats its work `calls` times."""
    counts, _ = count(call)
    return counts.flops // calls


def product_turn(width: int, dtype: torch.dtype = torch.float32) -> Callable[[], object]:
    """The call that takes turns with the providers under the name PRODUCTS."""
    return machine_rates(width, dtype)["gemm"]


def add_floors(times: dict[str, Result], flops: Mapping[str, int], width: int) -> Result:
    """Remove PRODUCTS from the times; add "flops" and "over_floor" to the others.

    Returns:
        {"gigaflops": rate of the products}, to add to the result.
    """
    rate = product_rate(times.pop(PRODUCTS), width)
    for name, number in flops.items():
        floor_ms = number / rate * 1e3
        times[name] |= {"flops": number, "over_floor": times[name]["p50_ms"] / floor_ms}
    return {"gigaflops": rate / 1e9}
