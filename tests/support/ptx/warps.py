"""Instructions of a whole warp: its lanes exchange values, or load matrices together.

Lanes that have diverged must not take part in one: the compiler says that all 32 do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .number_types import Array
from .program import Instruction, PtxError, elements

if TYPE_CHECKING:
    from .machine import Mask, Threads
    from .translation import Step, Translator

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


def shuffle(translator: Translator, instruction: Instruction) -> Step | None:
    """shfl.sync."""
    sync, mode, kind = instruction.suffixes
    target, *operands = instruction.operands
    if sync != "sync" or "|" in target or operands[3] != "-1":
        return None
    put = translator.write(target, kind)
    sources = [translator.read(operand, "b32") for operand in operands[:3]]

    def run(threads: Threads, mask: Mask) -> None:
        check_whole_warps(mask, instruction)
        put(threads, shuffled(mode, *(threads.full(source(threads)) for source in sources)), mask)

    return run


def shuffled(mode: str, value: Array, lane: Array, clamp: Array) -> Array:
    """Each lane's new value is that of another lane of its warp, or of its segment of it."""
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


def reduce(translator: Translator, instruction: Instruction) -> Step:
    """redux.sync: every lane gets the sum, minimum, … of its warp."""
    _, mode, kind = instruction.suffixes
    put = translator.write(instruction.operands[0], kind)
    source = translator.read(instruction.operands[1], kind)
    function = REDUCTIONS[mode]

    def run(threads: Threads, mask: Mask) -> None:
        check_whole_warps(mask, instruction)
        by_warp = source(threads).reshape(-1, WARP)
        put(threads, function.reduce(by_warp, 1, dtype=by_warp.dtype).repeat(WARP), mask)

    return run


def wait_for_warp(translator: Translator, instruction: Instruction) -> Step:
    """bar.warp.sync."""
    return lambda threads, mask: check_whole_warps(mask, instruction)


def load_matrices(translator: Translator, instruction: Instruction) -> Step:
    """ldmatrix: matrices of 8 x 8 16-bit numbers; lane 8 k + r has the address of row r of k."""
    puts = [translator.write(name, "b32") for name in elements(instruction.operands[0])]
    address = translator.address(instruction.operands[1], "shared")
    count, transposed = len(puts), "trans" in instruction.suffixes

    def run(threads: Threads, mask: Mask) -> None:
        check_whole_warps(mask, instruction)
        reads = np.arange(threads.total) % WARP < 8 * count
        if mask is not None:
            reads &= mask
        table = np.zeros((threads.total, 4), np.uint32)
        table[reads] = threads.load("shared", address(threads), 4, 4, reads, instruction)
        table = np.ascontiguousarray(table.reshape(-1, WARP, 4)[:, : 8 * count])
        matrices = table.view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        # Lane l gets elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4.
        pairs = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1, count, WARP)
        for place, put in enumerate(puts):
            put(threads, pairs[:, place].ravel(), mask)

    return run


STEPS = {
    "shfl": shuffle, "redux": reduce, "bar": wait_for_warp, "ldmatrix": load_matrices,
}  # fmt: skip
