"""Lower bound of the time of the contrastive loss, from a machine's rates.

A pass over the M^2 pairs of the contrastive loss takes at least

    GPU:  max(matrix FLOP / matrix rate, exponentials / exponential rate)
    CPU:  matrix FLOP / matrix rate + exponentials / exponential rate

because a GPU computes exponentials on units of their own. Similarities are symmetric, so half of
the pairs are enough forward: M^2 d FLOP and M^2 / 2 exponentials. Backward, the products with the
rows take 2 M^2 d FLOP. A CPU can keep the exponentials for them (its loss does so as far as its
memory for pairs goes); GPU kernels compute all pairs again, which takes 4 M^2 d FLOP and M^2
exponentials together. Forward and backward together take at least the time of moving 3 M d elements
and 4 M d bytes (docs/kernels.md).
"""

from __future__ import annotations

import torch

from .rates import Floor, Rates


def loss_floor(
    rates: Rates, num_rows: int, width: int, dtype: torch.dtype, trained: float = 1.0
) -> Floor | None:
    """Floor of one batch [M, d]; None if the machine has no rate for products of that dtype.

    trained: the share of the rows that have a gradient.
    """
    if dtype not in rates.flops:
        return None
    passes = pass_seconds(rates, num_rows, width, dtype, trained)
    seconds = sum(max(units) if rates.overlaps_units else sum(units) for units in passes)
    memory = trained * num_rows * width * (3 * dtype.itemsize + 4) / rates.bytes
    if memory > seconds:
        return Floor(memory, "memory")
    matrix, exponential = (sum(unit) for unit in zip(*passes, strict=True))
    return Floor(seconds, "matrix unit" if matrix >= exponential else "exp")


def pass_seconds(
    rates: Rates, num_rows: int, width: int, dtype: torch.dtype, trained: float = 1.0
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Seconds of matrix products and of exponentials in the forward and the backward pass."""
    pairs, flops = num_rows**2, rates.flops[dtype]
    recomputed = trained * pairs if rates.overlaps_units else 0.0
    return (
        (pairs * width / flops, pairs / 2 / rates.exponentials),
        ((2 * trained * pairs + 2 * recomputed) * width / flops, recomputed / rates.exponentials),
    )
