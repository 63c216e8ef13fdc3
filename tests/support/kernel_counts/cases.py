"""Launches of every kernel, with the least work that their formulas need."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from fusedacl.kernels import acl_loss, gated_combine_, grad_dot_norm
from fusedacl.kernels.contrastive import dispatch
from fusedacl.kernels.contrastive.gpu import pair_sums, splits
from fusedacl.kernels.contrastive.tiled import gpu_epilogue

DTYPES = (torch.float16, torch.float32)
ALL, WITH_MATRIX_UNIT = (70, 75, 80, 89), (80, 89)


@dataclass(frozen=True)
class Work:
    """The least work of a kernel: multiply-adds of numbers of a dtype, exponentials, bytes moved.

    bytes: of what is read or written once; 0 where the same data are read again and again, so that
    caches serve them.
    """

    dtype: torch.dtype
    multiply_adds: float = 0
    exponentials: float = 0
    bytes: float = 0


@dataclass(frozen=True)
class Case:
    """Launches whose kernels are counted apart.

    least: by kernel; a kernel that is not named has too little work to matter.
    is_small: counted in every run of the tests.
    """

    name: str
    run: Callable[[], Any]
    least: Mapping[str, Work]
    capabilities: tuple[int, ...] = ALL
    is_small: bool = True


def cases() -> Iterator[Case]:
    yield from small_batches()
    yield from large_batches()
    yield from tiles()
    yield from gradients()


def contrastive(
    num_rows: int, width: int, dtype: torch.dtype, small_rows: int, triangle_blocks: int = 8
) -> None:
    """Forward and backward pass of samples and two label embeddings, `num_rows` in all."""
    torch.manual_seed(0)
    samples = torch.randn(num_rows - 2, width).to(dtype).requires_grad_()
    label_embeddings = torch.randn(2, width).to(dtype).requires_grad_()
    labels = torch.randint(2, (num_rows - 2,))
    with (
        mock.patch.object(dispatch, "SMALL_ROWS", small_rows),
        mock.patch.object(pair_sums, "TRIANGLE_BLOCKS", triangle_blocks),
    ):
        acl_loss(samples, labels, label_embeddings, impl="triton").backward()


def small_batches() -> Iterator[Case]:
    """One tile of pairs serves both sides; every row has a gradient."""
    for num_rows, width in ((34, 64), (256, 64), (34, 768)):
        for dtype in DTYPES:
            pairs = num_rows**2
            yield Case(
                f"M = {num_rows}, d = {width}, {name_of(dtype)}",
                lambda m=num_rows, d=width, t=dtype: contrastive(m, d, t, small_rows=256),
                {"supcon_small_kernel": Work(dtype, 1.5 * pairs * width, pairs / 2)},
                is_small=(num_rows, width) == (34, 64),
            )


def above_the_diagonal(num_rows: int, width: int, dtype: torch.dtype) -> None:
    """A batch with few blocks of rows, whose columns are not split, as those of a large one are."""
    with mock.patch.object(splits, "num_multiprocessors", lambda device: 1):
        contrastive(num_rows, width, dtype, small_rows=0, triangle_blocks=4)


def large_batches() -> Iterator[Case]:
    """Every row against every column, and the forward pass above the diagonal."""
    for dtype in DTYPES:
        pairs = 512**2 / 2
        yield Case(
            f"M = 512, d = 64, {name_of(dtype)}",
            lambda t=dtype: above_the_diagonal(512, 64, t),
            {"triangle_sums_kernel": Work(dtype, pairs * 64, pairs)},
            WITH_MATRIX_UNIT,
            is_small=False,
        )
    for num_rows, width, dtype in (
        (256, 64, torch.float16), (256, 64, torch.float32), (256, 128, torch.float16),
        (256, 256, torch.float16),
    ):  # fmt: skip
        pairs = num_rows**2
        yield Case(
            f"M = {num_rows}, d = {width}, {name_of(dtype)}",
            lambda m=num_rows, d=width, t=dtype: contrastive(m, d, t, small_rows=0),
            {
                "row_sums_kernel": Work(dtype, pairs * width, pairs),
                "pair_gradient_kernel": Work(dtype, 2 * pairs * width, pairs),
            },
            WITH_MATRIX_UNIT,
            is_small=(width, dtype) == (64, torch.float16),
        )


def tiles() -> Iterator[Case]:
    """A square tile of similarities; 250 is no multiple of a block."""

    def run(size: int, dtype: torch.dtype) -> None:
        y = torch.ones(size, 16).to(dtype) / 4
        classes, weight = torch.arange(size) % 3, torch.ones(size)
        tile = torch.zeros(size, size, dtype=dtype)
        for function in (gpu_epilogue.sums, gpu_epilogue.pair_weights):
            function(y, y, "others", classes, classes, weight, weight, True, tile)

    for size in (128, 256, 250):
        for dtype in DTYPES:
            pairs = size**2
            moved = pairs * dtype.itemsize
            yield Case(
                f"tile {size} x {size}, {name_of(dtype)}",
                lambda n=size, t=dtype: run(n, t),
                {
                    "exponential_sums_kernel": Work(dtype, 0, pairs, moved),
                    "pair_weights_kernel": Work(dtype, 0, pairs, 2 * moved),
                },
                is_small=size == 128,
            )


def gradients() -> Iterator[Case]:
    """Two lists of two tensors."""

    def run(size: int, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        a, b = ([torch.randn(size).to(dtype) for _ in range(2)] for _ in range(2))
        stats = grad_dot_norm(a, b, impl="triton")
        gated_combine_(a, b, stats, weight=0.5, max_angle=180.0, impl="triton")

    for exponent in (13, 16):
        for dtype in DTYPES:
            size = 1 << exponent
            moved = 2 * size * dtype.itemsize
            yield Case(
                f"2 x 2^{exponent} elements, {name_of(dtype)}",
                lambda n=size, t=dtype: run(n, t),
                {
                    "chunk_sums_kernel": Work(dtype, bytes=2 * moved),
                    "gated_combine_kernel": Work(dtype, bytes=3 * moved),
                },
                is_small=exponent == 13,
            )


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
