"""Triton kernels for a tile of similarities between its two matrix products.

    sums:  rows_i = sum_j e_ij weight_j     columns_j = sum_i e_ij weight_i     e_ij = exp(s_ij)
    pairs: s_ij <- e_ij (u_i + u_j)         in place

cuBLAS computes the products, on tensor cores for float16 also where Triton cannot (V100). A kernel
reads the tile once and `pairs` writes it once; PyTorch's operations would do so four times.
"""

import itertools
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...support.variant import Variant, make_variant

# 8 values per thread: no spills on any GPU, and enough loads in flight.
BLOCK_ROWS = 32
BLOCK_COLUMNS = 64
NUM_WARPS = 8


@triton.jit
def exponentials(
    tile, row_classes, column_classes, rows, columns, num_rows, num_columns,
    WITHOUT_DIAGONAL: tl.constexpr, WITHOUT_OWN_CLASS: tl.constexpr,
):  # fmt: skip
    """Return e [rows, columns] float32, 0 outside the tile and for pairs that are left out."""
    inside = (rows[:, None] < num_rows) & (columns[None, :] < num_columns)
    offsets = rows[:, None] * num_columns + columns[None, :]
    # A pair that does not exist has the similarity -inf, whose exponential is 0.
    similarity = tl.load(tile + offsets, mask=inside, other=-float("inf")).to(tl.float32)
    exponential = tl.exp(similarity)
    if WITHOUT_DIAGONAL:
        exponential = tl.where(rows[:, None] == columns[None, :], 0.0, exponential)
    if WITHOUT_OWN_CLASS:
        row_class = tl.load(row_classes + rows, mask=rows < num_rows, other=0)
        column_class = tl.load(column_classes + columns, mask=columns < num_columns, other=0)
        exponential = tl.where(row_class[:, None] == column_class[None, :], 0.0, exponential)
    return exponential


@triton.jit
def exponential_sums_kernel(
    tile, row_weight, column_weight, row_classes, column_classes, row_partials, column_partials,
    num_rows, num_columns,
    WITHOUT_DIAGONAL: tl.constexpr, WITHOUT_OWN_CLASS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    row_block = tl.program_id(0)
    column_block = tl.program_id(1)
    rows = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    # One column per thread: with the several that the compiler would choose for whole tiles, the
    # sums of columns meet in few banks of shared memory.
    columns = tl.max_contiguous(column_block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS), 1)
    exponential = exponentials(
        tile, row_classes, column_classes, rows, columns, num_rows, num_columns,
        WITHOUT_DIAGONAL, WITHOUT_OWN_CLASS,
    )  # fmt: skip
    of_rows = tl.load(row_weight + rows, mask=rows < num_rows, other=0.0)
    of_columns = tl.load(column_weight + columns, mask=columns < num_columns, other=0.0)
    tl.store(
        row_partials + column_block * num_rows + rows,
        tl.sum(exponential * of_columns[None, :], axis=1),
        mask=rows < num_rows,
    )
    tl.store(
        column_partials + row_block * num_columns + columns,
        tl.sum(exponential * of_rows[:, None], axis=0),
        mask=columns < num_columns,
    )


