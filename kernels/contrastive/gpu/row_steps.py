"""Row-wise steps of the contrastive losses of large batches, around the sums over pairs.

    normalize           z_i = x_i / ||x_i||
    class_sums          C = sum of z_j, or A = sum of v_j z_j, over a class's rows
    losses              L_i = log D_i + (1 - z_i . (C_i - z_i) / n_i) / temperature
                        u_i = 1 / D_i, and 1 / n_i; 0 for rows that are no anchors
    finish_gradients    G_i  = P_i - v_i (C_i - z_i) - (A_i - v_i z_i)
                        dx_i = (G_i - z_i (z_i . G_i)) factor / (temperature ||x_i||)

D_i and P_i are the sums over pairs, n_i is the number of i's positives, v_i = w_i / n_i for row
weights w_i, and factor is a common factor of all weights.

`normalize` reads the inputs in their own dtypes and strides. It writes contiguous unit rows, in
float16 for 16-bit samples (of the two 16-bit formats it has three bits more), else in float32.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...support.variant import Variant, make_variant
from ..batch import ZERO_NORM, Batch, BatchShape
from .pair_sums import UNIT_TYPES, PartialSums, exponent_scale, padded, padded_width
from .parts import gather, part_arguments, part_types
from .splits import MAX_PARTIAL_BYTES, MAX_SPLITS
from .tiles import PADDED_ROWS

# Few values per thread spill no registers; class sums loop over rows and take more at once.
NUM_WARPS = 8
VALUES = 32 * NUM_WARPS * 4
CLASS_SUM_VALUES = 32 * NUM_WARPS * 16
# Number of rows of a class that one program adds up.
ROWS_PER_SPLIT = 256

FLOAT_ARRAYS = (
    "inverse_norms", "shifts", "weights", "sums", "partial_sums", "class_sums", "losses", "u",
    "inverse_positives", "partial_gradients", "weighted_class_sums", "v", "factors",
)  # fmt: skip

SHORTEST = tl.constexpr(ZERO_NORM)
SMALLEST = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit(do_not_specialize=["num_samples", "num_labels", "num_rows", "num_classes"])
def normalize_kernel(
    samples, samples_exit_stride, samples_row_stride, samples_column_stride,
    label_rows, label_rows_exit_stride, label_rows_row_stride, label_rows_column_stride,
    teacher, teacher_row_stride, teacher_column_stride,
    teacher_label_rows, teacher_label_rows_row_stride, teacher_label_rows_column_stride,
    # int64 [M]
    classes,
    # [E, M_padded, WIDTH], [E, M_padded], and [M_padded] twice: written.
    z, inverse_norms, shifts, padded_classes,
    num_samples, num_labels, num_rows, num_padded_rows, num_classes, width, shift,
    HAS_LABELS: tl.constexpr, HAS_TEACHER: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of padded rows, exits."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    exit = tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK_WIDTH)
    row_class = tl.load(classes + rows, mask=rows < num_rows, other=num_classes).to(tl.int32)
    exists = row_class != num_classes
    parts = (
        (samples + exit * samples_exit_stride, samples_row_stride, samples_column_stride),
        (
            label_rows + exit * label_rows_exit_stride,
            label_rows_row_stride,
            label_rows_column_stride,
        ),
        (teacher, teacher_row_stride, teacher_column_stride),
        (teacher_label_rows, teacher_label_rows_row_stride, teacher_label_rows_column_stride),
    )
    sizes = (num_samples, num_labels, num_rows, width)
    x = gather(rows, exists, columns, sizes, parts, HAS_LABELS, HAS_TEACHER)

    # A NaN is not <= anything: it reaches the loss.
    norm = tl.sqrt_rn(tl.sum(x * x, 1))
    inverse_norm = tl.div_rn(1.0, tl.where(norm <= SHORTEST, float("inf"), norm))
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


@triton.jit(do_not_specialize=["num_padded_rows", "num_classes"])
def class_sums_kernel(
    z,
    # WEIGHTED: float32 [E, M_padded]
    weights,
    # int64 [M]: rows sorted by class; and [C + 1]: start of each class among them.
    order, starts,
    # [splits, C + 1, E, WIDTH], written.
    sums,
    num_padded_rows, num_classes,
    WEIGHTED: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Grid: classes, splits of a class's rows, exits. The last class, of ignored rows, gets 0."""
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


