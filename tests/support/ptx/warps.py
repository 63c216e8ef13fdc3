"""Instructions of a whole warp: its lanes exchange values, or load matrices together.

Lanes that have diverged must not take part in one: the compiler says that all 32 do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .number_types import Array
from .program import Instruction, PtxError

if TYPE_CHECKING:
    from .machine import Mask, Threads

WARP = 32
REDUCTIONS = {
    "add": np.add, "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip


class AbsentLanes(PtxError):
    """An instruction of a whole warp, which some of its lanes do not reach."""


def check_whole_warps(mask: Mask, by: Instruction) -> None:
    if mask is not None:
        lanes = mask.reshape(-1, WARP)
        if (lanes.any(1) != lanes.all(1)).any():
            raise AbsentLanes(f"lanes of a warp are absent: {by}")


def shuffle(mode: str, value: Array, lane: Array, clamp: Array) -> Array:
    """shfl.sync: each lane's new value is that of another lane of its warp, or of its segment."""
    thread = np.arange(len(value))
    own = thread % WARP
    by, clamp = lane.astype(np.int64), clamp.astype(np.int64)
    segment, limit = clamp >> 8 & 31, clamp & 31
    last = own & segment | limit & ~segment
    source = {
        "bfly": own ^ by,
        "up": own - by,
        "down": own + by,
        "idx": own & segment | by & ~segment & 31,
    }[mode]
    inside = source >= last if mode == "up" else source <= last
    return value[thread - own + np.where(inside, source, own)]


def reduce(operation: str, value: Array) -> Array:
    """redux.sync: every lane gets the sum, minimum, … of its warp."""
    by_warp = value.reshape(-1, WARP)
    return REDUCTIONS[operation].reduce(by_warp, 1, dtype=value.dtype).repeat(WARP)


def load_matrices(
    threads: Threads, address: Array, count: int, transposed: bool, mask: Mask, by: Instruction
) -> list[Array]:
    """ldmatrix: matrices of 8 x 8 16-bit numbers; lane 8 k + r has the address of row r of k."""
    num_warps = threads.total // WARP
    holds_address = np.arange(threads.total) % WARP < 8 * count
    rows = threads.load("shared", address, 4, 4, both(mask, holds_address), by)
    table = np.zeros((threads.total, 4), np.uint32)
    table[holds_address if mask is None else holds_address & mask] = rows
    table = np.ascontiguousarray(table.reshape(num_warps, WARP, 4)[:, : 8 * count])
    matrices = table.view(np.uint16).reshape(num_warps, count, 8, 8)
    if transposed:
        matrices = matrices.swapaxes(2, 3)
    # Lane l gets elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4.
    pairs = np.ascontiguousarray(matrices).view(np.uint32).reshape(num_warps, count, WARP)
    return [np.ascontiguousarray(pairs[:, place]).ravel() for place in range(count)]


def both(mask: Mask, other: Array) -> Array:
    return other if mask is None else other & mask
