"""A model of GPUs: cycles of a multiprocessor's units for a kernel's counts, and their floor.

Cycles are those of one multiprocessor that does all the work of a launch, each unit at its peak
rate. They are no times: waiting, launching and clocks are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from ptx.counts import Counts

from .cases import Case, Work

# The same on these GPUs, by the CUDA C++ Programming Guide: warps that a multiprocessor issues for,
# and whose special functions it computes, in a cycle; bytes of its first cache.
ISSUED_WARPS = 4
SPECIAL_WARPS = 0.5
CACHE_BYTES = 128
SECTOR = 32
WARP = 32
# Multiply-adds of one mma instruction: m16n8k16, and m16n8k8 for tf32, of which a float32 product
# takes three.
MMA_HALF = 16 * 8 * 16
MMA_FLOAT = 16 * 8 * 8 / 3


@dataclass(frozen=True)
class Chip:
    """A GPU by its data sheet.

    fp32_warps: warps that the fp32 pipe serves in a cycle. mma_cycles: of a multiprocessor, for one
    mma instruction; 0 where Triton reaches no matrix unit.
    """

    name: str
    multiprocessors: int
    gigahertz: float
    gigabytes_per_second: float
    fp32_warps: int
    mma_cycles: int

    @property
    def bytes_per_cycle(self) -> float:
        """A multiprocessor's share of the memory bandwidth."""
        return self.gigabytes_per_second / (self.multiprocessors * self.gigahertz)


# NVIDIA's data sheets and architecture white papers: Volta, Turing, Ampere, Ada.
CHIPS = {
    70: Chip("V100 (SXM2)", 80, 1.53, 900, 2, 0),
    75: Chip("T4", 40, 1.59, 320, 2, 0),
    80: Chip("A100 (SXM4, 40 GB)", 108, 1.41, 1555, 2, 2),
    89: Chip("L4", 58, 2.04, 300, 4, 4),
}


def unit_cycles(counts: Counts, least: Work, chip: Chip) -> dict[str, float]:
    """Cycles of each unit for a kernel's counts; shared memory by the larger number of passes."""
    rate = chip.bytes_per_cycle if least.bytes else CACHE_BYTES
    return {
        "issue": counts.instructions / ISSUED_WARPS,
        "fp32": counts.fp32 / chip.fp32_warps,
        "special functions": counts.special / SPECIAL_WARPS,
        "shared memory": counts.shared_passes,
        "matrix unit": counts.matrix * chip.mma_cycles,
        "memory" if least.bytes else "first cache": counts.global_sectors * SECTOR / rate,
    }


def floor_cycles(least: Work, chip: Chip) -> dict[str, float]:
    """Cycles of each unit for the least work of the formulas."""
    if chip.mma_cycles:
        per_mma = MMA_HALF if least.dtype == torch.float16 else MMA_FLOAT
        products = {"matrix unit": least.multiply_adds / per_mma * chip.mma_cycles}
    else:
        products = {"fp32": least.multiply_adds / (WARP * chip.fp32_warps)}
    return {
        **products,
        "special functions": least.exponentials / (WARP * SPECIAL_WARPS),
        "memory": least.bytes / chip.bytes_per_cycle,
    }


def largest(cycles: Mapping[str, float]) -> tuple[str, float]:
    unit = max(cycles, key=lambda name: cycles[name])
    return unit, cycles[unit]


def tables(accepted: Mapping[str, Mapping[str, Mapping[str, int]]], cases: list[Case]) -> str:
    """A Markdown table for each GPU, from counts by compute capability and kernel."""
    lines = []
    for capability, chip in CHIPS.items():
        lines += [
            f"### {chip.name}, code for sm_{capability}", "",
            "| kernel | case | busiest unit, by counts | cycles | floor of the formulas | cycles "
            "| ratio |",
            "|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        found = accepted[f"sm_{capability}"]
        for case in cases:
            for kernel, least in case.least.items():
                record = found.get(f"{kernel}, {case.name}")
                if record is None:
                    continue
                unit, cycles = largest(unit_cycles(Counts(**record), least, chip))
                floor_unit, floor = largest(floor_cycles(least, chip))
                lines.append(
                    f"| {kernel.removesuffix('_kernel')} | {case.name} | {unit} | {cycles:,.0f} "
                    f"| {floor_unit} | {floor:,.0f} | {cycles / floor:.1f} |"
                )
        lines.append("")
    return "\n".join(lines)
