"""The gradient check on the CPU: one pass over memory for the sums and one for the combination.

A compiled loop (cpu_loop.c) computes the sums or, where it was not built, three products of a chunk
that stays in cache.
"""

import ctypes
import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..support.c_loops import library
from .reference import Gradients, combine_, flat, sum_dtype

# Elements of a chunk per thread. Of several PyTorch operations on a chunk the first one reads it
# from memory, the others from the core's cache. Of 32k to 1024k this was the fastest for products
# and for combinations (float32, one thread of a Xeon with 2 MiB of L2 per core).
CHUNK_PER_THREAD = 128 * 1024
# Elements per piece of the compiled loop: fixed, so that sums do not depend on the threads.
PIECE = 1024 * 1024

Sides = tuple[bool, bool, bool]


def grad_dot_norm(
    a: Gradients, b: Gradients, groups: Sequence[int] | None, num_groups: int
) -> Tensor:
    """Return the [G, 3] of `angle.grad_dot_norm`, whose arguments are already checked."""
    totals = [[0.0] * 3 for _ in range(num_groups)]
    # Pieces by dtype, because a call of the compiled loop takes one dtype, and their totals.
    pieces: dict[torch.dtype, list[int]] = {torch.float32: [], torch.float64: []}
    owners: dict[torch.dtype, list[tuple[list[float], Sides]]] = {dtype: [] for dtype in pieces}
    # Copies of gradients that are not contiguous must live until the loop has run.
    alive: list[Tensor] = []
    for index, (left, right) in enumerate(zip(a, b, strict=True)):
        some = left if left is not None else right
        if some is None:
            continue
        x, y = (flat(some if t is None else t) for t in (left, right))
        counts = (left is not None and right is not None, left is not None, right is not None)
        total = totals[0 if groups is None else groups[index]]
        if x.dtype == y.dtype and x.dtype in pieces and compiled_loop() is not None:
            alive += x, y
            x_start, y_start, size = x.data_ptr(), y.data_ptr(), x.element_size()
            for start in range(0, x.numel(), PIECE):
                count = min(PIECE, x.numel() - start)
                pieces[x.dtype] += x_start + start * size, y_start + start * size, count
                owners[x.dtype].append((total, counts))
        else:
            add(total, counts, sums_by_chunks(x, y))
    for dtype, table in pieces.items():
        sums = sums_of_pieces(dtype, table)
        for position, (total, counts) in enumerate(owners[dtype]):
            add(total, counts, sums[3 * position : 3 * position + 3])
    return torch.tensor(totals, dtype=torch.float64).float()


def add(total: list[float], counts: Sides, sums: Sequence[float]) -> None:
    """Add those of (x . y, |x|^2, |y|^2) that count: an entry may be None on one side."""
    for column, count in enumerate(counts):
        if count:
            total[column] += sums[column]


def sums_by_chunks(x: Tensor, y: Tensor) -> tuple[float, float, float]:
    """Return (x . y, |x|^2, |y|^2) by PyTorch, chunk by chunk while it is in cache."""
    dtype = torch.promote_types(sum_dtype(x), sum_dtype(y))
    dot = x_squared = y_squared = 0.0
    for left, right in zip(x.split(chunk_size()), y.split(chunk_size()), strict=True):
        left, right = left.to(dtype), right.to(dtype)
        # In this order each product reads one new operand from memory.
        x_squared += torch.dot(left, left).item()
        dot += torch.dot(left, right).item()
        y_squared += torch.dot(right, right).item()
    return dot, x_squared, y_squared


def sums_of_pieces(dtype: torch.dtype, pieces: list[int]) -> list[float]:
    """Return the three sums of every piece, which is: address of x, address of y, count."""
    num_pieces = len(pieces) // 3
    table = (ctypes.c_int64 * len(pieces))(*pieces)
    sums = (ctypes.c_double * len(pieces))()
    loop = compiled_loop()
    if loop is None or num_pieces == 0:
        return list(sums)
    function = loop.pair_sums_float if dtype == torch.float32 else loop.pair_sums_double
    num_threads = torch.get_num_threads() if sum(pieces[2::3]) > PIECE else 1
    function(table, ctypes.c_int64(num_pieces), sums, ctypes.c_int64(num_threads))
    return list(sums)


def gated_combine_(
    a: Gradients, b: Gradients, used: Tensor, factor: Tensor, groups: Sequence[int] | None
) -> None:
    """Compute `reference.gated_combine_` chunk by chunk, while a chunk is in cache."""
    weights, factors = used.tolist(), factor.tolist()
    for index, (left, right) in enumerate(zip(a, b, strict=True)):
        group = 0 if groups is None else groups[index]
        if left is None or math.isnan(weights[group]) or math.isnan(factors[group]):
            continue
        if left.is_contiguous():
            combine_by_chunks_(left, right, weights[group], factors[group])
        else:
            combine_(left, right, used[group], factor[group])


def combine_by_chunks_(left: Tensor, right: Tensor | None, weight: float, factor: float) -> None:
    """Combine one contiguous entry in place."""
    others = None if right is None or weight == 0 else flat(right).split(chunk_size())
    if others is None:
        factor *= 1 - weight
    if others is None and factor == 1:
        return
    dtype = sum_dtype(left)
    for index, chunk in enumerate(left.view(-1).split(chunk_size())):
        combined = chunk.to(dtype)
        if others is not None:
            combined.lerp_(others[index].to(dtype), weight)
        if factor != 1:
            combined *= factor
        if combined is not chunk:
            chunk.copy_(combined)


def chunk_size() -> int:
    return CHUNK_PER_THREAD * torch.get_num_threads()


@functools.cache
def compiled_loop() -> ctypes.CDLL | None:
    """Load cpu_loop.c; None where the package was installed without it."""
    loop = library("gradients._cpu_loop")
    if loop is not None:
        loop.pair_sums_float.restype = loop.pair_sums_double.restype = None
    return loop
