"""Multiprocessors of the supported GPUs, and the number of warps of a kernel that fit on one."""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024


@dataclass(frozen=True)
class Chip:
    """Limits of a multiprocessor: resident warps and blocks, and bytes of shared memory.

    shared_reserved: bytes of each block's shared memory that the system reserves.
    shared_unit: shared memory is allocated in multiples of this number of bytes.
    """

    warps: int
    blocks: int
    shared: int
    shared_per_block: int
    shared_reserved: int
    shared_unit: int


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; allocation units
# from the occupancy calculator (cuda_occupancy.h of the CUDA toolkit).
CHIPS = {
    70: Chip(64, 32, 96 * KIB, 96 * KIB, 0, 256),
    75: Chip(32, 16, 64 * KIB, 64 * KIB, 0, 256),
    80: Chip(64, 32, 164 * KIB, 163 * KIB, KIB, 128),
    86: Chip(48, 16, 100 * KIB, 99 * KIB, KIB, 128),
    89: Chip(48, 24, 100 * KIB, 99 * KIB, KIB, 128),
    90: Chip(64, 32, 228 * KIB, 227 * KIB, KIB, 128),
    100: Chip(64, 32, 228 * KIB, 227 * KIB, KIB, 128),
}
# The same on all GPUs: four partitions of 16384 registers, allocated to warps in units of 256.
PARTITIONS = 4
REGISTERS_PER_PARTITION = 16384
REGISTER_UNIT = 256
THREADS_PER_WARP = 32


@dataclass(frozen=True)
class Occupancy:
    """Blocks and warps that a multiprocessor holds at once, and the resource that limits them."""

    blocks: int
    warps: int
    limited_by: str


def occupancy(registers: int, shared: int, num_warps: int, capability: int) -> Occupancy:
    """Return the occupancy by registers per thread, shared bytes per block and warps per block."""
    chip = CHIPS[capability]
    warp_registers = round_up(max(registers, 1) * THREADS_PER_WARP, REGISTER_UNIT)
    warps_by_registers = REGISTERS_PER_PARTITION // warp_registers * PARTITIONS
    block_shared = round_up(shared + chip.shared_reserved, chip.shared_unit)
    bounds = {
        "warps": chip.warps // num_warps,
        "blocks": chip.blocks,
        "registers": warps_by_registers // num_warps,
    }
    if shared > 0:
        bounds["shared memory"] = chip.shared // block_shared
    limited_by = min(bounds, key=lambda name: bounds[name])
    blocks = bounds[limited_by]
    return Occupancy(blocks, blocks * num_warps, limited_by)


def round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def kib(number: int) -> str:
    return f"{number / KIB:.1f}".removesuffix(".0")
