"""Memory of a launch, which refuses a wrong access."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .number_types import UNSIGNED, Array
from .program import Instruction, PtxError

# A NaN in float16, bfloat16, float32 and float64, and a large integer.
POISON = {2: 0x7FDA, 4: 0x7FDA7FDA, 8: 0x7FDA7FDA7FDA7FDA}


class OutOfBounds(PtxError):
    """An access outside the tensors of a launch, or outside a block's shared memory."""


class Misaligned(PtxError):
    """An access to an address that is no multiple of its size."""


class Uninitialized(PtxError):
    """A read of memory that nobody has written."""


class Race(PtxError):
    """Two warps access an address without a barrier in between, and one changes it."""


class History:
    """The last writer and the last reader of each unit of a region, to find races.

    An access is noted as block << 40 | number of barriers passed << 8 | warp, blocks and warps
    counted from 1. Two accesses are ordered if they are of the same warp, or of the same block with
    a barrier in between: blocks of a launch do not wait for each other.
    """

    MANY_WARPS = 255
    MANY_BLOCKS = -1

    def __init__(self, num_units: int) -> None:
        self.writer = np.zeros(num_units, np.int64)
        self.reader = np.zeros(num_units, np.int64)
        self.has_writes = False
        # Reads not yet in `reader`: they matter only to a later write.
        self.new_reads: list[tuple[Array, Array]] = []

    @staticmethod
    def unordered(noted: Array, now: Array) -> Array:
        other_block = noted >> 40 != now >> 40
        same_time = noted >> 8 == now >> 8
        return (noted != 0) & (other_block | (same_time & (noted != now)))

    def read(self, units: Array, who: Array) -> bool:
        """Notes a read; whether it races with a write. units [N, k], who [N, 1]."""
        self.new_reads.append((units, who))
        if len(self.new_reads) > 64:
            self.note_reads()
        return self.has_writes and bool(self.unordered(self.writer[units], who).any())

    def note_reads(self) -> None:
        for units, who in self.new_reads:
            before = self.reader[units]
            self.reader[units] = merged = self.merge(before, who)
            # Where several warps read a unit in one instruction, one of them has been noted.
            noted = self.reader[units]
            lost = noted != merged
            if lost.any():
                self.reader[units[lost]] = self.merge(noted, who)[lost]
        self.new_reads.clear()

    def merge(self, before: Array, who: Array) -> Array:
        others = (before >> 8 == who >> 8) & (before != who)
        merged = np.where(others, who | self.MANY_WARPS, who)
        return np.where((before != 0) & (before >> 40 != who >> 40), self.MANY_BLOCKS, merged)

    def write(self, units: Array, who: Array, changes: Array) -> bool:
        """Notes a write; whether it races. changes [N, 1]: what is written differs."""
        self.note_reads()
        self.has_writes = True
        writer = self.writer[units]
        races = self.unordered(self.reader[units], who) | self.unordered(writer, who)
        self.writer[units] = np.where(changes | (writer == 0), who, writer)
        return bool((races & changes).any())

    def forget(self) -> None:
        """All threads have passed a barrier, and no other block has access."""
        self.new_reads.clear()
        self.has_writes = False