@triton.jit
def pair_weights_kernel(
    tile, row_u, column_u, row_classes, column_classes, num_rows, num_columns,
    WITHOUT_DIAGONAL: tl.constexpr, WITHOUT_OWN_CLASS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    exponential = exponentials(
        tile, row_classes, column_classes, rows, columns, num_rows, num_columns,
        WITHOUT_DIAGONAL, WITHOUT_OWN_CLASS,
    )  # fmt: skip
    of_rows = tl.load(row_u + rows, mask=rows < num_rows, other=0.0)
    of_columns = tl.load(column_u + columns, mask=columns < num_columns, other=0.0)
    weights = exponential * (of_rows[:, None] + of_columns[None, :])
    # Rows that exist have weights below 200. Those of an ignored row, which no D contains, have no
    # bound, and infinity times its zeros would be NaN. A NaN is kept.
    weights = tl.where(weights > 60000.0, 60000.0, weights)
    weights = tl.where(weights < -60000.0, -60000.0, weights)
    inside = (rows[:, None] < num_rows) & (columns[None, :] < num_columns)
    offsets = rows[:, None] * num_columns + columns[None, :]
    tl.store(tile + offsets, weights.to(tile.dtype.element_ty), mask=inside)


def sums(
    y_rows: Tensor,
    y_columns: Tensor,
    denominator: str,
    row_classes: Tensor,
    column_classes: Tensor,
    row_weight: Tensor,
    column_weight: Tensor,
    is_diagonal: bool,
    tile: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return row sums [rows] and column sums [columns], float32, of the exponentials of a tile.

    y_rows [rows, d], y_columns [columns, d] and the contiguous tile [rows, columns] of fewer than
    2^31 elements are all float16 or all float32; the tile holds the similarities afterwards.
    is_diagonal: rows and columns are the same rows, so that pair (i, i) is a row with itself.
    """
    torch.matmul(y_rows, y_columns.t(), out=tile)
    num_rows, num_columns = tile.shape
    blocks = grid(tile)
    # Every program writes its own partial sums, so the order of the sum is fixed.
    row_partials = row_weight.new_empty(blocks[1], num_rows)
    column_partials = row_weight.new_empty(blocks[0], num_columns)
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(tile):
        exponential_sums_kernel[blocks](
            tile, row_weight, column_weight, row_classes, column_classes,
            row_partials, column_partials, num_rows, num_columns,
            **constants(denominator, is_diagonal), num_warps=NUM_WARPS,
        )  # fmt: skip
    return row_partials.sum(0), column_partials.sum(0)


def pair_weights(
    y_rows: Tensor,
    y_columns: Tensor,
    denominator: str,
    row_classes: Tensor,
    column_classes: Tensor,
    row_u: Tensor,
    column_u: Tensor,
    is_diagonal: bool,
    tile: Tensor,
) -> None:
    """Set the tile to e_ij (u_i + u_j); arguments as in `sums`."""
    torch.matmul(y_rows, y_columns.t(), out=tile)
    num_rows, num_columns = tile.shape
    with torch.cuda.device_of(tile):
        pair_weights_kernel[grid(tile)](
            tile, row_u, column_u, row_classes, column_classes, num_rows, num_columns,
            **constants(denominator, is_diagonal), num_warps=NUM_WARPS,
        )  # fmt: skip


def grid(tile: Tensor) -> tuple[int, int]:
    num_rows, num_columns = tile.shape
    return triton.cdiv(num_rows, BLOCK_ROWS), triton.cdiv(num_columns, BLOCK_COLUMNS)


def constants(denominator: str, is_diagonal: bool) -> dict[str, bool | int]:
    return {
        "WITHOUT_DIAGONAL": denominator == "others" and is_diagonal,
        "WITHOUT_OWN_CLASS": denominator == "negatives",
        "BLOCK_ROWS": BLOCK_ROWS,
        "BLOCK_COLUMNS": BLOCK_COLUMNS,
    }


def variants(capability: int) -> list[Variant]:
    """List the shipped compilations, the same on every GPU: whole tiles, and tiles of any size."""
    arrays = (
        "row_weight", "column_weight", "row_partials", "column_partials", "row_u", "column_u",
    )  # fmt: skip
    classes = {"row_classes": "*i64", "column_classes": "*i64"}
    found = []
    for kernel, dtype, denominator, whole in itertools.product(
        (exponential_sums_kernel, pair_weights_kernel),
        ("fp16", "fp32"),
        ("others", "negatives"),
        (True, False),
    ):
        name = f"{kernel.__name__} {dtype} {denominator} {'whole' if whole else 'edge'}"
        types = {"tile": f"*{dtype}", **classes, **dict.fromkeys(arrays, "*fp32")}
        options = constants(denominator, is_diagonal=True)
        variant = make_variant(name, kernel, options, types, num_warps=NUM_WARPS)
        if whole:
            variant = replace(variant, divisible_by_16=frozenset(variant.types))
        found.append(variant)
    return found
