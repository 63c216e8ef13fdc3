"""What the contrastive losses of large batches compute row by row, between the sums over pairs.

    normalize           z_i = x_i / ||x_i||
    class_sums          C = sum of z_j, or A = sum of v_j z_j, over a class's rows
    losses              L_i = log D_i + (1 - z_i . (C_i - z_i) / n_i) / temperature
                        u_i = 1 / D_i, and 1 / n_i; 0 for what is not an anchor
    finish_gradients    G_i  = P_i - v_i (C_i - z_i) - (A_i - v_i z_i)
                        dx_i = (G_i - z_i (z_i . G_i)) factor / (temperature ||x_i||)

D_i and P_i are the sums over pairs, n_i is the number of i's positives, v_i = w_i / n_i for row
weights w_i, and factor what was taken out of all weights.

`normalize` reads the inputs wherever they lie and writes the unit rows once, one after the other
and padded with zeros: float16 for 16-bit samples (|z| <= 1, and of the two 16-bit formats it has
three bits more), else float32.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...support.variant import Variant
from ..batch import ZERO_NORM
from .pair_sums import (
    MAX_PARTIAL_BYTES,
    MAX_SPLITS,
    UNIT_TYPES,
    exponent_scale,
    padded,
    padded_width,
)
from .tiles import PADDED_ROWS

# Few values for each thread spill no registers and keep many programs in flight. Sums of classes
# loop over rows and take more at once.
NUM_WARPS = 8
VALUES = 32 * NUM_WARPS * 4
CLASS_SUM_VALUES = 32 * NUM_WARPS * 16
# Rows of a class that one program adds up.
ROWS_PER_SPLIT = 256

SHORTEST = tl.constexpr(ZERO_NORM)
SMALLEST = tl.constexpr(torch.finfo(torch.float32).tiny)


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


def normalize(
    embeddings: Tensor,
    label_embeddings: Tensor | None,
    teacher_embeddings: Tensor | None,
    teacher_label_embeddings: Tensor | None,
    classes: Tensor,
    num_classes: int,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unit rows [E, M padded, W], 1 / norms [E, M padded], shifts and classes [M padded].

    Shifts and classes as `pair_kernels` wants them, from classes [M], where `num_classes` means
    that a row is ignored.
    """
    num_exits = embeddings.shape[0] if embeddings.dim() == 3 else 1
    num_samples, width = embeddings.shape[-2:]
    num_labels = 0 if label_embeddings is None else label_embeddings.shape[-2]
    num_rows, num_padded_rows = classes.shape[0], padded(classes.shape[0])
    z = embeddings.new_empty(
        num_exits, num_padded_rows, padded_width(width), dtype=unit_dtype(embeddings.dtype)
    )
    inverse_norms = z.new_empty(num_exits, num_padded_rows, dtype=torch.float32)
    shifts = z.new_empty(num_padded_rows, dtype=torch.float32)
    padded_classes = classes.new_empty(num_padded_rows, dtype=torch.int32)
    constants = row_constants(z.shape[-1])
    normalize_kernel[num_padded_rows // constants["BLOCK_ROWS"], num_exits](
        *part_arguments(embeddings, label_embeddings, teacher_embeddings, teacher_label_embeddings),
        classes, z, inverse_norms, shifts, padded_classes,
        num_samples, num_labels, num_rows, num_padded_rows, num_classes,
        width, -exponent_scale(temperature),
        HAS_LABELS=label_embeddings is not None, HAS_TEACHER=teacher_embeddings is not None,
        **constants, num_warps=NUM_WARPS,
    )  # fmt: skip
    return z, inverse_norms, shifts, padded_classes


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


