"""Measured rates of the GPU: matrix products, exponentials, bytes copied."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from ..measuring.clock import interleave_on
from ..measuring.environment import gpu_name
from .rates import Rates

# A float32 product on the matrix unit is three tf32 products (Triton's "tf32x3").
TF32_PRODUCTS = 3
BLOCK = 1024
NUM_WARPS = 4
ROUNDS = 5


@triton.jit
def exponentials_kernel(x, NUM_EXPONENTIALS: tl.constexpr, BLOCK: tl.constexpr):
    """NUM_EXPONENTIALS per value, in registers: so many that memory traffic does not count."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + offsets)
    for _ in range(NUM_EXPONENTIALS):
        # The negation costs no instruction; the iteration has a fixed point and stays finite.
        value = tl.exp2(-value)
    tl.store(x + offsets, value)


def measured(
    device: torch.device,
    *,
    matrix_size: int = 8192,
    num_blocks: int = 16384,
    num_exponentials: int = 1024,
    num_bytes: int = 2**30,
) -> Rates:
    """Measure all rates by medians. Matrices are random: products of zeros draw less power."""
    calls: dict[str, Callable[[], object]] = {}
    dtypes = [torch.float16, torch.float32]
    if device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0):
        dtypes.append(torch.bfloat16)
    for dtype in dtypes:
        calls[str(dtype)] = product(matrix_size, dtype, device)
    has_tf32 = device.type == "cuda" and torch.bfloat16 in dtypes
    if has_tf32:
        calls["tf32"] = with_tf32(product(matrix_size, torch.float32, device))
    values = torch.rand(num_blocks * BLOCK, device=device)
    calls["exponentials"] = lambda: exponentials_kernel[(num_blocks,)](
        values, NUM_EXPONENTIALS=num_exponentials, BLOCK=BLOCK, num_warps=NUM_WARPS
    )
    source = torch.zeros(num_bytes // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    calls["copy"] = lambda: target.copy_(source)

    times = interleave_on(device, calls, rounds=ROUNDS, sample_seconds=0.02)
    seconds = {name: time["p50_ms"] / 1e3 for name, time in times.items()}
    flops = {dtype: 2 * matrix_size**3 / seconds[str(dtype)] for dtype in dtypes}
    if has_tf32:
        emulated = 2 * matrix_size**3 / seconds["tf32"] / TF32_PRODUCTS
        flops[torch.float32] = max(flops[torch.float32], emulated)
    return Rates(
        name=f"{gpu_name(device)}, measured",
        flops=flops,
        exponentials=values.numel() * num_exponentials / seconds["exponentials"],
        # Each byte is read and written.
        bytes=2 * source.numel() / seconds["copy"],
    )


def product(size: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty(size, size, dtype=dtype, device=device)
    return lambda: torch.mm(left, right, out=out)


def with_tf32(call: Callable[[], object]) -> Callable[[], object]:
    def run() -> None:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            call()
        finally:
            torch.set_float32_matmul_precision(before)

    return run
