"""Tests on an NVIDIA GPU; elsewhere all but those marked `interpreter` are skipped."""

import pytest
import torch


@pytest.fixture(autouse=True)
def gpu(request: pytest.FixtureRequest) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    if request.node.get_closest_marker("interpreter") is not None:
        return
    if not torch.cuda.is_available() or torch.version.hip is not None:
        pytest.skip("needs an NVIDIA GPU: torch finds no CUDA device")
    # The allocator's free memory holds NaN, so that a value that a kernel does not write is seen.
    for num_bytes in (2**9, 2**12, 2**16, 2**20, 2**24, 2**28):
        torch.full((num_bytes // 4,), torch.nan, device="cuda")
