"""Sums over all pairs of the first rows with all rows of a batch, on the matrix unit.

With unit rows z_i and e_ij = exp((z_i . z_j - 1) / temperature), 0 where the denominator leaves the
pair out:

    row_sums         sum_j e_ij
    pair_gradient    sum_j e_ij (u_i + u_j) z_j            for any u, without the diagonal

Every program owns a block of rows i and loops over all rows j, called columns here, without
atomics. Products of unit rows are at most 1, so the shift 1 / temperature replaces a running
maximum; e is symmetric, so one exponential serves both directions of a pair.

The rows are contiguous and padded with zeros, in float16, or in float32, whose products take three
tf32 products. A row that does not exist, because it is ignored or padding, has the shift -inf: its
exponentials are 0, and the loops need no mask.

With u = w / D and |w| <= 1, the pairs' weights e_ij (u_i + u_j) lie in [0, 2] and are typically
2 / M. Multiplied by 2**14 they keep float16's full precision down to 2**-28 and stay below its
largest number.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...support.variant import Variant, make_variant
from .splits import BLOCKS_AROUND_GRADIENT, BLOCKS_AROUND_SUMS, split_columns, split_triangle
from .tiles import ONE_CHUNK, PADDED_ROWS, Tile, shipped

# Limit of the sums that a triangle keeps per pair of blocks: 46,000 rows in blocks of 128.
MAX_TRIANGLE_BYTES = 64 * 1024 * 1024
# More than any batch has.
MAX_ROWS = 2**31 - 1
# With fewer blocks of rows the diagonal, which a triangle computes whole, is too large a part.
TRIANGLE_BLOCKS = 8

UNIT_TYPES = {torch.float16: "*fp16", torch.float32: "*fp32"}

DENOMINATORS = ("all", "others", "negatives")
LOG2_E = 1.4426950408889634
LIFT = tl.constexpr(14.0)
UNLIFT = tl.constexpr(2.0**-14)

# Numbers whose divisibility gains nothing: one compilation serves all sizes.
NUMBERS = ["num_rows", "num_padded_rows", "num_columns", "num_splits", "blocks_per_split"]


@triton.jit
def block_exponentials(
    x, z_rows, z_columns, shifts, rows, row_class, classes, first_column, scale,
    LIFT: tl.constexpr, DENOMINATOR: tl.constexpr, WITHOUT_DIAGONAL: tl.constexpr,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Return 2**LIFT e_ij [R, C] of one block of columns, and the first CHUNK columns of its z_j.

    x: [R, CHUNK], the first CHUNK columns of z_i; the others are read from memory.
    """
    chunk = tl.arange(0, CHUNK)
    row_offsets = tl.arange(0, BLOCK_ROWS)[:, None] * WIDTH + chunk[None, :]
    column_offsets = tl.arange(0, BLOCK_COLUMNS)[:, None] * WIDTH + chunk[None, :]
    y = tl.load(z_columns + column_offsets)
    if CHUNK == WIDTH:
        products = tl.dot(x, tl.trans(y), input_precision=PRECISION)
    else:
        products = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
        for start in range(0, WIDTH, CHUNK):
            of_rows = tl.load(z_rows + start + row_offsets)
            of_columns = tl.load(z_columns + start + column_offsets)
            products = tl.dot(of_rows, tl.trans(of_columns), products, input_precision=PRECISION)
    columns = first_column + tl.arange(0, BLOCK_COLUMNS)
    shift = tl.load(shifts + columns)
    if LIFT > 0:
        shift += LIFT
    exponential = tl.exp2(products * scale + shift[None, :])
    if DENOMINATOR == "negatives":
        column_class = tl.load(classes + columns)
        exponential = tl.where(row_class[:, None] == column_class[None, :], 0.0, exponential)
    if WITHOUT_DIAGONAL:
        exponential = tl.where(rows[:, None] == columns[None, :], 0.0, exponential)
    return exponential, y


