"""Rates of a machine, and the floors that follow from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..measuring.environment import Result
from ..measuring.result_file import _known

# 32-bit results per clock and multiprocessor of ex2, the same from 7.0 to 9.0: CUDA C++ Programming
# Guide, "Throughput of Native Arithmetic Instructions".
EXPONENTIALS_PER_CLOCK = 16
# A float32 product with the matrix unit is three tf32 products (Triton's "tf32x3").
TF32_PRODUCTS = 3
DTYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Rates:
    """What a floor is computed from, per second; a dtype without a product rate is absent."""

    name: str
    flops: dict[torch.dtype, float]
    exponentials: float
    bytes: float
    # A CPU's products and exponentials are the same units' work.
    overlaps_units: bool = True


@dataclass(frozen=True)
class Floor:
    """The least seconds, and what sets them."""

    seconds: float
    bound_by: str


@dataclass(frozen=True)
class Chip:
    """A vendor's figures: dense rates, products of 16 bits accumulated in float32.

    clock_ghz: the highest clock at which the vendor states a rate.
    """

    name: str
    num_multiprocessors: int
    clock_ghz: float
    half_tflops: float
    tf32_tflops: float | None
    float32_tflops: float
    gigabytes_per_second: float
    has_bfloat16: bool = True

    def rates(self) -> Rates:
        emulated = (self.tf32_tflops or 0) / TF32_PRODUCTS
        flops = {
            torch.float16: self.half_tflops * 1e12,
            torch.float32: max(emulated, self.float32_tflops) * 1e12,
        }
        if self.has_bfloat16:
            flops[torch.bfloat16] = flops[torch.float16]
        exponentials = self.num_multiprocessors * EXPONENTIALS_PER_CLOCK * self.clock_ghz * 1e9
        return Rates(self.name, flops, exponentials, self.gigabytes_per_second * 1e9)


CHIPS = (
    # NVIDIA Tesla V100 GPU Architecture (whitepaper WP-08608), SXM2.
    Chip("V100 SXM2", 80, 1.530, 125, None, 15.7, 900, has_bfloat16=False),
    # NVIDIA Turing GPU Architecture (whitepaper WP-09183), Tesla T4; bandwidth: T4 data sheet.
    Chip("T4", 40, 1.590, 65, None, 8.1, 320, has_bfloat16=False),
    # NVIDIA A100 Tensor Core GPU Architecture (whitepaper); bandwidth: A100 80GB data sheet, SXM.
    Chip("A100 SXM 80GB", 108, 1.410, 312, 156, 19.5, 2039),
    # NVIDIA A10 data sheet; 72 multiprocessors: 9216 CUDA cores.
    Chip("A10", 72, 1.695, 125, 62.5, 31.2, 600),
    # NVIDIA L4 data sheet, without sparsity; 58 multiprocessors: 7424 CUDA cores.
    Chip("L4", 58, 2.040, 121, 60, 30.3, 300),
    # NVIDIA Ada GPU Architecture (whitepaper), RTX 4090, FP32 accumulate.
    Chip("RTX 4090", 128, 2.520, 165.2, 82.6, 82.6, 1008),
    # NVIDIA H100 Tensor Core GPU Architecture (whitepaper), SXM5; its float32 rate is at 1.98 GHz.
    Chip("H100 SXM", 132, 1.980, 989.4, 494.7, 66.9, 3350),
    # NVIDIA H200 data sheet, SXM: the H100's processor with faster memory.
    Chip("H200 SXM", 132, 1.980, 989.4, 494.7, 66.9, 4800),
)


def rates_result(rates: Rates) -> Result:
    return {
        "name": rates.name,
        "gigaflops": {
            str(dtype).removeprefix("torch."): value / 1e9 for dtype, value in rates.flops.items()
        },
        "giga_exponentials_per_second": _known(rates.exponentials / 1e9),
        "gigabytes_per_second": _known(rates.bytes / 1e9),
        "overlaps_units": rates.overlaps_units,
    }