@triton.jit(do_not_specialize=["num_rows", "num_splits", "rows_per_part", "num_classes"])
def losses_kernel(
    # [splits, E, M], or with the parts of a triangle behind them.
    partial_sums,
    z, padded_classes,
    # float32 [C + 1, E, WIDTH], and int64 [C + 1]: start of each class among the sorted rows.
    class_sums, starts,
    # [E, M], [E, M_padded] and [M_padded]: written.
    losses, u, inverse_positives,
    num_rows, num_padded_rows, num_splits, rows_per_part, num_classes, inverse_temperature,
    DENOMINATOR: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of padded rows, exits. u and 1 / n_i are 0 for rows that are no anchors."""
    first_row = tl.program_id(0) * BLOCK_ROWS
    rows = first_row + tl.arange(0, BLOCK_ROWS)
    exit = tl.program_id(1).to(tl.int64)
    num_exits = tl.num_programs(1)
    columns = tl.arange(0, BLOCK_WIDTH)
    inside = rows < num_rows

    sums = tl.zeros([BLOCK_ROWS], tl.float32)
    for part in range(num_splits + first_row // rows_per_part):
        start = (part * num_exits + exit) * num_rows
        sums += tl.load(partial_sums + start + rows, mask=inside, other=0.0)
    # A row with nothing to compare has the sum 0 and does not count; a NaN is kept.
    sums = tl.where(sums < SMALLEST, SMALLEST, sums)

    row_class = tl.load(padded_classes + rows)
    exists = row_class != num_classes
    first = tl.load(starts + row_class)
    num_positives = tl.load(starts + row_class + 1, mask=exists, other=0) - first - 1
    is_anchor = num_positives > 0
    if DENOMINATOR == "negatives":
        # Ignored rows are the last class, which starts after all rows that exist.
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


@triton.jit(do_not_specialize=["num_splits", "num_trained", "num_samples", "num_labels"])
def input_gradient_kernel(
    # [splits, E, num_trained, WIDTH]
    partial_gradients,
    z, inverse_norms, padded_classes,
    # [C + 1, E, WIDTH]: sums of z and, if PER_ROW, of v z.
    class_sums, weighted_class_sums,
    # [M_padded]; if PER_ROW [E, M_padded].
    v,
    # [E]
    factors,
    # [E, N, d] and [E, K, d], written.
    sample_gradient, label_gradient,
    num_splits, num_trained, num_padded_rows, num_samples, num_labels, width, inverse_temperature,
    PER_ROW: tl.constexpr, WITH_LABELS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of trained rows, exits. Adds class terms, normalization, upstream gradient."""
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
    # Exactly 0 for a row without direction, whatever else the batch holds: no denominator contains
    # an ignored row, so the weights of its pairs may have left float16's range.
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


class Rows(NamedTuple):
    """Everything about the M rows that needs no pair."""

    # [E, M padded, W] in `unit_dtype`, and float32 [E, M padded].
    z: Tensor
    inverse_norms: Tensor
    # float32 and int32 [M padded], as in `pair_sums`; class C means an ignored row.
    shifts: Tensor
    classes: Tensor
    # float32 [C + 1, E, W]
    sums_by_class: Tensor
    # int64 [M]: rows sorted by class; and [C + 1]: start of each class among them.
    order: Tensor
    starts: Tensor


def normalize(batch: Batch, classes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the first four fields of `Rows` from the classes [M], where C means an ignored row."""
    num_exits = batch.leading.numel()
    num_samples, width = batch.embeddings.shape[-2:]
    num_rows, num_padded_rows = classes.shape[0], padded(classes.shape[0])
    z = batch.embeddings.new_empty(
        num_exits, num_padded_rows, padded_width(width), dtype=unit_dtype(batch.embeddings.dtype)
    )
    inverse_norms = z.new_empty(num_exits, num_padded_rows, dtype=torch.float32)
    shifts = z.new_empty(num_padded_rows, dtype=torch.float32)
    padded_classes = classes.new_empty(num_padded_rows, dtype=torch.int32)
    constants = row_constants(z.shape[-1])
    normalize_kernel[num_padded_rows // constants["BLOCK_ROWS"], num_exits](
        *part_arguments(batch.parts), classes, z, inverse_norms, shifts, padded_classes,
        num_samples, batch.num_labels or 0, num_rows, num_padded_rows, batch.num_classes,
        width, -exponent_scale(batch.temperature),
        HAS_LABELS=batch.label_embeddings is not None,
        HAS_TEACHER=batch.teacher_embeddings is not None,
        **constants, num_warps=NUM_WARPS,
    )  # fmt: skip
    return z, inverse_norms, shifts, padded_classes


def class_sums(z: Tensor, weights: Tensor | None, order: Tensor, starts: Tensor) -> Tensor:
    """Return the sum of rows, or of weight times row, per class [C + 1, E, W] float32."""
    num_exits, num_padded_rows, width = z.shape
    num_classes = starts.shape[0] - 1
    # One class may hold most rows, and the host does not know which: all classes are split.
    num_bytes = max(1, 4 * (num_classes + 1) * num_exits * width)
    limits = (MAX_SPLITS, order.shape[0] // ROWS_PER_SPLIT, MAX_PARTIAL_BYTES // num_bytes)
    num_splits = max(1, min(limits))
    sums = starts.new_empty(num_splits, num_classes + 1, num_exits, width, dtype=torch.float32)
    class_sums_kernel[num_classes + 1, num_splits, num_exits](
        z, z if weights is None else weights, order, starts, sums, num_padded_rows, num_classes,
        WEIGHTED=weights is not None, **row_constants(width, CLASS_SUM_VALUES),
        num_warps=NUM_WARPS,
    )  # fmt: skip
    return sums[0] if num_splits == 1 else sums.sum(0)


def losses(
    partial: PartialSums, rows: Rows, temperature: float, denominator: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return losses [E, M], u = 1 / D [E, M padded] and 1 / number of positives [M padded]."""
    _, num_exits, num_rows = partial.sums.shape
    z, num_padded_rows, width = rows.z, *rows.z.shape[1:]
    found = z.new_empty(num_exits, num_rows, dtype=torch.float32)
    u = z.new_empty(num_exits, num_padded_rows, dtype=torch.float32)
    inverse_positives = z.new_empty(num_padded_rows, dtype=torch.float32)
    constants = row_constants(width)
    losses_kernel[num_padded_rows // constants["BLOCK_ROWS"], num_exits](
        partial.sums, z, rows.classes, rows.sums_by_class, rows.starts, found, u,
        inverse_positives,
        num_rows, num_padded_rows, partial.num_splits, partial.rows_per_part,
        rows.starts.shape[0] - 1, 1 / temperature,
        DENOMINATOR=denominator, **constants, num_warps=NUM_WARPS,
    )  # fmt: skip
    return found, u, inverse_positives


def finish_gradients(
    partial_gradients: Tensor,
    rows: Rows,
    weighted_sums: Tensor,
    v: Tensor,
    factors: Tensor,
    shape: BatchShape,
) -> list[Tensor]:
    """Return gradients [E, N, d] of the samples and, if trained, [E, K, d] of label embeddings.

    partial_gradients: result of `pair_gradient` for the trained rows [splits, E, n, W].
    weighted_sums: `class_sums` of v z [C + 1, E, W]; not read if v is [M padded].
    v: [M padded] if all anchors of a class have the same v, else [E, M padded].
    factors: float32 [E]: factor of all gradients of an exit.
    """
    num_splits, num_exits, num_trained, z_width = partial_gradients.shape
    num_samples, num_labels = shape.num_samples, num_trained - shape.num_samples
    z = rows.z
    gradients = [z.new_empty(num_exits, num_samples, shape.width, dtype=shape.sample_dtype)]
    if shape.trains_labels:
        gradients.append(z.new_empty(num_exits, num_labels, shape.width, dtype=shape.label_dtype))
    constants = row_constants(z_width)
    input_gradient_kernel[triton.cdiv(num_trained, constants["BLOCK_ROWS"]), num_exits](
        partial_gradients, z, rows.inverse_norms, rows.classes, rows.sums_by_class,
        weighted_sums, v, factors, gradients[0], gradients[-1],
        num_splits, num_trained, z.shape[1], num_samples, num_labels,
        shape.width, 1 / shape.temperature,
        PER_ROW=v.dim() == 2, WITH_LABELS=shape.trains_labels,
        **constants, num_warps=NUM_WARPS,
    )  # fmt: skip
    return gradients


def row_constants(width: int, values: int = VALUES) -> dict[str, int]:
    """Return the constants of a kernel for rows of this padded width and `values` per program."""
    block_width = triton.next_power_of_2(width)
    block_rows = min(PADDED_ROWS, values // block_width)
    return {"WIDTH": width, "BLOCK_WIDTH": block_width, "BLOCK_ROWS": block_rows}


def unit_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the unit rows for samples of this dtype."""
    return torch.float16 if dtype in (torch.float16, torch.bfloat16) else torch.float32


def row_variants(dtype: torch.dtype, width: int) -> list[Variant]:
    """List the shipped compilations for unit rows of this dtype and padded width."""
    unit = UNIT_TYPES[dtype]
    types = {
        **part_types(unit[1:]), "z": unit, "classes": "*i64", "padded_classes": "*i32",
        "order": "*i64", "starts": "*i64", "sample_gradient": unit, "label_gradient": unit,
        **dict.fromkeys(FLOAT_ARRAYS, "*fp32"),
        **dict.fromkeys(("shift", "inverse_temperature"), "fp32"),
    }  # fmt: skip
    sums = row_constants(width, CLASS_SUM_VALUES)
    kernels: list[tuple[Any, str, dict[str, Any], dict[str, str]]] = [
        (normalize_kernel, "", {"HAS_LABELS": True, "HAS_TEACHER": True}, {}),
        (losses_kernel, " negatives", {"DENOMINATOR": "negatives"}, {}),
        (class_sums_kernel, "", {"WEIGHTED": False, **sums}, {"weights": unit}),
        (input_gradient_kernel, "", {"PER_ROW": False, "WITH_LABELS": True}, {}),
        (class_sums_kernel, " weighted", {"WEIGHTED": True, **sums}, {}),
        (input_gradient_kernel, " per row", {"PER_ROW": True, "WITH_LABELS": True}, {}),
    ]
    return [
        make_variant(
            f"{kernel.__name__} {unit[1:]} width {width}{kind}",
            kernel,
            {**row_constants(width), **constants},
            {**types, **own_types},
            num_warps=NUM_WARPS,
            num_stages=3,
        )
        for kernel, kind, constants, own_types in kernels
    ]
