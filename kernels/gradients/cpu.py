"""The gradient check on the CPU: one pass over memory for the sums and one for the combination.

A compiled loop (cpu_loop.c) takes all gradients in one parallel region. Where it was not built, and
for dtypes that it does not take, PyTorch operations run on chunks that stay in cache.
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
    return torch.tensor(totals, dtype=torch.float64, device="cpu").float()


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
    function(table, ctypes.c_int64(num_pieces), sums, ctypes.c_int64(threads_for(pieces)))
    return list(sums)


def threads_for(pieces: list[int]) -> int:
    """Return the number of threads that are worth starting for these pieces."""
    return torch.get_num_threads() if sum(pieces[2::3]) > PIECE else 1


def gated_combine_(
    a: Gradients, b: Gradients, used: Tensor, factor: Tensor, groups: Sequence[int] | None
) -> None:
    """Compute `reference.gated_combine_` in one pass over memory."""
    weights, factors = used.tolist(), factor.tolist()
    # Pieces and options by dtype, as the compiled loop reads them, and what must live until then.
    pieces: dict[torch.dtype, list[int]] = {torch.float32: [], torch.float64: []}
    options: dict[torch.dtype, list[float]] = {dtype: [] for dtype in pieces}
    alive: list[Tensor] = []
    written: list[Tensor] = []
    for index, (left, right) in enumerate(zip(a, b, strict=True)):
        group = 0 if groups is None else groups[index]
        weight, scale = weights[group], factors[group]
        if left is None or math.isnan(weight) or math.isnan(scale):
            continue
        if not left.is_contiguous():
            combine_(left, right, used[group], factor[group])
            continue
        if weight == 0:
            right = None
        if right is None:
            scale *= 1 - weight
            if scale == 1:
                continue
        same = right is None or right.dtype == left.dtype
        if left.dtype not in pieces or not same or compiled_loop() is None:
            combine_by_chunks_(left, right, weight, scale)
            continue
        y_start, x_start, size = 0, left.data_ptr(), left.itemsize
        if right is not None:
            alive.append(flat(right))
            y_start = alive[-1].data_ptr()
        written.append(left)
        for start in range(0, left.numel(), PIECE):
            other = y_start and y_start + start * size
            pieces[left.dtype] += x_start + start * size, other, min(PIECE, left.numel() - start)
            options[left.dtype] += weight, scale
    for dtype, table in pieces.items():
        combine_pieces_(dtype, table, options[dtype])
    torch.autograd.graph.increment_version([x for x in written if not x.is_inference()])


def combine_pieces_(dtype: torch.dtype, pieces: list[int], options: list[float]) -> None:
    """Combine pieces in place; each is: address of x, of y or 0, count. Options: weight, factor."""
    loop, num_pieces = compiled_loop(), len(pieces) // 3
    if loop is None or num_pieces == 0:
        return
    function = loop.combine_float if dtype == torch.float32 else loop.combine_double
    table = (ctypes.c_int64 * len(pieces))(*pieces)
    of_pieces = (ctypes.c_double * len(options))(*options)
    function(table, ctypes.c_int64(num_pieces), of_pieces, ctypes.c_int64(threads_for(pieces)))


def combine_by_chunks_(left: Tensor, right: Tensor | None, weight: float, factor: float) -> None:
    """Combine one contiguous entry in place; without the other one, multiply it by the factor."""
    others = None if right is None else flat(right).split(chunk_size())
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
        loop.combine_float.restype = loop.combine_double.restype = None
    return loop
