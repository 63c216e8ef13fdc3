"""The contrastive loss of many rows on the CPU, by one compiled call and in one parallel region.

Tiles of exponentials on and above the diagonal are kept for the gradient as far as `pair_memory`
goes, the others are computed again. Results have the same bits for any memory and any number of
threads. For float32, where cpu_triangle.c was compiled at installation.
"""

import ctypes
import functools
import math
import os

import torch
from torch import Tensor

from ...support.names import check_name
from ..batch import PAIR_MEMORY, Batch
from . import cpu_loop

# Rows and columns of a tile in cpu_triangle.c.
TILE = 96
TILE_ELEMENTS = TILE * TILE
LN2 = math.log(2)
# The kinds of vectors for which cpu_triangle.c is compiled, the last ones being the widest.
VECTORS = ("plain", "avx2", "avx512")
# Names the widest vectors to be used.
VARIABLE = "FUSEDACL_CPU_VECTORS"
POINTERS = ("y", "exists", "classes", "scales", "u", "result", "products")
INTEGERS = ("num_rows", "num_own", "num_kept_rows", "are_kept", "width", "denominator")


class Pairs(ctypes.Structure):
    """`struct pairs` of cpu_plan.h, with the same fields."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int64) for name in INTEGERS),
        ("temperature", ctypes.c_double),
    )


# Memory for tiles, kept for the next call: fresh pages would cost as much as computing them again.
# At most PAIR_MEMORY bytes.
spare: list[Tensor] = []


def takes(batch: Batch, dtype: torch.dtype) -> bool:
    """Return whether the compiled call computes the loss of this batch in this dtype."""
    return batch.num_rows > cpu_loop.MAX_ROWS and cpu_loop.can_run(batch, dtype) and is_fast()


def loss_and_gradient(
    batch: Batch,
    with_gradient: bool,
    with_products: bool = False,
    memory: tuple[Tensor, Tensor] | None = None,
) -> cpu_loop.Outputs:
    """Compute the loss and, where they are wanted, its gradient and its products.

    memory: rows [Q, d] and labels [Q], constants that are no anchors.
    """
    call, loop = cpu_loop.Call(batch, with_gradient, with_products, memory), compiled_loop()
    num_trained = batch.num_rows // batch.num_copies if with_gradient else 0
    capacity = num_tiles(call.num_rows, num_trained, batch.pair_memory)
    scratch = cpu_loop.floats(
        loop.supcon_triangle_scratch(call.problem, capacity, call.num_threads)
    )
    tiles = borrow(capacity)
    outside = loop.supcon_triangle(
        call.problem, scratch.data_ptr(), tiles.data_ptr(), capacity, call.num_threads, vectors()
    )
    give_back(tiles)
    call.check(outside)
    return call.outputs


def takes_pass(y: Tensor) -> bool:
    """Return whether `run_pass` computes the pairs of y [.., M, d]."""
    return y.shape[-2] > cpu_loop.MAX_ROWS and can_run(y)


def can_run(y: Tensor) -> bool:
    """Return whether the compiled loop can compute the pairs of y [.., M, d]."""
    return (
        y.device.type == "cpu"
        and y.dtype == torch.float32
        and cpu_loop.compiled_loop() is not None
        and is_fast()
    )


def run_pass(
    y: Tensor,
    classes: Tensor,
    denominator: str,
    num_own: int,
    *,
    exists: Tensor | None = None,
    u: Tensor | None = None,
    pair_memory: int = 0,
) -> Tensor:
    """Return D [n] of the first n rows of y [M, d] or, with u [M], their G [n, d].

    y, u and G are those of loss.py. exists [M]: 0 for rows that D leaves out; u is 0 for them.
    pair_memory: bytes for tiles of the gradient's weights.
    """
    result = cpu_loop.floats(num_own) if u is None else cpu_loop.floats(num_own, y.shape[1])
    parts = {"y": y, "classes": classes.int(), "exists": exists, "u": u, "result": result}
    tiles = borrow(num_tiles(y.shape[0], 0 if u is None else num_own, pair_memory))
    run_pairs(parts, tiles, denominator, num_own=num_own)
    give_back(tiles)
    return result


def run_pairs(
    parts: dict[str, Tensor | None],
    tiles: Tensor,
    denominator: str,
    *,
    num_own: int,
    num_kept_rows: int = 0,
    are_kept: bool = False,
    temperature: float = 1.0,
) -> None:
    """Run one pass over pairs, whose arguments are those of `struct pairs` in cpu_plan.h.

    tiles: memory for tiles, [capacity, TILE_ELEMENTS].
    """
    loop, num_threads = compiled_loop(), torch.get_num_threads()
    # Copies made here must live until the loop has returned.
    read = {name: part.contiguous() for name, part in parts.items() if part is not None}
    pairs = Pairs(
        **{name: part.data_ptr() for name, part in read.items()},
        num_rows=read["y"].shape[0], num_own=num_own, num_kept_rows=num_kept_rows,
        are_kept=are_kept, width=read["y"].shape[1],
        denominator=cpu_loop.DENOMINATORS.index(denominator), temperature=temperature,
    )  # fmt: skip
    capacity = tiles.numel() // TILE_ELEMENTS
    scratch = cpu_loop.floats(loop.supcon_pass_scratch(pairs, capacity, num_threads))
    loop.supcon_pass(pairs, scratch.data_ptr(), tiles.data_ptr(), capacity, num_threads, vectors())


def num_tiles(num_rows: int, num_trained: int, pair_memory: int) -> int:
    """Return how many tiles the gradient of the first rows has, at most as many as memory holds."""
    blocks, trained = -(-num_rows // TILE), -(-num_trained // TILE)
    needed = trained * blocks - trained * (trained - 1) // 2
    return min(needed, pair_memory // (4 * TILE_ELEMENTS))


def borrow(capacity: int) -> Tensor:
    """Return memory for `capacity` tiles or more that no other thread uses."""
    size = capacity * TILE_ELEMENTS
    try:
        memory = spare.pop()
    except IndexError:
        memory = cpu_loop.floats(0)
    if memory.numel() < size:
        memory = cpu_loop.floats(size)
        compiled_loop().supcon_use_large_pages(memory.data_ptr(), size)
    return memory


def give_back(memory: Tensor) -> None:
    """Keep memory of ordinary size for the next call, unless another thread's is kept already."""
    if not spare and 4 * memory.numel() <= PAIR_MEMORY:
        spare.append(memory)


