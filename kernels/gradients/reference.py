"""The specification of the gradient check: three products and one combination per entry."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Gradients = Sequence[Tensor | None]


class Gate(NamedTuple):
    """The options of `angle.gated_combine_`, already checked."""

    weight: float
    max_angle: float
    scale: float | Tensor | None
    max_norm: float | None
    clip_groups: bool


# Number of elements converted to float64 at a time. One float32 product over an embedding table has
# an error of 1e-4, and a float64 copy of the whole table takes twice its memory.
PIECE = 2**22


def device_of(a: Gradients, b: Gradients) -> torch.device:
    """Return the device of the first gradient; the CPU if all are None."""
    return next((t.device for t in (*a, *b) if isinstance(t, Tensor)), torch.device("cpu"))


def grad_dot_norm(
    a: Gradients, b: Gradients, groups: Sequence[int] | None, num_groups: int
) -> Tensor:
    """Return the [G, 3] of `angle.grad_dot_norm`, whose arguments are already checked."""
    nothing = torch.zeros(3, dtype=torch.float64, device=device_of(a, b))
    rows = [[nothing] for _ in range(num_groups)]
    for index, (left, right) in enumerate(zip(a, b, strict=True)):
        if left is not None or right is not None:
            rows[0 if groups is None else groups[index]].append(pair_sums(left, right))
    return torch.stack([torch.stack(row).sum(0) for row in rows]).float()


def gated_combine_(
    a: Gradients, b: Gradients, used: Tensor, factor: Tensor, groups: Sequence[int] | None
) -> None:
    """Set a to factor ((1 - l') a + l' b) with l' [G] and factors [G].

    Where either is NaN the gradients are kept, by a mask: the host does not know the values.
    """
    weights, factors = used.unbind(), factor.unbind()
    for index, (left, right) in enumerate(zip(a, b, strict=True)):
        if left is not None:
            group = 0 if groups is None else groups[index]
            combine_(left, right, weights[group], factors[group])


def sum_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype in which this gradient's elements are multiplied and added."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def flat(tensor: Tensor) -> Tensor:
    """Return the elements in index order, as a copy if the gradient is not contiguous."""
    return tensor.detach().reshape(-1)


def pair_sums(left: Tensor | None, right: Tensor | None) -> Tensor:
    """Return (x . y, |x|^2, |y|^2) of one entry, float64 [3]."""
    x, y = (None if t is None else flat(t).split(PIECE) for t in (left, right))
    some = x if x is not None else y
    assert some is not None, "an entry that is None on both sides is left out"
    sums = torch.zeros(3, dtype=torch.float64, device=some[0].device)
    for column, (us, vs) in enumerate(((x, y), (x, x), (y, y))):
        if us is not None and vs is not None:
            for u, v in zip(us, vs, strict=True):
                sums[column] += torch.dot(u.double(), v.double())
    return sums


def combine_(left: Tensor, right: Tensor | None, used: Tensor, factor: Tensor) -> None:
    """Combine one entry in place."""
    dtype = sum_dtype(left)
    a = left.to(dtype)
    weight = used.to(dtype)
    combined = a * (1 - weight) if right is None else torch.lerp(a, right.to(dtype), weight)
    combined = combined * factor.to(dtype)
    left.copy_(torch.where(weight.isnan() | factor.isnan(), a, combined))
