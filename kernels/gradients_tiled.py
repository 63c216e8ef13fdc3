"""The gradient check on the CPU: one pass over memory for the sums and one for the combination.

The sums come from a compiled loop (gradients_loop.c), which reads both gradients once; where no C
compiler was found at installation, from three products of a chunk that stays in cache.
"""

import ctypes
import functools
import importlib.util
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from .gradients_reference import Gradients, combine_, flat, sum_dtype

# Elements of a chunk for each thread, which PyTorch's operations take one after the other: the
# first reads them from memory, the following ones from the core's cache. Measured on a Xeon with 2
# MiB of L2 per core, one thread, float32: three products of 110M elements 32k 136 ms, 128k 128 ms,
# 256k 142 ms, 1024k 162 ms; combination of 53M elements 32k 58 ms, 128k 53 ms, 256k 57 ms, 1024k 62
# ms.
CHUNK_PER_THREAD = 128 * 1024
# Elements that the compiled loop takes at a time: fixed, so that the sums do not depend on the
# number of threads, and long enough that Python's part of a call does not count.
PIECE = 1024 * 1024

Sums = Callable[[Tensor, Tensor], tuple[float, float, float]]


def grad_dot_norm(
    a: Gradients, b: Gradients, groups: Sequence[int] | None, num_groups: int
) -> Tensor:
    """[G, 3] of `gradients.grad_dot_norm`, whose arguments are already checked."""
    compiled = compiled_sums()
    pair_sums = compiled or three_products
    work: list[tuple[int, tuple[bool, bool, bool], torch.dtype, tuple[Tensor, Tensor]]] = []
    for index, (left, right) in enumerate(zip(a, b, strict=True)):
        some = left if left is not None else right
        if some is None:
            continue
        x, y = (some if t is None else t for t in (left, right))
        dtype = torch.promote_types(sum_dtype(x), sum_dtype(y))
        group = 0 if groups is None else groups[index]
        counts = (left is not None and right is not None, left is not None, right is not None)
        converted = x.dtype != dtype or y.dtype != dtype
        size = PIECE if compiled and not converted else chunk_size()
        pairs = zip(flat(x).split(size), flat(y).split(size), strict=True)
        work += [(group, counts, dtype, pair) for pair in pairs]

    results = [(0.0, 0.0, 0.0)] * len(work)
    positions = iter(range(len(work)))

    def take_pieces(thread: int = 0) -> None:
        # The threads share the iterator, so none is left with all the large pieces.
        for position in positions:
            _, _, dtype, (x, y) = work[position]
            results[position] = pair_sums(x.to(dtype), y.to(dtype))

    num_threads = torch.get_num_threads()
    # PyTorch's products use all threads by themselves.
    if not compiled or num_threads == 1 or sum(x.numel() for _, _, _, (x, _) in work) <= PIECE:
        take_pieces()
    else:
        list(thread_pool(num_threads).map(take_pieces, range(num_threads)))

    totals = [[0.0] * 3 for _ in range(num_groups)]
    for (group, counts, _, _), sums in zip(work, results, strict=True):
        for column, count in enumerate(counts):
            if count:
                totals[group][column] += sums[column]
    return torch.tensor(totals, dtype=torch.float64).float()


def gated_combine_(
    a: Gradients, b: Gradients, used: Tensor, factor: Tensor, groups: Sequence[int] | None
) -> None:
    """`gradients_reference.gated_combine_`, chunk by chunk while it is in cache."""
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
    """One contiguous entry."""
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
def compiled_sums() -> Sums | None:
    """The compiled loop, or None where the package was installed without it."""
    spec = importlib.util.find_spec("fusedacl.kernels._gradients_loop")
    if spec is None or spec.origin is None:
        return None
    library = ctypes.CDLL(spec.origin)
    functions = {
        torch.float32: library.pair_sums_float,
        torch.float64: library.pair_sums_double,
    }
    for function in functions.values():
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
        function.restype = None

    def pair_sums(x: Tensor, y: Tensor) -> tuple[float, float, float]:
        sums = (ctypes.c_double * 3)()
        # ctypes releases the interpreter's lock meanwhile.
        functions[x.dtype](x.data_ptr(), y.data_ptr(), x.numel(), sums)
        return sums[0], sums[1], sums[2]

    return pair_sums


def three_products(x: Tensor, y: Tensor) -> tuple[float, float, float]:
    """(x . y, |x|^2, |y|^2) by PyTorch."""
    # In this order each product fetches one new operand from memory (1.05x the speed of starting
    # with the mixed one).
    x_squared = torch.dot(x, x).item()
    dot = torch.dot(x, y).item()
    return dot, x_squared, torch.dot(y, y).item()


@functools.cache
def thread_pool(num_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads, thread_name_prefix="fusedacl-gradients")


# A forked process has none of its parent's threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=thread_pool.cache_clear)
