"""Prints each kernel's work by unit of a multiprocessor: `python -m ptx`, by `make ptx-counts`.

Counts are no times: they say which unit is the busiest.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from .counts import Counts
from .driver import Driver
from .kernels import run_on_machine

# Warps that a multiprocessor's units serve in a cycle: the fp32 pipe 2, the special function unit
# a half (compute capability 7.0, 7.5 and 8.0).
FP32_WARPS = 2
SPECIAL_WARPS = 0.5
COLUMNS = (
    "blocks", "instructions", "fma", "fp32", "special", "barriers", "least_shared_passes",
    "shared_passes", "global_sectors",
)  # fmt: skip
# Launches of a name, which may be of several kernels.
Case = tuple[str, Callable[[], Any]]


def contrastive_cases(small: bool) -> Iterator[Case]:
    """Forward and backward pass of samples with two label embeddings, d = 64."""
    from fusedacl.kernels import acl_loss
    from fusedacl.kernels.contrastive import dispatch

    def run(num_rows: int, dtype: torch.dtype) -> None:
        samples = torch.randn(num_rows - 2, 64).to(dtype).requires_grad_()
        label_embeddings = torch.randn(2, 64).to(dtype).requires_grad_()
        labels = torch.randint(2, (num_rows - 2,))
        with mock.patch.object(dispatch, "SMALL_ROWS", 256 if small else 0):
            acl_loss(samples, labels, label_embeddings, impl="triton").backward()

    for num_rows in (34, 64, 256) if small else (256,):
        for dtype in (torch.float16, torch.float32):
            yield f"M = {num_rows}, {name_of(dtype)}", lambda n=num_rows, t=dtype: run(n, t)


def tile_cases() -> Iterator[Case]:
    """A tile of 256 x 256 similarities, and one of 250 x 250, which no block divides."""
    from fusedacl.kernels.contrastive.tiled import gpu_epilogue

    def run(size: int, dtype: torch.dtype) -> None:
        y = torch.randn(size, 16).to(dtype)
        classes, weight = torch.randint(3, (size,)), torch.rand(size)
        tile = torch.zeros(size, size, dtype=dtype)
        for function in (gpu_epilogue.sums, gpu_epilogue.pair_weights):
            function(y, y, "others", classes, classes, weight, weight, True, tile)

    for size in (256, 250):
        for dtype in (torch.float16, torch.float32):
            yield f"{size} x {size}, {name_of(dtype)}", lambda n=size, t=dtype: run(n, t)


def gradient_cases() -> Iterator[Case]:
    """Two lists of two tensors of 2^16 elements."""
    from fusedacl.kernels import gated_combine_, grad_dot_norm

    def run(dtype: torch.dtype) -> None:
        a, b = ([torch.randn(1 << 16).to(dtype) for _ in range(2)] for _ in range(2))
        stats = grad_dot_norm(a, b, impl="triton")
        gated_combine_(a, b, stats, weight=0.5, max_angle=180.0, impl="triton")

    for dtype in (torch.float16, torch.float32):
        yield f"2^17 elements, {name_of(dtype)}", lambda t=dtype: run(t)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def print_counts(driver: Driver, cases: Iterator[Case]) -> None:
    for name, run in cases:
        driver.counts.clear()
        torch.manual_seed(0)
        run()
        for kernel, counts in driver.counts.items():
            print_row(f"{kernel}, {name}", counts)


def print_row(name: str, counts: Counts) -> None:
    cells = [f"{getattr(counts, column):>20,}" for column in COLUMNS]
    fp32_cycles = counts.fp32 / FP32_WARPS
    ratios = [
        passes / fp32_cycles if fp32_cycles else 0
        for passes in (counts.least_shared_passes, counts.shared_passes)
    ]
    print(f"{name:52}", *cells, f"{ratios[0]:>12.2f} to {ratios[1]:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("capability", type=int, choices=(70, 75, 80))
    capability = parser.parse_args().capability
    driver = run_on_machine(capability, counts_accesses=True)
    print(f"sm_{capability}; the last column is shared-memory passes by cycles of the fp32 pipe")
    print(f"{'kernel':52}", *(f"{column:>20}" for column in COLUMNS))
    print_counts(driver, contrastive_cases(small=True))
    if capability >= 80:
        print_counts(driver, contrastive_cases(small=False))
    print_counts(driver, tile_cases())
    print_counts(driver, gradient_cases())


if __name__ == "__main__":
    main()