def class_sums(z: Tensor, weights: Tensor | None, order: Tensor, starts: Tensor) -> Tensor:
    """The sum of the rows, or of weight times row, of each class [C + 1, E, W] float32."""
    num_exits, num_padded_rows, width = z.shape
    num_classes = starts.shape[0] - 1
    # One class may hold most rows. The host does not know which: all are split, as far as their
    # partial sums' memory is bounded.
    num_bytes = max(1, 4 * (num_classes + 1) * num_exits * width)
    num_splits = min(MAX_SPLITS, order.shape[0] // ROWS_PER_SPLIT, MAX_PARTIAL_BYTES // num_bytes)
    num_splits = max(1, num_splits)
    sums = starts.new_empty(num_splits, num_classes + 1, num_exits, width, dtype=torch.float32)
    class_sums_kernel[num_classes + 1, num_splits, num_exits](
        z, z if weights is None else weights, order, starts, sums, num_padded_rows, num_classes,
        WEIGHTED=weights is not None, **row_constants(width, CLASS_SUM_VALUES),
        num_warps=NUM_WARPS,
    )  # fmt: skip
    return sums[0] if num_splits == 1 else sums.sum(0)


def losses(
    partial_sums: Tensor,
    z: Tensor,
    padded_classes: Tensor,
    sums_by_class: Tensor,
    starts: Tensor,
    temperature: float,
    denominator: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The losses [E, M], u = 1 / D [E, M padded] and 1 / number of positives [M padded].

    Args:
        partial_sums: of `row_sums` [splits, E, M].
        sums_by_class: of `class_sums` [C + 1, E, W].
        starts: int64 [C + 1]: where a class begins among the rows by class.
    """
    num_splits, num_exits, num_rows = partial_sums.shape
    _, num_padded_rows, width = z.shape
    found = z.new_empty(num_exits, num_rows, dtype=torch.float32)
    u = z.new_empty(num_exits, num_padded_rows, dtype=torch.float32)
    inverse_positives = z.new_empty(num_padded_rows, dtype=torch.float32)
    constants = row_constants(width)
    losses_kernel[num_padded_rows // constants["BLOCK_ROWS"], num_exits](
        partial_sums, z, padded_classes, sums_by_class, starts, found, u, inverse_positives,
        num_rows, num_padded_rows, num_splits, starts.shape[0] - 1, 1 / temperature,
        DENOMINATOR=denominator, **constants, num_warps=NUM_WARPS,
    )  # fmt: skip
    return found, u, inverse_positives


def finish_gradients(
    partial_gradients: Tensor,
    z: Tensor,
    inverse_norms: Tensor,
    padded_classes: Tensor,
    sums_by_class: Tensor,
    weighted_sums: Tensor,
    v: Tensor,
    factors: Tensor,
    num_samples: int,
    width: int,
    temperature: float,
    sample_dtype: torch.dtype,
    label_dtype: torch.dtype | None,
) -> list[Tensor]:
    """Gradients [E, N, d] of the samples and, unless label_dtype is None, [E, K, d].

    Args:
        partial_gradients: of `pair_gradient` for the rows with a gradient [splits, E, N + K, W].
        sums_by_class, weighted_sums: of `class_sums` for z and for v z [C + 1, E, W].
        v: [M padded], the same for all anchors of a class, which makes weighted_sums v times
            sums_by_class, so that any tensor may stand for it; or [E, M padded], any.
        factors: float32 [E]: by which everything is multiplied.
    """
    num_splits, num_exits, num_trained, z_width = partial_gradients.shape
    num_labels = num_trained - num_samples
    gradients = [z.new_empty(num_exits, num_samples, width, dtype=sample_dtype)]
    if label_dtype is not None:
        gradients.append(z.new_empty(num_exits, num_labels, width, dtype=label_dtype))
    constants = row_constants(z_width)
    input_gradient_kernel[triton.cdiv(num_trained, constants["BLOCK_ROWS"]), num_exits](
        partial_gradients, z, inverse_norms, padded_classes, sums_by_class, weighted_sums,
        v, factors, gradients[0], gradients[-1],
        num_splits, num_trained, z.shape[1], num_samples, num_labels,
        width, 1 / temperature,
        PER_ROW=v.dim() == 2, WITH_LABELS=label_dtype is not None,
        **constants, num_warps=NUM_WARPS,
    )  # fmt: skip
    return gradients


def row_constants(width: int, values: int = VALUES) -> dict[str, int]:
    """The constants of a kernel that takes so many values of rows of this padded width at once."""
    block_width = triton.next_power_of_2(width)
    block_rows = min(PADDED_ROWS, values // block_width)
    return {"WIDTH": width, "BLOCK_WIDTH": block_width, "BLOCK_ROWS": block_rows}


def unit_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the unit rows for samples of this dtype."""
    return torch.float16 if dtype in (torch.float16, torch.bfloat16) else torch.float32


def row_variants(dtype: torch.dtype, width: int) -> list[Variant]:
    """The kernels as they are shipped for unit rows of this dtype and padded width."""
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
        Variant(
            name=f"{kernel.__name__} {unit[1:]} width {width}{kind}",
            kernel=kernel,
            types=types,
            constants={**row_constants(width), **constants},
            num_warps=NUM_WARPS,
            num_stages=3,
            divisible_by_16=frozenset(name for name in types if types[name][0] == "*"),
        )
        for kernel, kind, types, constants in kernels
    ]
