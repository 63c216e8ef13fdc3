"""The specification of the gradient check: three products, then one combination, per entry."""

from collections.abc import Sequence

import torch
from torch import Tensor

Gradients = Sequence[Tensor | None]
# Elements that are widened to float64 at a time. One float32 product over an embedding table is
# off by 1e-4 already, and a widened copy of all of it takes twice its memory.
PIECE = 2**22


def grad_dot_norm(
    a: Gradients, b: Gradients, groups: Sequence[int] | None, num_groups: int
) -> Tensor:
    """[G, 3] of `gradients.grad_dot_norm`, whose arguments are already checked."""
    device = next((t.device for t in (*a, *b) if t is not None), torch.device("cpu"))
    nothing = torch.zeros(3, dtype=torch.float64, device=device)
    rows = [[nothing] for _ in range(num_groups)]
    for index, (left, right) in enumerate(zip(a, b, strict=True)):
        if left is not None or right is not None:
            rows[0 if groups is None else groups[index]].append(pair_sums(left, right))
    return torch.stack([torch.stack(row).sum(0) for row in rows]).float()


def gated_combine_(
    a: Gradients, b: Gradients, used: Tensor, factor: Tensor, groups: Sequence[int] | None
) -> None:
    """a <- factor ((1 - l') a + l' b) with the l' [G] and the factors [G] of `gradients`.

    Where either is NaN the gradients stay as they are: masked, for the host does not know.
    """
    weights, factors = used.unbind(), factor.unbind()
    for index, (left, right) in enumerate(zip(a, b, strict=True)):
        if left is not None:
            group = 0 if groups is None else groups[index]
            combine_(left, right, weights[group], factors[group])


def sum_dtype(tensor: Tensor) -> torch.dtype:
    """The precision in which this gradient's elements are multiplied and added."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def flat(tensor: Tensor) -> Tensor:
    """One dimension, in index order: `reshape` copies a gradient that is not contiguous."""
    return tensor.detach().reshape(-1)


def pair_sums(left: Tensor | None, right: Tensor | None) -> Tensor:
    """(x . y, |x|^2, |y|^2) [3] float64 of one entry."""
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
    """One entry."""
    dtype = sum_dtype(left)
    a = left.to(dtype)
    weight = used.to(dtype)
    combined = a * (1 - weight) if right is None else torch.lerp(a, right.to(dtype), weight)
    combined = combined * factor.to(dtype)
    left.copy_(torch.where(weight.isnan() | factor.isnan(), a, combined))