@triton.jit
def diagonal_blocks(first_row, first, last, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Return start and stop of the blocks of columns, from first to last, with the diagonal."""
    start = tl.minimum(tl.maximum(first_row // BLOCK_COLUMNS, first), last)
    stop = tl.cdiv(first_row + BLOCK_ROWS, BLOCK_COLUMNS)
    return start, tl.maximum(tl.minimum(stop, last), start)


@triton.jit(do_not_specialize=NUMBERS)
def row_sums_kernel(
    z, shifts, classes,
    # [splits, E, num_rows], written.
    partial_sums,
    num_rows, num_padded_rows, num_columns, blocks_per_split, scale,
    DENOMINATOR: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of rows, splits of the columns, exits."""
    # Programs that run at the same time read the same columns.
    first_row = tl.program_id(0) * BLOCK_ROWS
    split = tl.program_id(1)
    exit = tl.program_id(2).to(tl.int64)
    block_rows = tl.arange(0, BLOCK_ROWS)
    z += exit * num_padded_rows * WIDTH
    z_rows = z + tl.cast(first_row, tl.int64) * WIDTH
    x = tl.load(z_rows + block_rows[:, None] * WIDTH + tl.arange(0, CHUNK)[None, :])
    rows = first_row + block_rows
    row_class = tl.load(classes + rows)

    first = split * blocks_per_split
    last = tl.minimum(first + blocks_per_split, tl.cdiv(num_columns, BLOCK_COLUMNS))
    skip_start = last
    skip_stop = last
    if DENOMINATOR == "others":
        skip_start, skip_stop = diagonal_blocks(first_row, first, last, BLOCK_ROWS, BLOCK_COLUMNS)
    num_skipped = skip_stop - skip_start
    sums = tl.zeros([BLOCK_ROWS], tl.float32)
    for index in range(first, last - num_skipped):
        block = index + tl.where(index >= skip_start, num_skipped, 0)
        first_column = block * BLOCK_COLUMNS
        exponential, _ = block_exponentials(
            x, z_rows, z + tl.cast(first_column, tl.int64) * WIDTH, shifts, rows, row_class,
            classes, first_column, scale, 0.0,
            DENOMINATOR, False, WIDTH, CHUNK, BLOCK_ROWS, BLOCK_COLUMNS, PRECISION,
        )  # fmt: skip
        sums += tl.sum(exponential, 1)
    if DENOMINATOR == "others":
        for block in range(skip_start, skip_stop):
            first_column = block * BLOCK_COLUMNS
            exponential, _ = block_exponentials(
                x, z_rows, z + tl.cast(first_column, tl.int64) * WIDTH, shifts, rows, row_class,
                classes, first_column, scale, 0.0,
                DENOMINATOR, True, WIDTH, CHUNK, BLOCK_ROWS, BLOCK_COLUMNS, PRECISION,
            )  # fmt: skip
            sums += tl.sum(exponential, 1)

    partial_sums += (split * tl.num_programs(2) + exit) * num_rows
    tl.store(partial_sums + rows, sums, mask=rows < num_rows)


@triton.jit(do_not_specialize=NUMBERS)
def triangle_sums_kernel(
    z, shifts, classes,
    # [splits + blocks of rows, E, num_rows]: own sums by split, then those of each block of rows
    # for the columns behind it; written there.
    partial_sums,
    num_rows, num_padded_rows, num_splits, blocks_per_split, scale,
    DENOMINATOR: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of rows, splits of the columns, exits. BLOCK_COLUMNS divides BLOCK_ROWS."""
    row_block = tl.program_id(0)
    first_row = row_block * BLOCK_ROWS
    split = tl.program_id(1)
    exit = tl.program_id(2).to(tl.int64)
    num_exits = tl.num_programs(2)
    block_rows = tl.arange(0, BLOCK_ROWS)
    block_columns = tl.arange(0, BLOCK_COLUMNS)
    z += exit * num_padded_rows * WIDTH
    z_rows = z + tl.cast(first_row, tl.int64) * WIDTH
    x = tl.load(z_rows + block_rows[:, None] * WIDTH + tl.arange(0, CHUNK)[None, :])
    rows = first_row + block_rows
    row_class = tl.load(classes + rows)
    exists = tl.load(shifts + rows) > -float("inf")

    first = tl.maximum(split * blocks_per_split, first_row // BLOCK_COLUMNS)
    last = tl.minimum((split + 1) * blocks_per_split, tl.cdiv(num_rows, BLOCK_COLUMNS))
    middle = tl.minimum(tl.maximum((first_row + BLOCK_ROWS) // BLOCK_COLUMNS, first), last)
    sums = tl.zeros([BLOCK_ROWS], tl.float32)
    for block in range(first, middle):
        first_column = block * BLOCK_COLUMNS
        exponential, _ = block_exponentials(
            x, z_rows, z + tl.cast(first_column, tl.int64) * WIDTH, shifts, rows, row_class,
            classes, first_column, scale, 0.0, DENOMINATOR, DENOMINATOR == "others",
            WIDTH, CHUNK, BLOCK_ROWS, BLOCK_COLUMNS, PRECISION,
        )  # fmt: skip
        sums += tl.sum(exponential, 1)
    for_columns = (
        partial_sums + ((num_splits + row_block).to(tl.int64) * num_exits + exit) * num_rows
    )
    for block in range(middle, last):
        first_column = block * BLOCK_COLUMNS
        exponential, _ = block_exponentials(
            x, z_rows, z + tl.cast(first_column, tl.int64) * WIDTH, shifts, rows, row_class,
            classes, first_column, scale, 0.0, DENOMINATOR, False,
            WIDTH, CHUNK, BLOCK_ROWS, BLOCK_COLUMNS, PRECISION,
        )  # fmt: skip
        sums += tl.sum(exponential, 1)
        columns = first_column + block_columns
        of_columns = tl.sum(tl.where(exists[:, None], exponential, 0.0), 0)
        tl.store(for_columns + columns, of_columns, mask=columns < num_rows)

    partial_sums += (split * num_exits + exit) * num_rows
    tl.store(partial_sums + rows, sums, mask=rows < num_rows)


@triton.jit
def block_gradient(
    gradient, x, z_rows, z_columns, u_row, u, shifts, rows, row_class, classes, first_column,
    first_output, scale,
    DENOMINATOR: tl.constexpr, WITHOUT_DIAGONAL: tl.constexpr, WIDTH: tl.constexpr,
    CHUNK: tl.constexpr, OUTPUT: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return gradient [R, OUTPUT] + sum over one block of columns of e_ij (u_i + u_j) z_j."""
    z_columns += tl.cast(first_column, tl.int64) * WIDTH
    exponential, y = block_exponentials(
        x, z_rows, z_columns, shifts, rows, row_class, classes, first_column, scale, LIFT,
        DENOMINATOR, WITHOUT_DIAGONAL, WIDTH, CHUNK, BLOCK_ROWS, BLOCK_COLUMNS, PRECISION,
    )  # fmt: skip
    block_columns = tl.arange(0, BLOCK_COLUMNS)
    u_columns = tl.load(u + first_column + block_columns)
    weight = exponential * (u_row[:, None] + u_columns[None, :])
    if OUTPUT < WIDTH or CHUNK < WIDTH:
        y = tl.load(
            z_columns + block_columns[:, None] * WIDTH + first_output
            + tl.arange(0, OUTPUT)[None, :]
        )  # fmt: skip
    return tl.dot(weight.to(y.dtype), y, gradient, input_precision=PRECISION)


@triton.jit(do_not_specialize=NUMBERS)
def pair_gradient_kernel(
    z, u, shifts, classes,
    # [splits, E, num_rows, WIDTH], written.
    partial_gradients,
    num_rows, num_padded_rows, num_columns, blocks_per_split, scale,
    DENOMINATOR: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, OUTPUT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of rows, splits of the columns x chunks of the output, exits."""
    NUM_OUTPUTS: tl.constexpr = WIDTH // OUTPUT
    first_row = tl.program_id(0) * BLOCK_ROWS
    split = tl.program_id(1) // NUM_OUTPUTS
    first_output = tl.program_id(1) % NUM_OUTPUTS * OUTPUT
    exit = tl.program_id(2).to(tl.int64)
    block_rows = tl.arange(0, BLOCK_ROWS)
    z += exit * num_padded_rows * WIDTH
    u += exit * num_padded_rows
    z_rows = z + tl.cast(first_row, tl.int64) * WIDTH
    x = tl.load(z_rows + block_rows[:, None] * WIDTH + tl.arange(0, CHUNK)[None, :])
    rows = first_row + block_rows
    u_row = tl.load(u + rows)
    row_class = tl.load(classes + rows)

    first = split * blocks_per_split
    last = tl.minimum(first + blocks_per_split, tl.cdiv(num_columns, BLOCK_COLUMNS))
    skip_start = last
    skip_stop = last
    # The diagonal adds a multiple of z_i, which the normalization removes again. "all" leaves it
    # out to avoid its rounding; "others" must, because D_i does not contain it and may be far less.
    if DENOMINATOR != "negatives":
        skip_start, skip_stop = diagonal_blocks(first_row, first, last, BLOCK_ROWS, BLOCK_COLUMNS)
    num_skipped = skip_stop - skip_start
    gradient = tl.zeros([BLOCK_ROWS, OUTPUT], tl.float32)
    for index in range(first, last - num_skipped):
        block = index + tl.where(index >= skip_start, num_skipped, 0)
        gradient = block_gradient(
            gradient, x, z_rows, z, u_row, u, shifts,
            rows, row_class, classes, block * BLOCK_COLUMNS, first_output, scale,
            DENOMINATOR, False, WIDTH, CHUNK, OUTPUT, BLOCK_ROWS, BLOCK_COLUMNS, PRECISION,
        )  # fmt: skip
    if DENOMINATOR != "negatives":
        for block in range(skip_start, skip_stop):
            gradient = block_gradient(
                gradient, x, z_rows, z, u_row, u, shifts,
                rows, row_class, classes, block * BLOCK_COLUMNS, first_output, scale,
                DENOMINATOR, True, WIDTH, CHUNK, OUTPUT, BLOCK_ROWS, BLOCK_COLUMNS, PRECISION,
            )  # fmt: skip

    partial_gradients += ((split * tl.num_programs(2) + exit) * num_rows + first_row) * WIDTH
    offsets = block_rows[:, None] * WIDTH + first_output + tl.arange(0, OUTPUT)[None, :]
    tl.store(partial_gradients + offsets, gradient * UNLIFT, mask=(rows < num_rows)[:, None])


class PartialSums(NamedTuple):
    """Sums over pairs in parts, to be added in their order.

    sums: float32 [parts, E, M]. The first `num_splits` parts are for all rows, each further one, of
        a block of rows, is written for the rows behind this block only: row i has
        num_splits + i // rows_per_part parts.
    """

    sums: Tensor
    num_splits: int
    rows_per_part: int

    @classmethod
    def of_splits(cls, sums: Tensor) -> PartialSums:
        """Return parts [splits, E, M] of which each is for all rows."""
        return cls(sums, sums.shape[0], MAX_ROWS)

    def total(self) -> Tensor:
        """Return the sums [E, M]."""
        num_parts, _, num_rows = self.sums.shape
        rows, parts = (torch.arange(n, device=self.sums.device) for n in (num_rows, num_parts))
        is_written = parts[:, None] < self.num_splits + rows // self.rows_per_part
        return torch.where(is_written[:, None], self.sums, 0).sum(0)


def symmetric_row_sums(
    z: Tensor,
    shifts: Tensor,
    classes: Tensor,
    num_rows: int,
    temperature: float,
    denominator: str,
    tile: Tile,
) -> PartialSums:
    """Return the sums of `row_sums` of the first `num_rows` rows over themselves.

    From `TRIANGLE_BLOCKS` blocks of rows on, a pair of blocks is computed once for both its sides,
    if there is memory for the parts.
    """
    num_exits, num_padded_rows, width = z.shape
    row_blocks = triton.cdiv(num_rows, tile.rows)
    num_bytes = 4 * row_blocks * num_exits * num_rows
    is_triangle = (
        row_blocks >= TRIANGLE_BLOCKS
        and num_bytes <= MAX_TRIANGLE_BYTES
        and tile.rows % tile.columns == 0
        and has_triangle(z.dtype, width)
    )
    if not is_triangle:
        sums = row_sums(z, shifts, classes, num_rows, num_rows, temperature, denominator, tile)
        return PartialSums.of_splits(sums)
    num_splits, blocks_per_split = split_triangle(num_rows, num_exits, tile, z.device)
    sums = shifts.new_empty(num_splits + row_blocks, num_exits, num_rows)
    triangle_sums_kernel[row_blocks, num_splits, num_exits](
        z, shifts, classes, sums,
        num_rows, num_padded_rows, num_splits, blocks_per_split, exponent_scale(temperature),
        **pair_constants(z.dtype, width, denominator, tile),
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return PartialSums(sums, num_splits, tile.rows)


def row_sums(
    z: Tensor,
    shifts: Tensor,
    classes: Tensor,
    num_rows: int,
    num_columns: int,
    temperature: float,
    denominator: str,
    tile: Tile,
) -> Tensor:
    """Return partial sums [splits, E, num_rows] of e_ij, to be added in their order.

    The sums are those of the first `num_rows` rows i over the first `num_columns` rows j of z
    [E, M padded, W], contiguous. shifts: float32 [M padded], -log2(e) / temperature or, for a row
    that does not exist, -inf. classes: int32 [M padded].
    """
    num_exits, num_padded_rows, width = z.shape
    row_blocks = triton.cdiv(num_rows, tile.rows)
    num_splits, blocks_per_split = split_columns(
        row_blocks * num_exits, num_columns, tile, 4 * num_exits * num_rows, z.device,
        BLOCKS_AROUND_SUMS,
    )  # fmt: skip
    partial_sums = shifts.new_empty(num_splits, num_exits, num_rows)
    row_sums_kernel[row_blocks, num_splits, num_exits](
        z, shifts, classes, partial_sums,
        num_rows, num_padded_rows, num_columns, blocks_per_split, exponent_scale(temperature),
        **pair_constants(z.dtype, width, denominator, tile),
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return partial_sums


def pair_gradient(
    z: Tensor,
    u: Tensor,
    shifts: Tensor,
    classes: Tensor,
    num_rows: int,
    num_columns: int,
    temperature: float,
    denominator: str,
    tile: Tile,
) -> Tensor:
    """Return partial sums [splits, E, num_rows, W] of e_ij (u_i + u_j) z_j over j != i.

    As `row_sums`; u: float32 [E, M padded], w / D with |w| <= 1; 0 for rows that are no anchors.
    """
    num_exits, num_padded_rows, width = z.shape
    row_blocks = triton.cdiv(num_rows, tile.rows)
    num_outputs = width // tile.output
    num_splits, blocks_per_split = split_columns(
        row_blocks * num_outputs * num_exits, num_columns, tile,
        4 * num_exits * num_rows * width, z.device, BLOCKS_AROUND_GRADIENT,
    )  # fmt: skip
    partial_gradients = shifts.new_empty(num_splits, num_exits, num_rows, width)
    pair_gradient_kernel[row_blocks, num_splits * num_outputs, num_exits](
        z, u, shifts, classes, partial_gradients,
        num_rows, num_padded_rows, num_columns, blocks_per_split, exponent_scale(temperature),
        **pair_constants(z.dtype, width, denominator, tile), OUTPUT=tile.output,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return partial_gradients


def has_triangle(dtype: torch.dtype, width: int) -> bool:
    """Return whether there is a triangle for unit rows of a padded width."""
    # Wider 16-bit rows spill on compute capability 10.0, as Triton 3.3.1 or 3.9.0 compiles them.
    return dtype == torch.float32 or width <= 64


def pair_constants(
    dtype: torch.dtype, width: int, denominator: str, tile: Tile
) -> dict[str, str | int]:
    """Return the constants that both kernels have."""
    return {
        "DENOMINATOR": denominator,
        "WIDTH": width,
        "CHUNK": tile.chunk,
        "BLOCK_ROWS": tile.rows,
        "BLOCK_COLUMNS": tile.columns,
        # Has no effect on float16, whose products are exact.
        "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32",
    }


def exponent_scale(temperature: float) -> float:
    """Return the factor c with exp(s / temperature) = exp2(c s)."""
    return LOG2_E / temperature


def padded(num_rows: int) -> int:
    """Return the number of rows in memory for `num_rows` unit vectors."""
    return max(1, triton.cdiv(num_rows, PADDED_ROWS)) * PADDED_ROWS


def padded_width(width: int) -> int:
    """Return the width in memory: a multiple of the chunks of the products."""
    if width <= ONE_CHUNK:
        return max(32, triton.next_power_of_2(width))
    return triton.cdiv(width, ONE_CHUNK) * ONE_CHUNK


def pair_variants(capability: int, dtype: torch.dtype, width: int) -> list[Variant]:
    """List the shipped compilations; gradients for "all" and "others" have the same code."""
    unit = UNIT_TYPES[dtype]
    blocks = shipped(capability, dtype, width)
    types = {
        "z": unit, "u": "*fp32", "shifts": "*fp32", "classes": "*i32", "scale": "fp32",
        "partial_sums": "*fp32", "partial_gradients": "*fp32",
    }  # fmt: skip
    output = {"OUTPUT": blocks.backward.output}
    kernels: list[tuple[Any, Tile, dict[str, int], str, str]] = [
        *((row_sums_kernel, blocks.forward, {}, kind, kind) for kind in DENOMINATORS),
        *(
            (triangle_sums_kernel, blocks.forward, {}, kind, kind)
            for kind in DENOMINATORS
            if has_triangle(dtype, width)
        ),
        (pair_gradient_kernel, blocks.backward, output, "all or others", "others"),
        (pair_gradient_kernel, blocks.backward, output, "negatives", "negatives"),
    ]
    return [
        make_variant(
            f"{kernel.__name__} {unit[1:]} width {width} {kind}",
            kernel,
            {**pair_constants(dtype, width, denominator, tile), **constants},
            types,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            matrix_unit=True,
        )
        for kernel, tile, constants, kind, denominator in kernels
    ]
