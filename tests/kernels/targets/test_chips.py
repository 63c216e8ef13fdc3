"""Occupancy bounds, calculated by hand."""

import pytest
from fusedacl.kernels.targets import chips


@pytest.mark.parametrize(
    "kernel, expected",
    [
        # 96 x 32 registers per warp: 5 warps in a partition of 16384, 20 in all, 5 blocks of 4. In
        # 164 KiB four times 32 + 1 KiB.
        ((96, 32 * 1024, 4, 80), (4, 16, "shared memory")),
        ((96, 0, 4, 80), (5, 20, "registers")),
        # 33 registers per thread are 1056, rounded up to 1280: 12 warps in a partition, limit 32.
        ((33, 0, 8, 75), (4, 32, "warps")),
        # 255 registers per thread are 8192 per warp: 2 warps in a partition.
        ((255, 0, 8, 90), (1, 8, "registers")),
        ((16, 0, 1, 70), (32, 32, "blocks")),
        # On sm_70 a block may use all shared memory.
        ((32, 96 * 1024, 4, 70), (1, 4, "shared memory")),
        ((32, 100 * 1024, 4, 89), (0, 0, "shared memory")),
    ],
)
def test_occupancy(kernel: tuple[int, ...], expected: tuple[int, int, str]) -> None:
    """A kernel: registers, shared memory, number of warps, compute capability."""
    assert chips.occupancy(*kernel) == chips.Occupancy(*expected)
