"""Threads of a launch: their control flow and barriers.

All threads of some blocks run together: one basic block of the program at a time, a register being
an array with an element per thread. Where they diverge, those that are furthest behind in the
program go on and the others wait. GPUs since Volta may choose that order; nothing but barriers and
instructions of a warp orders threads, and both are waited for. The threads of a warp are taken to
be in step between two divergences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .counts import Counts
from .memory import POISON, GlobalMemory, SharedMemory
from .number_types import Array, bits_of
from .program import Block, Instruction, PtxError
from .sm_80 import Copy
from .translation import Code
from .warps import WARP

# The threads that take part, None for all of them.
Mask = Array | None

# Threads that run together: enough for NumPy to be busy, and so few that caches hold registers.
BATCH = 4096


class Deadlock(PtxError):
    """Threads wait at a barrier for others that never come."""


@dataclass
class Launch:
    """A launch of a kernel.

    shared: bytes of shared memory of a block. parameters: the bytes of each. extents: start and
    end of the tensors that it may access. errors: approximate functions have errors of the size
    that the ISA allows. counts_accesses: `counts` includes memory accesses, which takes time.
    """

    code: Code
    grid: tuple[int, int, int]
    shared: int
    parameters: Sequence[bytes]
    extents: Sequence[tuple[int, int]]
    errors: bool = False
    counts_accesses: bool = False
    counts: Counts = field(default_factory=Counts)

    def run(self) -> Counts:
        num_blocks = self.grid[0] * self.grid[1] * self.grid[2]
        program = self.code.program
        memory = GlobalMemory(self.extents, program.granularity["global"])
        batch = max(1, BATCH // program.threads)
        with np.errstate(all="ignore"):
            for first in range(0, num_blocks, batch):
                last = min(first + batch, num_blocks)
                Threads(self, memory, np.arange(first, last)).run()
        self.counts.blocks += num_blocks
        return self.counts


class Threads:
    """The threads of some blocks of a launch.

    block: of each thread, the number of its block in this batch. who: as in `memory.History`.
    copies: of each block, the asynchronous copies under way, by group, the open group last.
    place: the number of the basic block at which all threads are, or an array where they differ.
    waiting: the threads that are at a barrier, while threads are at different places.
    """

    def __init__(self, launch: Launch, memory: GlobalMemory, blocks: Array) -> None:
        self.launch, self.memory = launch, memory
        program = launch.code.program
        size, num_blocks = program.threads, len(blocks)
        self.total = size * num_blocks
        self.block = np.arange(num_blocks).repeat(size)
        thread = np.tile(np.arange(size), num_blocks)
        x, y, z = launch.grid
        number = blocks.repeat(size)
        special = {
            "tid.x": thread, "tid.y": 0, "tid.z": 0, "laneid": thread % WARP, "ntid.x": size,
            "ctaid.x": number % x, "ctaid.y": number // x % y, "ctaid.z": number // (x * y),
            "nctaid.x": x, "nctaid.y": y, "nctaid.z": z,
        }  # fmt: skip
        self.special = {f"%{name}": self.full(np.uint32(value)) for name, value in special.items()}
        self.shared = SharedMemory(num_blocks, launch.shared, program.granularity["shared"])
        self.registers = [self.full(self.unset(kind)) for kind in launch.code.registers]
        self.copies: list[list[list[Copy]]] = [[[]] for _ in blocks]
        self.epoch = np.zeros(num_blocks, np.int64)
        self.warp_of_block = (number + 1).astype(np.int64) << 40 | thread // WARP + 1
        self.who = self.warp_of_block
        self.end = len(program.blocks)
        self.place: Any = 0
        self.waiting = np.zeros(self.total, bool)

    @staticmethod
    def unset(kind: str) -> Array:
        bits = bits_of(kind)
        return bits(False) if kind == "pred" else bits(POISON[bits().itemsize])

    # Control flow

    def run(self) -> None:
        code, counts = self.launch.code, self.launch.counts
        while (found := self.next_place()) is not None:
            place, mask = found
            block = code.program.blocks[place]
            for step in code.steps[place]:
                step(self, mask)
            counts.count_block(block, self.num_warps(mask))
            self.go_on(block, self.following(place, block, mask), mask)

    def next_place(self) -> tuple[int, Mask] | None:
        """The basic block to run next, and for which threads; None when all have ended."""
        if isinstance(self.place, int):
            return None if self.place == self.end else (self.place, None)
        ready = ~self.waiting & (self.place != self.end)
        if not ready.any():
            if self.waiting.any():
                self.fail_at_barrier("wait for threads that have ended")
            return None
        place = int(self.place[ready].min())
        return place, ready & (self.place == place)

    def following(self, place: int, block: Block, mask: Mask) -> Any:
        """The basic block that comes next: one number, or one for each thread."""
        decide = self.launch.code.decide[place]
        if block.ending == "exit":
            return self.end
        if block.ending == "table":
            assert decide is not None
            index = np.minimum(decide(self), len(block.targets) - 1)
            return one_if_equal(np.array(block.targets)[index], mask)
        if block.ending != "branch":
            return place + 1
        if decide is None:
            return block.targets[0]
        return one_if_equal(np.where(decide(self), block.targets[0], place + 1), mask)

    def go_on(self, block: Block, following: Any, mask: Mask) -> None:
        if mask is None and isinstance(following, int):
            self.place = following
            if block.ending == "barrier":
                self.pass_barrier(np.ones(len(self.epoch), bool))
            return
        self.place = np.where(True if mask is None else mask, following, self.place)
        if block.ending == "barrier":
            self.waiting = self.waiting | mask
            self.release()
        if not self.waiting.any():
            self.place = one_if_equal(self.place, None)

    def release(self) -> None:
        """Blocks all of whose threads wait go on."""
        waiting = self.waiting.reshape(len(self.epoch), -1)
        complete = waiting.all(1)
        places = np.broadcast_to(self.place, self.total).reshape(waiting.shape)[complete]
        if (places != places[:, :1]).any():
            self.fail_at_barrier("are at different barriers")
        self.waiting = (waiting & ~complete[:, None]).ravel()
        self.pass_barrier(complete)

    def pass_barrier(self, blocks: Array) -> None:
        self.epoch = self.epoch + blocks
        self.who = self.warp_of_block | (self.epoch[self.block] << 8)
        self.launch.counts.barriers += int(blocks.sum())
        if blocks.all():
            self.shared.region.history.forget()

    def fail_at_barrier(self, what: str) -> None:
        places = np.broadcast_to(self.place, self.total)[self.waiting]
        blocks = self.launch.code.program.blocks
        barriers = {str(blocks[place - 1].last) for place in places}
        raise Deadlock(f"threads of a block {what}: {'; '.join(sorted(barriers))}")

    def num_warps(self, mask: Mask) -> int:
        if mask is None:
            return self.total // WARP
        return int(mask.reshape(-1, WARP).any(1).sum())

    # Values

    def full(self, value: Array) -> Array:
        """An element for each thread."""
        return value if np.ndim(value) else np.full(self.total, value)

    def parameter(self, index: int, dtype: Any) -> Array:
        return np.frombuffer(self.launch.parameters[index], dtype)[0]

    def disturb(self, value: Array, relative_error: float) -> Array:
        """With errors of up to this size, if they are asked for: the same for the same value."""
        if not self.launch.errors:
            return value
        bits = value.view(np.uint32) * np.uint32(2654435761)
        bits = (bits ^ (bits >> np.uint32(15))) * np.uint32(2246822519)
        error = (bits ^ (bits >> np.uint32(13))) / 2.0**31 - 1
        return (value.astype(np.float64) * (1 + relative_error * error)).astype(value.dtype)

    # Memory

    def load(
        self, space: str, address: Array, width: int, count: int, mask: Mask, by: Instruction
    ) -> Array:
        """Vectors [N, count] of numbers of `width` bytes, for the threads of the mask."""
        thread, address = self.accessing(space, address, width * count, mask, True)
        if space == "shared":
            offset = self.shared.offset(address, self.block[thread], width * count, by)
            return self.shared.region.read(offset, width, count, self.who[thread], by)
        parts = list(self.memory.offsets(address, width * count, by))
        if len(parts) == 1:
            region, offset, _ = parts[0]
            return region.read(offset, width, count, self.who[thread], by)
        found = np.zeros((len(address), count), bits_of(f"b{8 * width}"))
        for region, offset, places in parts:
            found[places] = region.read(offset, width, count, self.who[thread][places], by)
        return found

    def store(
        self, space: str, address: Array, values: Array, mask: Mask, by: Instruction,
        *, is_counted: bool = True,
    ) -> None:  # fmt: skip
        """Vectors [total, count], of which those of the mask are written."""
        size = values.shape[1] * values.dtype.itemsize
        thread, address = self.accessing(space, address, size, mask, is_counted)
        values = values[thread]
        if space == "shared":
            offset = self.shared.offset(address, self.block[thread], size, by)
            self.shared.region.write(offset, values, self.who[thread], by)
            return
        for region, offset, places in self.memory.offsets(address, size, by):
            region.write(offset, values[places], self.who[thread][places], by)

    def accessing(
        self, space: str, address: Array, size: int, mask: Mask, is_counted: bool
    ) -> tuple[Any, Array]:
        """The threads of the mask, and their addresses."""
        thread: Any = slice(None)
        if mask is not None:
            thread = np.flatnonzero(mask)
            address = address[thread]
        if self.launch.counts_accesses and is_counted:
            numbers = np.arange(self.total)[thread]
            count = self.launch.counts.count_passes if space == "shared" else None
            (count or self.launch.counts.count_sectors)(numbers, address, size)
        return thread, address


def one_if_equal(numbers: Array, mask: Mask) -> Any:
    """The number, where it is the same for all threads of the mask."""
    some = numbers if mask is None else numbers[mask]
    return int(some[0]) if (some == some[0]).all() else numbers
