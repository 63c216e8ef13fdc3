"""Instructions that compute capability 8.0 brought: asynchronous copies and matrix products."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .memory import POISON
from .number_types import Array
from .operations import from_bfloat16
from .program import Instruction, PtxError, elements
from .warps import WARP, check_whole_warps

if TYPE_CHECKING:
    from .machine import Mask, Threads
    from .translation import Step, Translator

# Element types of a product, and the k of m16n8k for which there is an instruction here.
SHAPES = {"tf32": 8, "f16": 16, "bf16": 16}


# Asynchronous copies


@dataclass(frozen=True)
class Copy:
    """A copy under way: the threads that wait for it, where it goes, and numbers [N, count]."""

    mask: Array
    to: Array
    values: Array
    by: Instruction


def copy_step(translator: Translator, instruction: Instruction) -> Step | None:
    """cp.async."""
    if "commit_group" in instruction.suffixes:
        return lambda threads, mask: commit(threads, mask, instruction)
    if "wait_group" in instruction.suffixes:
        num_left = int(instruction.operands[0])
        return lambda threads, mask: wait(threads, num_left, mask, instruction)
    if instruction.suffixes[0] != "async" or instruction.suffixes[-1] != "global":
        return None
    to = translator.address(instruction.operands[0], "shared")
    source = translator.address(instruction.operands[1], "global")
    size = int(instruction.operands[2], 0)
    # Bytes that are read; zeros fill the rest.
    num_read = translator.read((*instruction.operands, str(size))[3], "u32")

    def run(threads: Threads, mask: Mask) -> None:
        read = threads.full(num_read(threads))
        start(threads, to(threads), source(threads), size, read, mask, instruction)

    return run


def start(
    threads: Threads, to: Array, source: Array, size: int, num_read: Array, mask: Mask,
    by: Instruction,
) -> None:  # fmt: skip
    """The target is poison until the thread has waited, for the data may appear at any time."""
    mask = np.ones(threads.total, bool) if mask is None else mask
    reads = mask & (num_read == size)
    if (mask & ~reads & (num_read != 0)).any():
        raise PtxError(f"a copy of a part: {by}")
    values = np.zeros((threads.total, size // 4), np.uint32)
    if reads.any():
        values[reads] = threads.load("global", source, 4, size // 4, reads, by)
    poison = np.full_like(values, POISON[4])
    threads.store("shared", to, poison, mask, by, is_counted=False)
    for block, groups in enumerate(threads.copies):
        mine = mask & (threads.block == block)
        if mine.any():
            groups[-1].append(Copy(mine, to, values, by))


def blocks_of(threads: Threads, mask: Mask, by: Instruction) -> Array:
    """The blocks of a mask, which must have all of their threads in it."""
    if mask is None:
        return range(len(threads.copies))
    by_block = mask.reshape(len(threads.copies), -1)
    if (by_block.any(1) != by_block.all(1)).any():
        raise PtxError(f"threads of a block have diverged: {by}")
    return np.flatnonzero(by_block.any(1))


def commit(threads: Threads, mask: Mask, by: Instruction) -> None:
    for block in blocks_of(threads, mask, by):
        threads.copies[block].append([])


def wait(threads: Threads, num_left: int, mask: Mask, by: Instruction) -> None:
    """Wait until at most the last `num_left` groups are under way."""
    for block in blocks_of(threads, mask, by):
        groups = threads.copies[block]
        while len(groups) - 1 > num_left:
            for each in groups.pop(0):
                threads.store("shared", each.to, each.values, each.mask, each.by)


# Matrix products


def multiply_step(translator: Translator, instruction: Instruction) -> Step | None:
    """mma.sync of m16n8k8 and m16n8k16 with float32 sums."""
    found = re.fullmatch(
        r"mma\.sync\.aligned\.m16n8k(\d+)\.row\.col\.f32\.(\w+)\.\2\.f32", instruction.opcode
    )
    if found is None or SHAPES.get(found[2]) != int(found[1]):
        return None
    kind = found[2]
    target, *operands = (elements(operand) for operand in instruction.operands)
    puts = [translator.write(name, "f32") for name in target]
    sources = [
        [translator.read(name, held) for name in names]
        for names, held in zip(operands, ("b32", "b32", "f32"), strict=True)
    ]

    def run(threads: Threads, mask: Mask) -> None:
        check_whole_warps(mask, instruction)
        a, b, c = ([threads.full(read(threads)) for read in reads] for reads in sources)
        for put, value in zip(puts, multiply(a, b, c, SHAPES[kind], kind), strict=True):
            put(threads, value, mask)

    return run


def multiply(a: list[Array], b: list[Array], c: list[Array], k: int, kind: str) -> list[Array]:
    """a [16, k] b [k, 8] + c [16, 8] of each warp, whose lanes hold parts of the matrices.

    Products and sums are float64's, in order of k, and rounded once; hardware keeps fewer digits.
    """
    num_warps = len(a[0]) // WARP
    group, place = np.arange(WARP) // 4, np.arange(WARP) % 4
    per_register = 1 if kind == "tf32" else 2

    def numbers(bits: Array) -> Array:
        """[warps, lanes, numbers in a register]."""
        if kind == "tf32":
            # The unit ignores the lower 13 bits.
            values = (bits & np.uint32(0xFFFFE000)).view(np.float32)
        else:
            halves = np.ascontiguousarray(bits).view(np.uint16)
            values = from_bfloat16(halves) if kind == "bf16" else halves.view(np.float16)
        return values.astype(np.float64).reshape(num_warps, WARP, per_register)

    left, right = np.zeros((num_warps, 16, k)), np.zeros((num_warps, k, 8))
    for index, bits in enumerate(a):
        values = numbers(bits)
        for part in range(per_register):
            column = place * per_register + part + 4 * per_register * (index // 2)
            left[:, group + 8 * (index % 2), column] = values[..., part]
    for index, bits in enumerate(b):
        values = numbers(bits)
        for part in range(per_register):
            row = place * per_register + part + 4 * per_register * index
            right[:, row, group] = values[..., part]
    total = np.zeros((num_warps, 16, 8))
    places = [(group + 8 * (index // 2), 2 * place + index % 2) for index in range(4)]
    for (row, column), values in zip(places, c, strict=True):
        total[:, row, column] = values.reshape(num_warps, WARP)
    for step in range(k):
        total += left[:, :, step, None] * right[:, None, step]
    return [total[:, row, column].astype(np.float32).ravel() for row, column in places]


STEPS = {"cp": copy_step, "mma": multiply_step}