def is_fast() -> bool:
    """Return whether the loop was compiled for the vectors of this processor."""
    return compiled_loop().supcon_vectors() >= 0


def describe() -> str:
    """Describe what decides the speed here."""
    if not is_fast():
        return f"above {cpu_loop.MAX_ROWS} rows, PyTorch operations on tiles: that loop needs gcc"
    return (
        f"above {cpu_loop.MAX_ROWS} rows with {VECTORS[vectors()]} vectors and up to "
        f"{PAIR_MEMORY / 2**20:g} MiB for pairs (pair_memory)"
    )


def vectors() -> int:
    """Return the place in VECTORS of those to be used: the widest, or what the variable names."""
    widest = compiled_loop().supcon_vectors()
    name = os.environ.get(VARIABLE)
    if name is None:
        return widest
    check_name(VARIABLE, name, VECTORS)
    return min(VECTORS.index(name), widest)


@functools.cache
def compiled_loop() -> ctypes.CDLL:
    """Declare the functions of cpu_triangle.c; `takes` says whether they were compiled."""
    loop = cpu_loop.compiled_loop()
    assert loop is not None, "takes() has checked"
    problem, pairs = ctypes.POINTER(cpu_loop.Problem), ctypes.POINTER(Pairs)
    size, memory = ctypes.c_int64, ctypes.c_void_p
    loop.supcon_triangle_scratch.argtypes = [problem, size, size]
    loop.supcon_pass_scratch.argtypes = [pairs, size, size]
    loop.supcon_triangle.argtypes = [problem, memory, memory, size, size, size]
    loop.supcon_pass.argtypes = [pairs, memory, memory, size, size, size]
    loop.supcon_triangle_scratch.restype = loop.supcon_pass_scratch.restype = ctypes.c_int64
    loop.supcon_triangle.restype = loop.supcon_vectors.restype = ctypes.c_int64
    loop.supcon_use_large_pages.argtypes = [memory, size]
    loop.supcon_pass.restype = loop.supcon_use_large_pages.restype = None
    return loop
