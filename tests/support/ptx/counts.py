"""The work of the launches of a kernel, by unit of a multiprocessor."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from .number_types import Array
from .program import Block, Instruction
from .warps import WARP

NUM_BANKS = 32
SPECIAL_FUNCTIONS = {"ex2", "lg2", "sin", "cos", "rcp", "sqrt", "rsqrt", "tanh"}
FP32_PIPE = {"fma", "add", "sub", "mul"}


@dataclass
class Counts:
    """Sums over all warps and launches of a kernel.

    instructions, fma, fp32, special, matrix: instructions issued to warps: all, fused multiply-adds
        in float32, all on the fp32 pipe, special functions, matrix products.
    barriers: passed by blocks.
    shared_passes: cycles of shared memory (32 banks of 4 bytes), a warp's accesses of 8 and 16
        bytes taken in 2 and 4 parts; least_shared_passes: if the parts were taken together. An
        architecture lies between the two where lanes of different parts read the same words.
    global_sectors: pieces of 32 bytes that warps read from global memory or write to it.
    """

    blocks: int = 0
    instructions: int = 0
    fma: int = 0
    fp32: int = 0
    special: int = 0
    matrix: int = 0
    barriers: int = 0
    shared_passes: int = 0
    least_shared_passes: int = 0
    global_sectors: int = 0

    def __add__(self, other: Counts) -> Counts:
        names = [field.name for field in fields(self)]
        return Counts(**{name: getattr(self, name) + getattr(other, name) for name in names})

    def count_block(self, block: Block, num_warps: int) -> None:
        """A basic block that so many warps have run."""
        issued = [*block.instructions, *([block.last] if block.last else [])]
        self.instructions += num_warps * len(issued)
        self.fma += num_warps * sum(each.opcode in FMA_OPCODES for each in issued)
        self.fp32 += num_warps * sum(
            each.name in FP32_PIPE and each.suffixes[-1] == "f32" for each in issued
        )
        self.special += num_warps * sum(map(is_special, issued))
        self.matrix += num_warps * sum(each.name == "mma" for each in issued)

    def count_sectors(self, thread: Array, address: Array, size: int) -> None:
        """An access to global memory by these threads."""
        first, last = ((address.astype(np.int64) + distance) // 32 for distance in (0, size - 1))
        warp = thread // WARP
        sectors = np.concatenate([warp << 48 | first, warp << 48 | last])
        self.global_sectors += len(np.unique(sectors))

    def count_passes(self, thread: Array, address: Array, size: int) -> None:
        """An access to shared memory: as many passes as words of one bank, the worst bank's."""
        num_words = max(1, size // 4)
        words = (address.astype(np.int64)[:, None] // 4 + np.arange(num_words)).ravel()
        self.shared_passes += num_passes(thread // (WARP // num_words), words, num_words)
        self.least_shared_passes += num_passes(thread // WARP, words, num_words)


FMA_OPCODES = {"fma.rn.f32", "fma.rn.ftz.f32"}


def is_special(instruction: Instruction) -> bool:
    """Computed by the special function unit: a division in float32 has a reciprocal."""
    approximate = {"approx", "full"} & set(instruction.suffixes)
    return bool(approximate) and instruction.name in SPECIAL_FUNCTIONS | {"div"}


def num_passes(group: Array, words: Array, num_words: int) -> int:
    """Summed over groups of threads that are served together."""
    # A word is read once for all lanes of a group.
    accesses = np.unique(np.repeat(group.astype(np.int64), num_words) << 32 | words)
    banks, num_accesses = np.unique(
        (accesses >> 32) * NUM_BANKS + accesses % NUM_BANKS, return_counts=True
    )
    starts = np.flatnonzero(np.diff(banks // NUM_BANKS, prepend=-1))
    return int(np.maximum.reduceat(num_accesses, starts).sum())
