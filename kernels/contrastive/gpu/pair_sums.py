"""Sums over all pairs of some rows with all columns, on the matrix unit.

With unit rows z_i and e_ij = exp((z_i . z_j - 1) / temperature), 0 where the denominator leaves the
pair out:

    row_sums         sum_j e_ij
    pair_gradient    sum_j e_ij (u_i + u_j) z_j            for any u, without the diagonal

Unit rows have products of at most 1, so the shift 1 / temperature replaces a running maximum, and e
is symmetric, so one exponential serves both directions of a pair. Every program owns a block of
rows and walks over the columns: no atomics, and the same call gives the same bits.

The rows lie one after the other and padded with zeros, as float16 or as float32, whose products
take three tf32 ones. A row that does not exist, be it ignored or padding, has the shift -inf: its
exponentials are 0, and the loops need no mask.

With u = w / D and |w| <= 1, the pairs' weights e_ij (u_i + u_j) lie in [0, 2] and are typically
2 / M. Lifted by 2**14 they keep float16's full precision down to 2**-28 and stay below its largest
number.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...support.variant import Variant
from .tiles import ONE_CHUNK, PADDED_ROWS, Tile, shipped

# Programs per multiprocessor below which the columns are split, and what a split may cost.
PROGRAMS_PER_MULTIPROCESSOR = 2
MAX_SPLITS = 32
MAX_PARTIAL_BYTES = 32 * 1024 * 1024

# Triton's types of the unit rows.
UNIT_TYPES = {torch.float16: "*fp16", torch.float32: "*fp32"}

LOG2_E = 1.4426950408889634
# log2 of the factor on the pairs' weights.
LIFT = tl.constexpr(14.0)
UNLIFT = tl.constexpr(2.0**-14)


@triton.jit
def similarities(
    x,
    y,
    z_rows,
    z_columns,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """z_i . z_j [R, C]: of x and y, if they hold the whole width, else of the rows in memory."""
    if CHUNK == WIDTH:
        products = tl.dot(x, tl.trans(y), input_precision=PRECISION)
    else:
        chunk = tl.arange(0, CHUNK)
        row_offsets = tl.arange(0, BLOCK_ROWS)[:, None] * WIDTH + chunk[None, :]
        column_offsets = tl.arange(0, BLOCK_COLUMNS)[:, None] * WIDTH + chunk[None, :]
        products = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
        for start in range(0, WIDTH, CHUNK):
            of_rows = tl.load(z_rows + start + row_offsets)
            of_columns = tl.load(z_columns + start + column_offsets)
            products = tl.dot(of_rows, tl.trans(of_columns), products, input_precision=PRECISION)
    return products


@triton.jit
def keep_compared(
    exponential,
    rows,
    columns,
    row_class,
    column_classes,
    DENOMINATOR: tl.constexpr,
    WITHOUT_DIAGONAL: tl.constexpr,
):
    """The exponentials, 0 where the denominator leaves the pair out."""
    if DENOMINATOR == "negatives":
        column_class = tl.load(column_classes + columns)
        exponential = tl.where(row_class[:, None] == column_class[None, :], 0.0, exponential)
    if WITHOUT_DIAGONAL:
        exponential = tl.where(rows[:, None] == columns[None, :], 0.0, exponential)
    return exponential


@triton.jit
def diagonal_blocks(first_row, first, last, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """The blocks of columns from first to last that the rows' diagonal crosses: start, stop."""
    start = tl.minimum(tl.maximum(first_row // BLOCK_COLUMNS, first), last)
    stop = tl.cdiv(first_row + BLOCK_ROWS, BLOCK_COLUMNS)
    return start, tl.maximum(tl.minimum(stop, last), start)


@triton.jit
def block_sums(
    x,
    z_rows,
    z_columns,
    shifts,
    rows,
    row_class,
    column_classes,
    first_column,
    scale,
    DENOMINATOR: tl.constexpr,
    WITHOUT_DIAGONAL: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sum of e_ij over one block of columns [R]."""
    columns = first_column + tl.arange(0, BLOCK_COLUMNS)
    z_columns += tl.cast(first_column, tl.int64) * WIDTH
    offsets = tl.arange(0, BLOCK_COLUMNS)[:, None] * WIDTH + tl.arange(0, CHUNK)[None, :]
    y = tl.load(z_columns + offsets)
    products = similarities(
        x, y, z_rows, z_columns, WIDTH, CHUNK, BLOCK_ROWS, BLOCK_COLUMNS, PRECISION
    )
    exponential = tl.exp2(products * scale + tl.load(shifts + columns)[None, :])
    exponential = keep_compared(
        exponential, rows, columns, row_class, column_classes, DENOMINATOR, WITHOUT_DIAGONAL
    )
    return tl.sum(exponential, 1)


@triton.jit(
    do_not_specialize=[
        "num_rows", "num_padded_rows", "num_columns", "num_padded_columns", "row_offset",
        "blocks_per_split",
    ]
)  # fmt: skip
def row_sums_kernel(
    z_rows,
    z_columns,
    shifts,
    row_classes,
    column_classes,
    # [splits, E, num_rows], written.
    partial_sums,
    num_rows,
    num_padded_rows,
    num_columns,
    num_padded_columns,
    row_offset,
    blocks_per_split,
    scale,
    DENOMINATOR: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: blocks of rows, splits of the columns, exits."""
    # Neighbours in time read the same columns.
    first_row = tl.program_id(0) * BLOCK_ROWS
    split = tl.program_id(1)
    exit = tl.program_id(2).to(tl.int64)
    block_rows = tl.arange(0, BLOCK_ROWS)
    z_rows += (exit * num_padded_rows + first_row) * WIDTH
    z_columns += exit * num_padded_columns * WIDTH
    x = tl.load(z_rows + block_rows[:, None] * WIDTH + tl.arange(0, CHUNK)[None, :])
    row_class = tl.load(row_classes + first_row + block_rows)
    # Rows by their place among the columns.
    rows = row_offset + first_row + block_rows

    first = split * blocks_per_split
    last = tl.minimum(first + blocks_per_split, tl.cdiv(num_columns, BLOCK_COLUMNS))
    skip_start = last
    skip_stop = last
    if DENOMINATOR == "others":
        skip_start, skip_stop = diagonal_blocks(
            row_offset + first_row, first, last, BLOCK_ROWS, BLOCK_COLUMNS
        )
    num_skipped = skip_stop - skip_start
    sums = tl.zeros([BLOCK_ROWS], tl.float32)
    for index in range(first, last - num_skipped):
        block = index + tl.where(index >= skip_start, num_skipped, 0)
        sums += block_sums(
            x, z_rows, z_columns, shifts, rows, row_class, column_classes,
            block * BLOCK_COLUMNS, scale,
            DENOMINATOR, False, WIDTH, CHUNK, BLOCK_ROWS, BLOCK_COLUMNS, PRECISION,
        )  # fmt: skip
    if DENOMINATOR == "others":
        for block in range(skip_start, skip_stop):
            sums += block_sums(
                x, z_rows, z_columns, shifts, rows, row_class, column_classes,
                block * BLOCK_COLUMNS, scale,
                DENOMINATOR, True, WIDTH, CHUNK, BLOCK_ROWS, BLOCK_COLUMNS, PRECISION,
            )  # fmt: skip

    stored = first_row + block_rows
    partial_sums += (split * tl.num_programs(2) + exit) * num_rows
    tl.store(partial_sums + stored, sums, mask=stored < num_rows)


@triton.jit
def block_gradient(
    gradient,
    x,
    z_rows,
    z_columns,
    u_row,
    u_columns,
    shifts,
    rows,
    row_class,
    column_classes,
    first_column,
    first_output,
    scale,
    DENOMINATOR: tl.constexpr,
    WITHOUT_DIAGONAL: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    OUTPUT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """gradient [R, OUTPUT] + sum over one block of columns of e_ij (u_i + u_j) z_j."""
    columns = first_column + tl.arange(0, BLOCK_COLUMNS)
    z_columns += tl.cast(first_column, tl.int64) * WIDTH
    block_columns = tl.arange(0, BLOCK_COLUMNS)[:, None] * WIDTH
    y = tl.load(z_columns + block_columns + tl.arange(0, CHUNK)[None, :])
    products = similarities(
        x, y, z_rows, z_columns, WIDTH, CHUNK, BLOCK_ROWS, BLOCK_COLUMNS, PRECISION
    )
    shift = tl.load(shifts + columns) + LIFT
    exponential = tl.exp2(products * scale + shift[None, :])
    exponential = keep_compared(
        exponential, rows, columns, row_class, column_classes, DENOMINATOR, WITHOUT_DIAGONAL
    )
    weight = exponential * (u_row[:, None] + tl.load(u_columns + columns)[None, :])
    if OUTPUT < WIDTH or CHUNK < WIDTH:
        y = tl.load(z_columns + first_output + block_columns + tl.arange(0, OUTPUT)[None, :])
    return tl.dot(weight.to(y.dtype), y, gradient, input_precision=PRECISION)


@triton.jit(
    do_not_specialize=[
        "num_rows", "num_padded_rows", "num_columns", "num_padded_columns", "row_offset",
        "blocks_per_split",
    ]
)  # fmt: skip
def pair_gradient_kernel(
    z_rows,
    z_columns,
    u_rows,
    u_columns,
    shifts,
    row_classes,
    column_classes,
    # [splits, E, num_rows, WIDTH], written.
    partial_gradients,
    num_rows,
    num_padded_rows,
    num_columns,
    num_padded_columns,
    row_offset,
    blocks_per_split,
    scale,
    DENOMINATOR: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    OUTPUT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: blocks of rows, splits of the columns x chunks of the output, exits."""
    NUM_OUTPUTS: tl.constexpr = WIDTH // OUTPUT
    first_row = tl.program_id(0) * BLOCK_ROWS
    split = tl.program_id(1) // NUM_OUTPUTS
    first_output = tl.program_id(1) % NUM_OUTPUTS * OUTPUT
    exit = tl.program_id(2).to(tl.int64)
    block_rows = tl.arange(0, BLOCK_ROWS)
    z_rows += (exit * num_padded_rows + first_row) * WIDTH
    z_columns += exit * num_padded_columns * WIDTH
    u_columns += exit * num_padded_columns
    x = tl.load(z_rows + block_rows[:, None] * WIDTH + tl.arange(0, CHUNK)[None, :])
    u_row = tl.load(u_rows + exit * num_padded_rows + first_row + block_rows)
    row_class = tl.load(row_classes + first_row + block_rows)
    rows = row_offset + first_row + block_rows

    first = split * blocks_per_split
    last = tl.minimum(first + blocks_per_split, tl.cdiv(num_columns, BLOCK_COLUMNS))
    skip_start = last
    skip_stop = last
    # The diagonal adds a multiple of z_i, which the normalisation removes again. "all" leaves it
    # out to spare the rounding, "others" must: there it is no part of D_i and may be far above it.
    if DENOMINATOR != "negatives":
        skip_start, skip_stop = diagonal_blocks(
            row_offset + first_row, first, last, BLOCK_ROWS, BLOCK_COLUMNS
        )
    num_skipped = skip_stop - skip_start
    gradient = tl.zeros([BLOCK_ROWS, OUTPUT], tl.float32)
    for index in range(first, last - num_skipped):
        block = index + tl.where(index >= skip_start, num_skipped, 0)
        gradient = block_gradient(
            gradient, x, z_rows, z_columns, u_row, u_columns, shifts,
            rows, row_class, column_classes, block * BLOCK_COLUMNS, first_output, scale,
            DENOMINATOR, False, WIDTH, CHUNK, OUTPUT, BLOCK_ROWS, BLOCK_COLUMNS, PRECISION,
        )  # fmt: skip
    if DENOMINATOR != "negatives":
        for block in range(skip_start, skip_stop):
            gradient = block_gradient(
                gradient, x, z_rows, z_columns, u_row, u_columns, shifts,
                rows, row_class, column_classes, block * BLOCK_COLUMNS, first_output, scale,
                DENOMINATOR, True, WIDTH, CHUNK, OUTPUT, BLOCK_ROWS, BLOCK_COLUMNS, PRECISION,
            )  # fmt: skip

    stored = first_row + block_rows
    partial_gradients += ((split * tl.num_programs(2) + exit) * num_rows + first_row) * WIDTH
    offsets = block_rows[:, None] * WIDTH + first_output + tl.arange(0, OUTPUT)[None, :]
    tl.store(partial_gradients + offsets, gradient * UNLIFT, mask=(stored < num_rows)[:, None])


def row_sums(
    z_rows: Tensor,
    z_columns: Tensor,
    shifts: Tensor,
    row_classes: Tensor,
    column_classes: Tensor,
    num_rows: int,
    num_columns: int,
    row_offset: int,
    temperature: float,
    denominator: str,
    tile: Tile,
) -> Tensor:
    """Partial sums [splits, E, num_rows] of e_ij over the columns, to be added in their order.

    The rows may be some of the columns, as in a batch that is spread over several devices.

    Args:
        z_rows, z_columns: unit rows [E, num_rows padded, W] and [E, num_columns padded, W], padded
            as by `padded`; contiguous.
        shifts: float32 [num_columns padded]: -log2(e) / temperature; -inf for a column that does
            not exist.
        row_classes, column_classes: int32 [num_rows padded], [num_columns padded].
        row_offset: the place of row 0 among the columns: pair (i, row_offset + i) is row i with
            itself.
    """
    num_exits, num_padded_rows, width = z_rows.shape
    row_blocks = triton.cdiv(num_rows, tile.rows)
    num_splits, blocks_per_split = split_columns(
        row_blocks * num_exits, num_columns, tile, 4 * num_exits * num_rows, z_rows.device
    )
    partial_sums = shifts.new_empty(num_splits, num_exits, num_rows)
    row_sums_kernel[row_blocks, num_splits, num_exits](
        z_rows, z_columns, shifts, row_classes, column_classes, partial_sums,
        num_rows, num_padded_rows, num_columns, z_columns.shape[1], row_offset, blocks_per_split,
        exponent_scale(temperature),
        **pair_constants(z_rows.dtype, width, denominator, tile),
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return partial_sums


def pair_gradient(
    z_rows: Tensor,
    z_columns: Tensor,
    u_rows: Tensor,
    u_columns: Tensor,
    shifts: Tensor,
    row_classes: Tensor,
    column_classes: Tensor,
    num_rows: int,
    num_columns: int,
    row_offset: int,
    temperature: float,
    denominator: str,
    tile: Tile,
) -> Tensor:
    """Partial sums [splits, E, num_rows, W] of e_ij (u_i + u_j) z_j over the columns.

    To be added in their order; without the pairs of a row with itself. As in `row_sums`, and:

    Args:
        u_rows, u_columns: float32 [E, num_rows padded], [E, num_columns padded]: w / D of every
            row with |w| <= 1; 0 for rows that are no anchors.
    """
    num_exits, num_padded_rows, width = z_rows.shape
    row_blocks = triton.cdiv(num_rows, tile.rows)
    num_outputs = width // tile.output
    num_splits, blocks_per_split = split_columns(
        row_blocks * num_outputs * num_exits, num_columns, tile,
        4 * num_exits * num_rows * width, z_rows.device,
    )  # fmt: skip
    partial_gradients = shifts.new_empty(num_splits, num_exits, num_rows, width)
    pair_gradient_kernel[row_blocks, num_splits * num_outputs, num_exits](
        z_rows, z_columns, u_rows, u_columns, shifts, row_classes, column_classes,
        partial_gradients,
        num_rows, num_padded_rows, num_columns, z_columns.shape[1], row_offset, blocks_per_split,
        exponent_scale(temperature),
        **pair_constants(z_rows.dtype, width, denominator, tile), OUTPUT=tile.output,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return partial_gradients


def split_columns(
    num_programs: int, num_columns: int, tile: Tile, partial_bytes: int, device: torch.device
) -> tuple[int, int]:
    """Splits of the columns, and blocks of columns in each, that give the chip enough programs.

    Args:
        num_programs: without splits.
        partial_bytes: of the result, which every split has for itself.
    """
    num_blocks = triton.cdiv(num_columns, tile.columns)
    wanted = PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors(device) // max(1, num_programs)
    affordable = MAX_PARTIAL_BYTES // max(1, partial_bytes)
    num_splits = max(1, min(wanted, affordable, MAX_SPLITS, num_blocks))
    blocks_per_split = max(1, triton.cdiv(num_blocks, num_splits))
    return max(1, triton.cdiv(num_blocks, blocks_per_split)), blocks_per_split


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        # The interpreter stands in for an A100.
        return 108
    return torch.cuda.get_device_properties(device).multi_processor_count


def pair_constants(
    dtype: torch.dtype, width: int, denominator: str, tile: Tile
) -> dict[str, str | int]:
    """The constants of both kernels over pairs."""
    return {
        "DENOMINATOR": denominator,
        "WIDTH": width,
        "CHUNK": tile.chunk,
        "BLOCK_ROWS": tile.rows,
        "BLOCK_COLUMNS": tile.columns,
        # Of no effect on float16, whose products are exact.
        "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32",
    }


def exponent_scale(temperature: float) -> float:
    """exp(s / temperature) is exp2 of s times this."""
    return LOG2_E / temperature


def padded(num_rows: int) -> int:
    """Rows of unit vectors in memory for this many."""
    return max(1, triton.cdiv(num_rows, PADDED_ROWS)) * PADDED_ROWS


def padded_width(width: int) -> int:
    """A width that the products' chunks divide."""
    if width <= ONE_CHUNK:
        return max(32, triton.next_power_of_2(width))
    return triton.cdiv(width, ONE_CHUNK) * ONE_CHUNK


def pair_variants(capability: int, dtype: torch.dtype, width: int) -> list[Variant]:
    """The kernels as they are shipped for these unit rows.

    The code of `pair_gradient_kernel` is the same for the denominators "all" and "others": one
    variant stands for both.
    """
    unit = UNIT_TYPES[dtype]
    blocks = shipped(capability, dtype, width)
    numbers = {
        "num_rows": "i32", "num_padded_rows": "i32", "num_columns": "i32",
        "num_padded_columns": "i32", "row_offset": "i32", "blocks_per_split": "i32",
        "scale": "fp32",
    }  # fmt: skip
    sides = {
        "shifts": "*fp32", "row_classes": "*i32", "column_classes": "*i32",
        "z_rows": unit, "z_columns": unit,
    }  # fmt: skip
    gradient_types = {"u_rows": "*fp32", "u_columns": "*fp32", "partial_gradients": "*fp32"}
    output = {"OUTPUT": blocks.backward.output}
    kernels: list[tuple[Any, Tile, dict[str, str], dict[str, int], dict[str, str]]] = [
        (
            row_sums_kernel, blocks.forward, {"partial_sums": "*fp32"}, {},
            {"all": "all", "others": "others", "negatives": "negatives"},
        ),
        (
            pair_gradient_kernel, blocks.backward, gradient_types, output,
            {"all or others": "others", "negatives": "negatives"},
        ),
    ]  # fmt: skip
    found = []
    for kernel, tile, own, constants, denominators in kernels:
        types = {**sides, **own, **numbers}
        found += [
            Variant(
                name=f"{kernel.__name__} {unit[1:]} width {width} {kind}",
                kernel=kernel,
                types=types,
                constants={**pair_constants(dtype, width, denominator, tile), **constants},
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
                divisible_by_16=frozenset(name for name in types if types[name][0] == "*"),
                matrix_unit=True,
            )
            for kind, denominator in denominators.items()
        ]
    return found
