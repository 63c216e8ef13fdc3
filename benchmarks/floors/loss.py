"""Lower bound of the time of the contrastive loss, from a machine's rates.

A pass over the M^2 pairs of the contrastive loss takes at least

    GPU:  max(matrix FLOP / matrix rate, exponentials / exponential rate)
    CPU:  matrix FLOP / matrix rate + exponentials / exponential rate

because a GPU computes exponentials on units of their own. Similarities are symmetric, so half of
the pairs are enough forward: M^2 d FLOP and M^2 / 2 exponentials. Backward, the products with the
rows take 2 M^2 d FLOP and the recomputed pairs M^2 d FLOP and M^2 / 2 exponentials on a CPU; GPU
kernels compute all pairs again, which takes 4 M^2 d FLOP and M^2 exponentials together. Forward and
backward together take at least the time of moving 3 M d elements and 4 M d bytes (docs/kernels.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .rates import Rates


@dataclass(frozen=True)
class PassFloor:
    """Seconds of matrix products and of exponentials in one pass over the pairs, or in several."""

    matrix: float
    exponential: float
    overlaps: bool = True

    def __add__(self, other: PassFloor) -> PassFloor:
        return replace(
            self,
            matrix=self.matrix + other.matrix,
            exponential=self.exponential + other.exponential,
        )

    @property
    def seconds(self) -> float:
        longest = max(self.matrix, self.exponential)
        return longest if self.overlaps else self.matrix + self.exponential

    @property
    def bound_by(self) -> str:
        return "matrix unit" if self.matrix >= self.exponential else "exp"


@dataclass(frozen=True)
class LossFloor:
    """Both passes, and the seconds in which the rows and their gradients move through memory."""

    forward: PassFloor
    backward: PassFloor
    memory: float

    @property
    def seconds(self) -> float:
        """Forward and backward together."""
        return max(self.forward.seconds + self.backward.seconds, self.memory)

    @property
    def bound_by(self) -> str:
        """The unit that sets `seconds`: "memory", "matrix unit" or "exp"."""
        if self.memory > self.forward.seconds + self.backward.seconds:
            return "memory"
        return (self.forward + self.backward).bound_by


def loss_floor(rates: Rates, num_rows: int, width: int, dtype: torch.dtype) -> LossFloor | None:
    """Floor of one batch [M, d]; None if the machine has no rate for products of that dtype."""
    if dtype not in rates.flops:
        return None
    pairs = num_rows**2
    overlaps = rates.overlaps_units
    recomputed = pairs if overlaps else pairs / 2
    flops = rates.flops[dtype]
    moved = num_rows * width * (3 * dtype.itemsize + 4)
    return LossFloor(
        forward=PassFloor(pairs * width / flops, pairs / 2 / rates.exponentials, overlaps),
        backward=PassFloor(
            (2 * pairs + 2 * recomputed) * width / flops, recomputed / rates.exponentials, overlaps
        ),
        memory=moved / rates.bytes,
    )
