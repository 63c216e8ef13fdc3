"""Lower bounds of the time of the contrastive loss and of the gate, from a machine's rates.

A pass over the M^2 pairs of the contrastive loss takes at least

    GPU:  max(matrix FLOP / matrix rate, exponentials / exponential rate)
    CPU:  matrix FLOP / matrix rate + exponentials / exponential rate

because a GPU computes exponentials on units of their own. Similarities are symmetric, so half of
the pairs are enough forward: M^2 d FLOP and M^2 / 2 exponentials. Backward, the products with the
rows take 2 M^2 d FLOP and the recomputed pairs M^2 d FLOP and M^2 / 2 exponentials on a CPU; GPU
kernels compute all pairs again, which takes 4 M^2 d FLOP and M^2 exponentials together. Forward and
backward together take at least the time of moving 3 M d elements and 4 M d bytes (docs/kernels.md).
The angle check reads two lists of gradients; the combination also writes one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .rates import Rates


@dataclass(frozen=True)
class PassFloor:
    """Seconds of matrix products and of exponentials in one pass over the pairs."""

    matrix: float
    exponential: float
    overlaps: bool = True

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
        passes = (self.forward, self.backward)
        if self.memory > sum(each.seconds for each in passes):
            return "memory"
        matrix, exponential = (
            sum(getattr(each, unit) for each in passes) for unit in ("matrix", "exponential")
        )
        return "matrix unit" if matrix >= exponential else "exp"


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


def dot_norm_floor(rates: Rates, num_elements: int, itemsize: int) -> float:
    """Seconds in which both lists are read."""
    return 2 * num_elements * itemsize / rates.bytes


def combine_floor(rates: Rates, num_elements: int, itemsize: int) -> float:
    """Seconds in which both lists are read and one is written."""
    return 3 * num_elements * itemsize / rates.bytes
