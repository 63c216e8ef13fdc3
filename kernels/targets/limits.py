"""Limits of resources that every compiled kernel must keep."""

from __future__ import annotations

from ..support.machine import triton_version
from .chips import CHIPS, kib
from .compilation import Outcome, Task

# An older assembler may not know GPUs from this compute capability on; the table then says so.
MAY_BE_UNKNOWN = 100
# Major and minor version up to which products wait for each other through no fault of a kernel.
SERIALIZING_TRITON = (3, 3)


def is_unknown(task: Task, outcome: Outcome) -> bool:
    """Return whether the assembler does not know this GPU yet."""
    return (
        task.capability >= MAY_BE_UNKNOWN
        and isinstance(outcome, str)
        and "is not defined for option 'gpu-name'" in outcome
    )


def triton_serializes() -> bool:
    """Return whether this Triton itself puts sums aside between two products of a loop.

    Version 3.3.1 does so in every backward pass in float16 for 9.0, whatever the tile: those
    kernels run, and not as fast as with the other versions that were tried (3.7.1, 3.9.0).
    """
    found = triton_version()
    return found is not None and found <= SERIALIZING_TRITON


def find_failures(task: Task, outcome: Outcome, *, keep_exceptions: bool) -> list[str]:
    """List the limits that a variant breaks, each with a remedy."""
    if isinstance(outcome, str):
        if is_unknown(task, outcome):
            return []
        return [
            f"does not compile: {outcome}. Change the kernel, or ship no such variant for "
            f"sm_{task.capability}"
        ]
    failures = []
    variant = task.variant
    if outcome.spilled > 0 and variant.spills_because is None:
        failures.append(
            f"spills {outcome.spilled} bytes per thread: take smaller blocks or more warps, or "
            "give the measurement that justifies it in spills_because"
        )
    if outcome.spilled == 0 and variant.spills_because is not None and not keep_exceptions:
        failures.append("has a spills_because and does not spill: remove it")
    limit = CHIPS[task.capability].shared_per_block
    if outcome.shared > limit:
        failures.append(
            f"needs {kib(outcome.shared)} KiB of shared memory, and a block has at most "
            f"{kib(limit)}: take smaller blocks or fewer stages"
        )
    if outcome.matrix == 0 and variant.matrix_unit:
        failures.append(
            "promises the matrix unit and has no matrix instruction: give tl.dot operands that the "
            "unit takes, of at least 16 rows and columns, or set matrix_unit=False"
        )
    if outcome.serialized and not triton_serializes():
        failures.append(
            "its wgmma instructions wait for each other, says the assembler "
            f"({outcome.serialized}): take smaller blocks or fewer stages, or load the "
            "operands in another way"
        )
    return failures
