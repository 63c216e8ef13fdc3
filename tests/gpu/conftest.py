"""What needs an NVIDIA GPU: elsewhere every test of this folder is skipped with one reason."""

import pytest
import torch

REASON = "needs an NVIDIA GPU: torch finds no CUDA device"


@pytest.fixture(autouse=True)
def gpu() -> None:
    if not torch.cuda.is_available() or torch.version.hip is not None:
        pytest.skip(REASON)
    pytest.importorskip("triton", reason="triton is not installed")


@pytest.fixture(autouse=True)
def used_memory(gpu: None) -> None:
    """The allocator's free memory holds NaN, so that what a kernel leaves unwritten is seen."""
    for num_bytes in (2**9, 2**12, 2**16, 2**20, 2**24, 2**28):
        torch.full((num_bytes // 4,), torch.nan, device="cuda")
