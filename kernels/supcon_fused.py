"""The contrastive losses of large batches on the matrix unit; only O(M d) leaves the chip.

With unit rows z_i and e_ij = exp((z_i . z_j - 1) / temperature), 0 where the denominator leaves the
pair out:

    D_i = sum_j e_ij                                       the only sum over pairs
    L_i = log D_i + (1 - z_i . (C_i - z_i) / n_i) / temperature     C_i = sum of z_j over i's class

Gradient for upstream row weights w_i, with u_i = w_i / D_i and v_i = w_i / n_i:

    G_i  = sum_j e_ij (u_i + u_j) z_j - v_i (C_i - z_i) - (A_i - v_i z_i)
    A_i  = sum of v_j z_j over i's class                   v_i C_i where a class has one weight
    dx_i = (G_i - z_i (z_i . G_i)) / (temperature ||x_i||)

Unit rows have products of at most 1, so the shift 1 / temperature replaces a running maximum, and e
is symmetric, so one exponential serves both directions of a pair. Every program owns a block of
rows and walks over the columns: no atomics, and the same call gives the same bits.

One pass over the inputs, wherever they lie, writes the unit rows once, one after the other and
padded with zeros: float16 for 16-bit samples (|z| <= 1, and of the two 16-bit formats it has three
bits more), else float32, whose products take three tf32 ones. A row that does not exist, be it
ignored or padding, has the shift -inf: its exponentials are 0, and the loops need no mask.

The pairs' weights e_ij (u_i + u_j) / max|w| lie in [0, 2] and are typically 2 / M. Lifted by 2**14
they keep float16's full precision down to 2**-28 and stay below its largest number. The upstream
gradient and 1 / temperature come after, in float32.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import machine
from .rows import ZERO_NORM, compute_classes, parts_in_order
from .supcon_tiled import without_autocast
from .tuning import tuned
from .variants import Variant

MAX_WIDTH = 1024
# The smallest exponential, exp(-2 / temperature), stays a normal float32 down to here.
MIN_TEMPERATURE = 0.023
# Unit rows are padded to a multiple of every block, so that blocks are loaded without a mask.
PADDED_ROWS = 128
# Up to here a block of rows holds the gradient of the whole width in registers.
ONE_CHUNK = 256
# Programs per multiprocessor below which the columns are split, and what a split may cost.
PROGRAMS_PER_MULTIPROCESSOR = 2
MAX_SPLITS = 32
# Rows of a class that one program adds up.
ROWS_PER_SPLIT = 256
MAX_PARTIAL_BYTES = 32 * 1024 * 1024
# The kernels that only pass over rows: few values for each thread spill no registers and keep many
# programs in flight. Sums of classes loop over rows and take more at once.
ROW_KERNEL_WARPS = 8
ROW_KERNEL_VALUES = 32 * ROW_KERNEL_WARPS * 4
CLASS_SUM_VALUES = 32 * ROW_KERNEL_WARPS * 16

# Triton's types of the unit rows.
UNIT_TYPES = {torch.float16: "*fp16", torch.float32: "*fp32"}

SHORTEST = tl.constexpr(ZERO_NORM)
LOG2_E = tl.constexpr(1.4426950408889634)
SMALLEST = tl.constexpr(torch.finfo(torch.float32).tiny)
# log2 of the factor on the pairs' weights.
LIFT = tl.constexpr(14.0)
UNLIFT = tl.constexpr(2.0**-14)


@dataclass(frozen=True)
class Tile:
    """How one kernel walks over the pairs.

    rows, columns: of the tile of pairs that a program holds; they divide PADDED_ROWS.
    chunk: columns of z that enter one matrix product of similarities; divides the padded width.
    output: columns of the gradient that a program holds (the forward pass has none: 0); divides
        the padded width. Each further chunk of the output computes the similarities once more.
    """

    rows: int
    columns: int
    chunk: int
    output: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Blocks:
    """The tiles of both passes."""

    forward: Tile
    backward: Tile


@triton.jit
def load_part(part, rows, columns, wanted):
    """x [R, W] float32 of one part, 0 where it is not wanted."""
    start, row_stride, column_stride = part
    offsets = (
        rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride
    )
    return tl.load(start + offsets, mask=wanted, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["num_samples", "num_labels", "num_rows", "num_classes"])
def normalize_kernel(
    samples,
    samples_exit_stride,
    samples_row_stride,
    samples_column_stride,
    label_rows,
    label_rows_exit_stride,
    label_rows_row_stride,
    label_rows_column_stride,
    teacher,
    teacher_row_stride,
    teacher_column_stride,
    teacher_label_rows,
    teacher_label_rows_row_stride,
    teacher_label_rows_column_stride,
    # int64 [M]
    classes,
    # [E, M_padded, WIDTH], [E, M_padded], and [M_padded] twice: written.
    z,
    inverse_norms,
    shifts,
    padded_classes,
    num_samples,
    num_labels,
    num_rows,
    num_padded_rows,
    num_classes,
    width,
    shift,
    HAS_LABELS: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Grid: blocks of padded rows, exits."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    exit = tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK_WIDTH)
    row_class = tl.load(classes + rows, mask=rows < num_rows, other=num_classes).to(tl.int32)
    exists = row_class != num_classes
    wanted = exists[:, None] & (columns < width)[None, :]

    part = (samples + exit * samples_exit_stride, samples_row_stride, samples_column_stride)
    x = load_part(part, rows, columns, wanted & (rows < num_samples)[:, None])
    if HAS_LABELS:
        part = (
            label_rows + exit * label_rows_exit_stride,
            label_rows_row_stride,
            label_rows_column_stride,
        )
        position = rows - num_samples
        here = (position >= 0) & (position < num_labels)
        x += load_part(part, position, columns, wanted & here[:, None])
    if HAS_TEACHER:
        part = (teacher, teacher_row_stride, teacher_column_stride)
        position = rows - num_samples - num_labels
        here = (position >= 0) & (position < num_samples)
        x += load_part(part, position, columns, wanted & here[:, None])
        part = (
            teacher_label_rows, teacher_label_rows_row_stride, teacher_label_rows_column_stride,
        )  # fmt: skip
        position -= num_samples
        x += load_part(part, position, columns, wanted & (position >= 0)[:, None])

    # A NaN is not <= anything: it goes through to the loss.
    norm = tl.sqrt(tl.sum(x * x, 1))
    inverse_norm = 1.0 / tl.where(norm <= SHORTEST, float("inf"), norm)
    padded_rows = exit * num_padded_rows + rows
    tl.store(
        z + padded_rows[:, None] * WIDTH + columns[None, :],
        (x * inverse_norm[:, None]).to(z.dtype.element_ty),
        mask=(columns < WIDTH)[None, :],
    )
    tl.store(inverse_norms + padded_rows, inverse_norm)
    first = exit == 0
    tl.store(shifts + rows, tl.where(exists, shift, -float("inf")), mask=first)
    tl.store(padded_classes + rows, row_class, mask=first)


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


@triton.jit(do_not_specialize=["num_padded_rows", "num_classes"])
def class_sums_kernel(
    z,
    # WEIGHTED: float32 [E, M_padded]
    weights,
    # int64 [M]: the rows by class; and [C + 1]: where a class begins in it.
    order,
    starts,
    # [splits, C + 1, E, WIDTH], written.
    sums,
    num_padded_rows,
    num_classes,
    WEIGHTED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Grid: classes, splits of a class's rows, exits. The last class, of ignored rows, has 0."""
    row_class = tl.program_id(0)
    split = tl.program_id(1)
    num_splits = tl.num_programs(1)
    exit = tl.program_id(2).to(tl.int64)
    columns = tl.arange(0, BLOCK_WIDTH)
    used = (columns < WIDTH)[None, :]
    first = tl.load(starts + row_class)
    last = tl.load(starts + row_class + 1, mask=row_class < num_classes, other=0)
    num_here = tl.cdiv(last - first, num_splits)
    first += split * num_here
    last = tl.minimum(first + num_here, last)

    class_sum = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
    for start in range(first, last, BLOCK_ROWS):
        position = start + tl.arange(0, BLOCK_ROWS)
        here = position < last
        rows = exit * num_padded_rows + tl.load(order + position, mask=here, other=0)
        z_row = tl.load(
            z + rows[:, None] * WIDTH + columns[None, :], mask=here[:, None] & used, other=0.0
        ).to(tl.float32)
        if WEIGHTED:
            z_row *= tl.load(weights + rows, mask=here, other=0.0)[:, None]
        class_sum += z_row
    sums += (
        (split.to(tl.int64) * (num_classes + 1) + row_class) * tl.num_programs(2) + exit
    ) * WIDTH
    tl.store(sums + columns, tl.sum(class_sum, 0), mask=columns < WIDTH)