class Region:
    """Bytes from address `start` up to `end`; the array `data` begins at a multiple of 16."""

    def __init__(self, start: int, end: int, data: Array, unit: int) -> None:
        self.start, self.end, self.data, self.unit = start, end, data, unit
        self.base = start // 16 * 16
        self.history = History(len(data) // unit)

    def rows(self, width: int, count: int) -> Array:
        """The memory as a table whose rows are vectors of `count` numbers of `width` bytes."""
        return self.data.view(UNSIGNED[width]).reshape(-1, count)

    def units(self, offset: Array, size: int) -> Array:
        first = offset // self.unit
        return first[:, None] + np.arange(max(1, size // self.unit))

    def read(self, offset: Array, width: int, count: int, who: Array, by: Instruction) -> Array:
        """Numbers [N, count]."""
        size = width * count
        values = self.rows(width, count)[offset // size]
        if width > 1 and (values == POISON[width]).any():
            raise Uninitialized(f"uninitialised memory is read: {by}")
        if self.history.read(self.units(offset, size), who[:, None]):
            raise Race(f"another warp has written this since the last barrier: {by}")
        return values

    def write(self, offset: Array, values: Array, who: Array, by: Instruction) -> None:
        """values [N, count]."""
        width, count = values.dtype.itemsize, values.shape[1]
        size = width * count
        table, row = self.rows(width, count), offset // size
        changes = (table[row] != values).any(1, keepdims=True)
        table[row] = values
        if (table[row] != values).any():
            raise Race(f"threads write different values to one address: {by}")
        if self.history.write(self.units(offset, size), who[:, None], changes):
            raise Race(f"another warp has accessed this since the last barrier: {by}")


class GlobalMemory:
    """The tensors that a launch may access."""

    def __init__(self, extents: Sequence[tuple[int, int]], unit: int) -> None:
        self.regions = [
            Region(start, end, borrow(start, end), unit) for start, end in merge(extents)
        ]
        self.starts = np.array([region.start for region in self.regions], np.uint64)

    def find(self, address: Array, size: int, by: Instruction) -> Iterator[tuple[Region, Any]]:
        """The regions of these addresses, each with the places of the addresses in it."""
        check_alignment(address, size, by)
        last = np.searchsorted(self.starts, address, "right") - 1
        for index in range(int(last.min()), int(last.max()) + 1):
            here = last == index
            if not here.any():
                continue
            beyond = address[here].max() + np.uint64(size)
            if index < 0 or beyond > self.regions[index].end:
                nearest = self.regions[max(0, index)]
                raise OutOfBounds(
                    f"{size} bytes are accessed up to {int(beyond):#x}, and the nearest tensor "
                    f"lies from {nearest.start:#x} to {nearest.end:#x}: {by}"
                    if self.regions
                    else f"there is no tensor to access: {by}"
                )
            yield self.regions[index], slice(None) if here.all() else np.flatnonzero(here)

    def offsets(
        self, address: Array, size: int, by: Instruction
    ) -> Iterator[tuple[Region, Array, Any]]:
        for region, places in self.find(address, size, by):
            yield region, (address[places] - np.uint64(region.base)).astype(np.int64), places


class SharedMemory:
    """The shared memory of several blocks of threads, one after the other."""

    def __init__(self, num_blocks: int, size: int, unit: int) -> None:
        self.size, self.stride = size, -(-max(size, 16) // 16) * 16
        data = np.full(num_blocks * self.stride // 2, POISON[2], np.uint16).view(np.uint8)
        self.region = Region(0, len(data), data, unit)

    def offset(self, address: Array, block: Array, size: int, by: Instruction) -> Array:
        """Places in `region` of addresses in the blocks' own memory."""
        check_alignment(address, size, by)
        address = address.astype(np.int64)
        if address.max() + size > self.size:
            raise OutOfBounds(
                f"{size} bytes are accessed at {address.max()}, and the block has {self.size} "
                f"bytes of shared memory: {by}"
            )
        return address + block * self.stride


def check_alignment(address: Array, size: int, by: Instruction) -> None:
    if (address % address.dtype.type(size)).any():
        raise Misaligned(f"{size} bytes are accessed at an address that is no multiple: {by}")


def merge(extents: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Overlapping extents as one."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(extent for extent in extents if extent[1] > extent[0]):
        if merged and start < merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def borrow(start: int, end: int) -> Array:
    """The memory of this process from `start` to `end`, rounded to multiples of 16."""
    base, stop = start // 16 * 16, -(-end // 16) * 16
    return np.frombuffer((ctypes.c_uint8 * (stop - base)).from_address(base), np.uint8)