@triton.jit(do_not_specialize=["num_rows", "num_splits", "num_classes"])
def losses_kernel(
    # [splits, E, M]
    partial_sums,
    z,
    padded_classes,
    # float32 [C + 1, E, WIDTH], and int64 [C + 1]: where a class begins among the rows by class.
    class_sums,
    starts,
    # [E, M], [E, M_padded] and [M_padded]: written.
    losses,
    u,
    inverse_positives,
    num_rows,
    num_padded_rows,
    num_splits,
    num_classes,
    inverse_temperature,
    DENOMINATOR: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Grid: blocks of padded rows, exits. u and 1 / n_i are 0 for what is not an anchor."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    exit = tl.program_id(1).to(tl.int64)
    num_exits = tl.num_programs(1)
    columns = tl.arange(0, BLOCK_WIDTH)
    inside = rows < num_rows

    sums = tl.zeros([BLOCK_ROWS], tl.float32)
    for split in range(num_splits):
        start = (split * num_exits + exit) * num_rows
        sums += tl.load(partial_sums + start + rows, mask=inside, other=0.0)
    # A row with nothing to compare has the sum 0 and does not count; a NaN stays.
    sums = tl.where(sums < SMALLEST, SMALLEST, sums)

    row_class = tl.load(padded_classes + rows)
    exists = row_class != num_classes
    first = tl.load(starts + row_class)
    num_positives = tl.load(starts + row_class + 1, mask=exists, other=0) - first - 1
    is_anchor = num_positives > 0
    if DENOMINATOR == "negatives":
        # Ignored rows are the last class, which begins after all that exist.
        is_anchor = is_anchor & (num_positives + 1 < tl.load(starts + num_classes))
    inverse = tl.where(is_anchor, 1.0 / tl.maximum(num_positives, 1).to(tl.float32), 0.0)

    padded_rows = exit * num_padded_rows + rows
    used = (columns < WIDTH)[None, :]
    z_row = tl.load(z + padded_rows[:, None] * WIDTH + columns[None, :], mask=used, other=0.0).to(
        tl.float32
    )
    class_rows = (row_class.to(tl.int64) * num_exits + exit) * WIDTH
    class_sum = tl.load(class_sums + class_rows[:, None] + columns[None, :], mask=used, other=0.0)
    cosine = tl.sum((class_sum - z_row) * z_row, 1) * inverse
    loss = tl.where(is_anchor, tl.log(sums) + (1.0 - cosine) * inverse_temperature, 0.0)

    tl.store(losses + exit * num_rows + rows, loss, mask=inside)
    tl.store(u + padded_rows, tl.where(is_anchor, 1.0 / sums, 0.0))
    tl.store(inverse_positives + rows, inverse, mask=exit == 0)


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


@triton.jit(do_not_specialize=["num_splits", "num_trained", "num_samples", "num_labels"])
def input_gradient_kernel(
    # [splits, E, num_trained, WIDTH]
    partial_gradients,
    z,
    inverse_norms,
    padded_classes,
    # [C + 1, E, WIDTH]: of z, and PER_ROW of v z.
    class_sums,
    weighted_class_sums,
    # [M_padded], PER_ROW [E, M_padded].
    v,
    # [E]
    factors,
    # [E, N, d] and [E, K, d], written.
    sample_gradient,
    label_gradient,
    num_splits,
    num_trained,
    num_padded_rows,
    num_samples,
    num_labels,
    width,
    inverse_temperature,
    PER_ROW: tl.constexpr,
    WITH_LABELS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Grid: blocks of trained rows, exits. Class terms, normalisation, upstream gradient."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    exit = tl.program_id(1).to(tl.int64)
    num_exits = tl.num_programs(1)
    columns = tl.arange(0, BLOCK_WIDTH)
    trained = rows < num_trained
    used = trained[:, None] & (columns < WIDTH)[None, :]

    gradient = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
    for split in range(num_splits):
        start = ((split * num_exits + exit) * num_trained + rows) * WIDTH
        gradient += tl.load(
            partial_gradients + start[:, None] + columns[None, :], mask=used, other=0.0
        )
    padded_rows = exit * num_padded_rows + rows
    z_row = tl.load(z + padded_rows[:, None] * WIDTH + columns[None, :], mask=used, other=0.0).to(
        tl.float32
    )
    row_class = tl.load(padded_classes + rows, mask=trained, other=0).to(tl.int64)
    class_rows = ((row_class * num_exits + exit) * WIDTH)[:, None] + columns[None, :]
    class_sum = tl.load(class_sums + class_rows, mask=used, other=0.0)
    if PER_ROW:
        v_row = tl.load(v + padded_rows, mask=trained, other=0.0)[:, None]
        weighted = tl.load(weighted_class_sums + class_rows, mask=used, other=0.0)
        gradient -= v_row * (class_sum - 2.0 * z_row) + weighted
    else:
        v_row = tl.load(v + rows, mask=trained, other=0.0)[:, None]
        gradient -= 2.0 * v_row * (class_sum - z_row)

    gradient -= z_row * tl.sum(gradient * z_row, 1)[:, None]
    inverse_norm = tl.load(inverse_norms + padded_rows, mask=trained, other=0.0)
    factor = tl.load(factors + exit) * inverse_temperature
    # Exactly 0 for a row without direction, whatever the rest of the batch holds: an ignored row is
    # in nobody's denominator, so that its pairs' weights may have left float16's range.
    gradient = tl.where(
        (inverse_norm == 0.0)[:, None], 0.0, gradient * (inverse_norm * factor)[:, None]
    )

    wanted = (columns < width)[None, :]
    start = (exit * num_samples + rows) * width
    tl.store(
        sample_gradient + start[:, None] + columns[None, :],
        gradient.to(sample_gradient.dtype.element_ty),
        mask=wanted & (rows < num_samples)[:, None],
    )
    if WITH_LABELS:
        position = rows - num_samples
        start = (exit * num_labels + position) * width
        tl.store(
            label_gradient + start[:, None] + columns[None, :],
            gradient.to(label_gradient.dtype.element_ty),
            mask=wanted & trained[:, None] & (position >= 0)[:, None],
        )


def contrastive_loss(
    embeddings: Tensor,
    labels: Tensor,
    label_embeddings: Tensor | None,
    teacher_embeddings: Tensor | None,
    teacher_label_embeddings: Tensor | None,
    temperature: float,
    denominator: str,
    reduction: str,
    ignore_index: int,
) -> Tensor:
    """The loss as in `reference.contrastive_loss`."""
    trained = (embeddings, label_embeddings)
    with_gradient = torch.is_grad_enabled() and any(
        part is not None and part.requires_grad for part in trained
    )
    arguments = (
        embeddings, labels, label_embeddings, teacher_embeddings, teacher_label_embeddings,
        temperature, denominator, reduction, ignore_index, with_gradient,
    )  # fmt: skip
    # Both do the same; outside torch.compile an operator would only add its dispatch.
    if torch.compiler.is_compiling():
        return supcon_fused(*arguments)[0]
    return FusedLoss.apply(*arguments)


def obstacle(
    num_rows: int, width: int, dtype: torch.dtype, temperature: float, capability: int
) -> str | None:
    """What keeps these kernels from computing this, or None."""
    if capability < 80:
        return (
            f"compute capability {capability / 10} has no matrix unit that Triton reaches: 8.0 or "
            "newer is needed for a large batch (impl='tiled' uses cuBLAS there)"
        )
    if dtype == torch.float64:
        return "float64 embeddings need impl='tiled' or 'reference': these kernels have none"
    if width > MAX_WIDTH:
        return f"width {width} is above {MAX_WIDTH} (impl='tiled' takes any width)"
    if temperature < MIN_TEMPERATURE:
        return (
            f"temperature {temperature} is below {MIN_TEMPERATURE}, where exponentials leave "
            "float32's range (impl='tiled' computes in float64 there)"
        )
    return None


def shipped(capability: int, dtype: torch.dtype, width: int) -> Blocks:
    """The tiles for unit rows of this dtype (float16, float32) and padded width.

    Chosen by the compiled kernels' resources and the floors, not by a clock: `tuning` is for that.
    Nothing spills; then as many rows as registers hold, since every block of rows reads all the
    columns; then the most warps a multiprocessor: some compute exponentials while others multiply.
    Compute capability 8.6 and 8.9 have 99 KiB of shared memory a program, 8.0 has 163.
    """
    little_memory = capability in (86, 89)
    if dtype == torch.float32:
        # A product of three tf32 ones holds three times the operands: smaller chunks.
        chunk, output = min(width, 32), min(width, 128)
        wide = width > 64
        columns = 16 if wide and capability >= 90 else 32
        num_warps = 8 if capability >= 100 or (wide and capability < 90) else 4
        return Blocks(Tile(128, 64, chunk, 0, 8, 2), Tile(64, columns, chunk, output, num_warps, 2))
    if width > ONE_CHUNK:
        # Similarities are computed width / 256 times, three times at 768: the backward pass there
        # takes twice the products of one that could hold the whole width.
        forward = Tile(128, 64, 64, 0, 4, 3) if capability >= 100 else Tile(128, 128, 64, 0, 8, 2)
        return Blocks(forward, Tile(64, 64, 64, ONE_CHUNK, 8, 2))
    # From 9.0 on the matrix unit takes 64 rows at a time from each group of four warps, and is fast
    # enough to want two groups' rows for every column that it reads.
    rows = 128 if capability >= 90 else 64
    if width == 256:
        num_warps = 4 if capability >= 100 else 8
        return Blocks(Tile(128, 64, 256, 0, num_warps, 2), Tile(rows, 64, 256, 256, 8, 2))
    if width == 128:
        forward = Tile(128, 64, 128, 0, 8, 2 if little_memory else 3)
        return Blocks(forward, Tile(rows, 64, 128, 128, rows // 16, 2))
    return Blocks(Tile(128, 64, width, 0, 8, 3), Tile(128, 64, width, width, 8, 3))


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


def row_constants(width: int, values: int = ROW_KERNEL_VALUES) -> dict[str, int]:
    """The constants of a kernel that takes so many values of rows of this padded width at once."""
    block_width = triton.next_power_of_2(width)
    block_rows = min(PADDED_ROWS, values // block_width)
    return {"WIDTH": width, "BLOCK_WIDTH": block_width, "BLOCK_ROWS": block_rows}


def exponent_scale(temperature: float) -> float:
    """exp(s / temperature) is exp2 of s times this."""
    return LOG2_E.value / temperature


def padded(num_rows: int) -> int:
    """Rows of unit vectors in memory for this many."""
    return max(1, triton.cdiv(num_rows, PADDED_ROWS)) * PADDED_ROWS


def padded_width(width: int) -> int:
    """A width that the products' chunks divide."""
    if width <= ONE_CHUNK:
        return max(32, triton.next_power_of_2(width))
    return triton.cdiv(width, ONE_CHUNK) * ONE_CHUNK


def unit_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the unit rows for samples of this dtype."""
    return torch.float16 if dtype in (torch.float16, torch.bfloat16) else torch.float32


def tiles(z: Tensor) -> Blocks:
    """The tiles for these unit rows where they are: measured ones, or those shipped."""
    capability = machine.capability(z.device)
    assert capability is not None, "dispatch.choose refuses such a device"
    kind = (z.device, z.dtype, z.shape[-1])
    blocks = shipped(capability, *kind[1:])
    return Blocks(
        tuned("row_sums", *kind) or blocks.forward, tuned("pair_gradient", *kind) or blocks.backward
    )


def class_sums(z: Tensor, weights: Tensor | None, order: Tensor, starts: Tensor) -> Tensor:
    """The sum of the rows, or of weight times row, of each class [C + 1, E, W] float32."""
    num_exits, num_padded_rows, width = z.shape
    num_classes = starts.shape[0] - 1
    # Few classes have many rows each.
    rows_per_class = order.shape[0] // (num_classes + 1)
    num_splits = max(1, min(MAX_SPLITS, rows_per_class // ROWS_PER_SPLIT))
    sums = starts.new_empty(num_splits, num_classes + 1, num_exits, width, dtype=torch.float32)
    class_sums_kernel[num_classes + 1, num_splits, num_exits](
        z, z if weights is None else weights, order, starts, sums, num_padded_rows, num_classes,
        WEIGHTED=weights is not None, **row_constants(width, CLASS_SUM_VALUES),
        num_warps=ROW_KERNEL_WARPS,
    )  # fmt: skip
    return sums[0] if num_splits == 1 else sums.sum(0)


def forward(
    embeddings: Tensor,
    labels: Tensor,
    label_embeddings: Tensor | None,
    teacher_embeddings: Tensor | None,
    teacher_label_embeddings: Tensor | None,
    temperature: float,
    denominator: str,
    reduction: str,
    ignore_index: int,
    with_gradient: bool,
) -> tuple[Tensor, list[Tensor]]:
    """The loss, and what `backward` needs to know of this pass: O(M d)."""
    num_samples = labels.shape[0]
    num_labels = None if label_embeddings is None else label_embeddings.shape[-2]
    num_classes = num_samples if num_labels is None else num_labels
    has_teacher = teacher_embeddings is not None
    classes, _ = compute_classes(labels, num_labels, ignore_index, 2 if has_teacher else 1)  # [M]
    # On a GPU, where a look at the labels would wait for the device, a label outside [0, K) stops
    # at this operation's bounds instead of in a kernel below.
    ids = torch.arange(num_classes + 1, device=classes.device)
    classes = ids.index_select(0, classes)
    num_rows, num_padded_rows = classes.shape[0], padded(classes.shape[0])
    num_exits = embeddings.shape[0] if embeddings.dim() == 3 else 1
    width = padded_width(embeddings.shape[-1])

    with torch.cuda.device_of(embeddings):
        z = embeddings.new_empty(
            num_exits, num_padded_rows, width, dtype=unit_dtype(embeddings.dtype)
        )
        inverse_norms = z.new_empty(num_exits, num_padded_rows, dtype=torch.float32)
        shifts = z.new_empty(num_padded_rows, dtype=torch.float32)
        padded_classes = classes.new_empty(num_padded_rows, dtype=torch.int32)
        constants = row_constants(width)
        row_grid = (num_padded_rows // constants["BLOCK_ROWS"], num_exits)
        normalize_kernel[row_grid](
            *part_arguments(
                embeddings, label_embeddings, teacher_embeddings, teacher_label_embeddings
            ),
            classes, z, inverse_norms, shifts, padded_classes,
            num_samples, num_labels or 0, num_rows, num_padded_rows, num_classes,
            embeddings.shape[-1], -exponent_scale(temperature),
            HAS_LABELS=num_labels is not None, HAS_TEACHER=has_teacher,
            **constants, num_warps=ROW_KERNEL_WARPS,
        )  # fmt: skip

        # Stable: the order of a class's rows decides the rounding of its sum.
        in_order, order = classes.sort(stable=True)
        starts = torch.searchsorted(in_order, ids)
        sums_by_class = class_sums(z, None, order, starts)
        partial_sums = row_sums(
            z, z, shifts, padded_classes, padded_classes, num_rows, num_rows, 0,
            temperature, denominator, tiles(z).forward,
        )  # fmt: skip
        losses = z.new_empty(num_exits, num_rows, dtype=torch.float32)
        u = torch.empty_like(inverse_norms)
        inverse_positives = torch.empty_like(shifts)
        losses_kernel[row_grid](
            partial_sums, z, padded_classes, sums_by_class, starts, losses, u, inverse_positives,
            num_rows, num_padded_rows, partial_sums.shape[0], num_classes, 1 / temperature,
            DENOMINATOR=denominator, **constants, num_warps=ROW_KERNEL_WARPS,
        )  # fmt: skip

    saved = [
        z, inverse_norms, shifts, padded_classes, u, inverse_positives, sums_by_class, order,
        starts,
    ]  # fmt: skip
    if reduction != "none":
        losses = losses.sum(-1)
    if reduction == "mean":
        num_anchors = torch.count_nonzero(inverse_positives).clamp_(min=1)
        losses /= num_anchors
        saved.append(num_anchors)
    return losses.view(embeddings.shape[:-2] + losses.shape[1:]), saved if with_gradient else []


def part_arguments(
    embeddings: Tensor,
    label_embeddings: Tensor | None,
    teacher_embeddings: Tensor | None,
    teacher_label_embeddings: Tensor | None,
) -> list[Any]:
    """Address and strides of every part; of the samples for a part that is absent."""
    arguments: list[Any] = []
    for part in (embeddings, label_embeddings):
        part = embeddings if part is None else part
        exit_stride = part.stride(0) if part.dim() == 3 else 0
        arguments += [part, exit_stride, part.stride(-2), part.stride(-1)]
    for part in (teacher_embeddings, teacher_label_embeddings):
        part = embeddings if part is None else part
        arguments += [part, part.stride(-2), part.stride(-1)]
    return arguments


@without_autocast
def backward(
    loss_gradient: Tensor,
    saved: list[Tensor],
    num_samples: int,
    num_labels: int | None,
    width: int,
    num_rows: int,
    temperature: float,
    denominator: str,
    reduction: str,
    sample_dtype: torch.dtype,
    label_dtype: torch.dtype | None,
) -> list[Tensor]:
    """Gradients [E, N, d] and, unless label_dtype is None, [E, K, d]."""
    (
        z, inverse_norms, shifts, padded_classes, u, inverse_positives, sums_by_class, order,
        starts, *num_anchors,
    ) = saved  # fmt: skip
    num_exits, num_padded_rows, z_width = z.shape
    v, weighted_sums = inverse_positives, sums_by_class
    with torch.cuda.device_of(z):
        if reduction == "none":
            upstream = torch.nn.functional.pad(
                loss_gradient.reshape(num_exits, num_rows).float(), (0, num_padded_rows - num_rows)
            ).masked_fill_(inverse_positives == 0, 0)
            # The pairs' weights want row weights of at most 1.
            largest = upstream.abs().amax(-1, keepdim=True)
            largest.clamp_(min=torch.finfo(torch.float32).tiny)
            upstream /= largest
            u = u * upstream
            v = inverse_positives * upstream
            weighted_sums = class_sums(z, v, order, starts)
            factors = largest
        else:
            factors = loss_gradient.reshape(num_exits).float()
            if num_anchors:
                factors = factors / num_anchors[0]
            factors = factors.contiguous()

        with_labels = label_dtype is not None
        num_label_rows = num_labels if with_labels and num_labels is not None else 0
        num_trained = num_samples + num_label_rows
        partial_gradients = pair_gradient(
            z, z, u, u, shifts, padded_classes, padded_classes, num_trained, num_rows, 0,
            temperature, denominator, tiles(z).backward,
        )  # fmt: skip
        gradients = [z.new_empty(num_exits, num_samples, width, dtype=sample_dtype)]
        if with_labels:
            gradients.append(z.new_empty(num_exits, num_label_rows, width, dtype=label_dtype))
        constants = row_constants(z_width)
        input_gradient_kernel[triton.cdiv(num_trained, constants["BLOCK_ROWS"]), num_exits](
            partial_gradients, z, inverse_norms, padded_classes, sums_by_class, weighted_sums,
            v, factors, gradients[0], gradients[-1],
            partial_gradients.shape[0], num_trained, num_padded_rows, num_samples, num_label_rows,
            width, 1 / temperature,
            PER_ROW=reduction == "none", WITH_LABELS=with_labels,
            **constants, num_warps=ROW_KERNEL_WARPS,
        )  # fmt: skip
    return gradients


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    embeddings, labels, label_embeddings, teacher, _, temperature, denominator, reduction, _, _ = (
        inputs
    )
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1])
    num_samples, num_labels = labels.shape[0], None
    if label_embeddings is not None:
        num_labels = label_embeddings.shape[-2]
    num_rows = (1 if teacher is None else 2) * (num_samples + (num_labels or 0))
    ctx.options = (
        num_samples, num_labels, embeddings.shape[-1], num_rows,
        temperature, denominator, reduction,
    )  # fmt: skip
    ctx.leading = embeddings.shape[:-2]
    ctx.dtypes = (
        embeddings.dtype, None if label_embeddings is None else label_embeddings.dtype,
    )  # fmt: skip


def input_gradients(
    function: Callable[..., list[Tensor]], ctx: Any, loss_gradient: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradient of every input, by `backward` or its operator."""
    nothing = (None,) * 10
    if loss_gradient is None:
        return nothing
    sample_dtype, label_dtype = ctx.dtypes
    # Frozen label embeddings are constants like the teacher's: the pairs' rows stop before them.
    if not ctx.needs_input_grad[2]:
        label_dtype = None
    gradients = [
        gradient.view(ctx.leading + gradient.shape[1:])
        for gradient in function(
            loss_gradient, list(ctx.saved_tensors), *ctx.options, sample_dtype, label_dtype
        )
    ]
    label_gradient = None if label_dtype is None else gradients[1]
    return gradients[0], None, label_gradient, *nothing[3:]


class FusedLoss(torch.autograd.Function):
    """`supcon_fused` without an operator's dispatch."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = forward(*inputs)
        setup_context(ctx, inputs, output)
        return output[0]

    @staticmethod
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            # Gradients of this gradient would leave the tiles out without a word.
            raise RuntimeError(
                "impl='triton' has no second derivative, and backward was called with "
                "create_graph=True: impl='reference' can be differentiated twice"
            )
        return input_gradients(backward, ctx, loss_gradient)


# The schemas are spelt out because torch 2.6 does not derive them from `list[Tensor]`.
supcon_fused = torch.library.custom_op(
    "fusedacl::supcon_fused",
    without_autocast(forward),
    mutates_args=(),
    schema=(
        "(Tensor embeddings, Tensor labels, Tensor? label_embeddings, Tensor? teacher_embeddings, "
        "Tensor? teacher_label_embeddings, float temperature, str denominator, str reduction, "
        "SymInt ignore_index, bool with_gradient) -> (Tensor, Tensor[])"
    ),
)
supcon_fused_backward = torch.library.custom_op(
    "fusedacl::supcon_fused_backward",
    backward,
    mutates_args=(),
    schema=(
        "(Tensor loss_gradient, Tensor[] saved, SymInt num_samples, SymInt? num_labels, "
        "SymInt width, SymInt num_rows, float temperature, str denominator, str reduction, "
        "ScalarType sample_dtype, ScalarType? label_dtype) -> Tensor[]"
    ),
)
supcon_fused.register_autograd(
    lambda ctx, loss_gradient, _: input_gradients(supcon_fused_backward, ctx, loss_gradient),
    setup_context=setup_context,
)


@supcon_fused.register_fake
def _(
    embeddings: Tensor,
    labels: Tensor,
    label_embeddings: Tensor | None,
    teacher_embeddings: Tensor | None,
    teacher_label_embeddings: Tensor | None,
    temperature: float,
    denominator: str,
    reduction: str,
    ignore_index: int,
    with_gradient: bool,
) -> tuple[Tensor, list[Tensor]]:
    parts = parts_in_order(
        embeddings, label_embeddings, teacher_embeddings, teacher_label_embeddings
    )
    num_rows = sum(part.shape[-2] for part in parts)
    leading = embeddings.shape[:-2]
    num_exits = leading.numel()
    loss = embeddings.new_empty(
        (*leading, num_rows) if reduction == "none" else leading, dtype=torch.float32
    )
    if not with_gradient:
        return loss, []
    num_classes = labels.shape[0] if label_embeddings is None else label_embeddings.shape[-2]
    num_padded_rows, width = padded(num_rows), padded_width(embeddings.shape[-1])
    saved = [
        loss.new_empty(num_exits, num_padded_rows, width, dtype=unit_dtype(embeddings.dtype)),
        loss.new_empty(num_exits, num_padded_rows),
        loss.new_empty(num_padded_rows),
        loss.new_empty(num_padded_rows, dtype=torch.int32),
        loss.new_empty(num_exits, num_padded_rows),
        loss.new_empty(num_padded_rows),
        loss.new_empty(num_classes + 1, num_exits, width),
        labels.new_empty(num_rows, dtype=torch.int64),
        labels.new_empty(num_classes + 1, dtype=torch.int64),
    ]
    if reduction == "mean":
        saved.append(labels.new_empty((), dtype=torch.int64))
    return loss, saved


@supcon_fused_backward.register_fake
def _(
    loss_gradient: Tensor,
    saved: list[Tensor],
    num_samples: int,
    num_labels: int | None,
    width: int,
    num_rows: int,
    temperature: float,
    denominator: str,
    reduction: str,
    sample_dtype: torch.dtype,
    label_dtype: torch.dtype | None,
) -> list[Tensor]:
    num_exits = saved[0].shape[0]
    gradients = [saved[0].new_empty(num_exits, num_samples, width, dtype=sample_dtype)]
    if label_dtype is not None:
        gradients.append(saved[0].new_empty(num_exits, num_labels or 0, width, dtype=label_dtype))
    return gradients


def variants(capability: int) -> list[Variant]:
    """Every padded width up to 256 and one above, whose code is that of all of them."""
    if capability < 80:
        return []
    found = []
    for dtype, width in itertools.product((torch.float16, torch.float32), (32, 64, 128, 256, 768)):
        found += pair_variants(capability, dtype, width)
        found += row_variants(dtype, width)
    return found


def pair_variants(capability: int, dtype: torch.dtype, width: int) -> list[Variant]:
    """The kernels over pairs."""
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
    kernels: list[tuple[Any, Tile, dict[str, str], dict[str, int]]] = [
        (row_sums_kernel, blocks.forward, {"partial_sums": "*fp32"}, {}),
        (
            pair_gradient_kernel,
            blocks.backward,
            {"u_rows": "*fp32", "u_columns": "*fp32", "partial_gradients": "*fp32"},
            {"OUTPUT": blocks.backward.output},
        ),
    ]
    return [
        variant(
            kernel,
            f"{unit[1:]} width {width} {denominator}",
            {**sides, **own, **numbers},
            {**pair_constants(dtype, width, denominator, tile), **constants},
            tile.num_warps,
            tile.num_stages,
            matrix_unit=True,
        )
        for (kernel, tile, own, constants), denominator in itertools.product(
            kernels, ("all", "others", "negatives")
        )
    ]


def row_variants(dtype: torch.dtype, width: int) -> list[Variant]:
    """The kernels that only pass over rows."""
    unit = UNIT_TYPES[dtype]
    parts = {}
    for name, strides in (
        ("samples", ("exit", "row", "column")), ("label_rows", ("exit", "row", "column")),
        ("teacher", ("row", "column")), ("teacher_label_rows", ("row", "column")),
    ):  # fmt: skip
        parts[name] = unit
        parts |= {f"{name}_{stride}_stride": "i32" for stride in strides}
    counts = {"num_rows": "i32", "num_padded_rows": "i32", "num_classes": "i32"}
    common = {"z": unit, "padded_classes": "*i32", "inverse_norms": "*fp32"}
    kernels: list[tuple[Any, str, dict[str, str], dict[str, Any]]] = [
        (
            normalize_kernel,
            "",
            {
                **parts, **common, **counts, "classes": "*i64", "shifts": "*fp32",
                "num_samples": "i32", "num_labels": "i32", "width": "i32", "shift": "fp32",
            },
            {"HAS_LABELS": True, "HAS_TEACHER": True},
        ),
        (
            losses_kernel,
            " negatives",
            {
                **counts, "partial_sums": "*fp32", "z": unit, "padded_classes": "*i32",
                "class_sums": "*fp32", "starts": "*i64", "losses": "*fp32", "u": "*fp32",
                "inverse_positives": "*fp32", "num_splits": "i32", "inverse_temperature": "fp32",
            },
            {"DENOMINATOR": "negatives"},
        ),
    ]  # fmt: skip
    for flag in (False, True):
        kernels += [
            (
                class_sums_kernel,
                " weighted" if flag else "",
                {
                    "z": unit, "weights": "*fp32" if flag else unit, "order": "*i64",
                    "starts": "*i64", "sums": "*fp32", "num_padded_rows": "i32",
                    "num_classes": "i32",
                },
                {"WEIGHTED": flag, **row_constants(width, CLASS_SUM_VALUES)},
            ),
            (
                input_gradient_kernel,
                " per row" if flag else "",
                {
                    **common, "partial_gradients": "*fp32", "class_sums": "*fp32",
                    "weighted_class_sums": "*fp32", "v": "*fp32", "factors": "*fp32",
                    "sample_gradient": unit, "label_gradient": unit, "num_splits": "i32",
                    "num_trained": "i32", "num_padded_rows": "i32", "num_samples": "i32",
                    "num_labels": "i32", "width": "i32", "inverse_temperature": "fp32",
                },
                {"PER_ROW": flag, "WITH_LABELS": True},
            ),
        ]  # fmt: skip
    return [
        variant(
            kernel,
            f"{unit[1:]} width {width}{kind}",
            types,
            {**row_constants(width), **constants},
            ROW_KERNEL_WARPS,
        )
        for kernel, kind, types, constants in kernels
    ]


def variant(
    kernel: Any,
    kind: str,
    types: dict[str, str],
    constants: dict[str, Any],
    num_warps: int,
    num_stages: int = 3,
    *,
    matrix_unit: bool = False,
) -> Variant:
    """A variant whose addresses are PyTorch's and whose numbers may be any."""
    return Variant(
        name=f"{kernel.__name__} {kind}",
        kernel=kernel,
        types=types,
        constants=constants,
        num_warps=num_warps,
        num_stages=num_stages,
        divisible_by_16=frozenset(name for name, kind in types.items() if kind.startswith("*")),
        matrix_unit=matrix_unit,
    )
