"""The contrastive losses of small batches: one launch gives loss and gradient of all exits.

With r_i = 1 / ||x_i||, c_ij = x_i . x_j r_i r_j and e_ij = exp((c_ij - 1) / temperature), 0 where
the denominator leaves the pair out:

    D_i = sum_j e_ij
    L_i = log D_i - sum_{j in P_i} (c_ij - 1) / (n_i temperature)        n_i = |P_i|

Gradient for row weights w_i (upstream, times 1 / #anchors for "mean"; 0 where the anchor does not
count), with p_ij = 1 where j is a positive of i, else 0:

    W_ij = (e_ij (w_i / D_i + w_j / D_j) - p_ij (w_i / n_i + w_j / n_j)) / temperature
    dx_i = r_i (sum_j W_ij r_j x_j - r_i x_i sum_j W_ij c_ij)

sum_j W_ij c_ij is known before the last line, so dx is computed chunk by chunk along d. The
diagonal of W would add a multiple of x_i, which the projection removes: it is left out.

A program computes the gradient of one block of rows of one exit, and r and D of all M rows, on one
of the multiprocessors that a small batch leaves idle: no program waits for another. c is symmetric:
tiles on and right of the diagonal add to the sums of their rows and of their columns. The program
first copies the rows from their tensors, in any dtypes and strides, into scratch memory of its own,
M d float32: with the addresses of four tensors in the loops over pairs every tile size spilled
registers. The copy is transposed, and so are W and dx: in shared memory the threads of a warp then
read neighbouring words of both operands of both products, and no words of the same bank.

Launches: one for the loss and the gradient for upstream 1, one to multiply it by upstream; for
"none" one for the loss and one for the gradient. Where samples and label embeddings differ in
dtype, one more converts the gradient of each that is not float32.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...support import machine
from ...support.variant import Variant, make_variant
from ..autograd import Implementation
from ..batch import ZERO_NORM, Batch, BatchShape
from .parts import STRIDE_NAMES, gather, part_arguments, part_types
from .tiles import float32_obstacle

SHORTEST = tl.constexpr(ZERO_NORM)
LOG2_E = tl.constexpr(1.4426950408889634)

# Numbers whose divisibility gains nothing: one compilation serves all sizes and strides.
NUMBERS = [
    "upstream_exit_stride", "upstream_row_stride", "label_stride", *STRIDE_NAMES,
    "num_samples", "num_labels", "num_rows", "width", "first_trained", "num_trained",
    "ignore_index",
]  # fmt: skip


@triton.jit
def describe(rows, sizes, labels, label_stride, ignore_index):
    """Return the rows, the class of each as int64, and whether each exists."""
    num_samples, num_labels, num_rows, _ = sizes
    # Teacher rows repeat the student's classes.
    position = tl.where(rows < num_samples + num_labels, rows, rows - num_samples - num_labels)
    is_sample = position < num_samples
    exists = rows < num_rows
    label = tl.load(
        labels + position.to(tl.int64) * label_stride, mask=exists & is_sample, other=0
    ).to(tl.int64)
    exists = exists & ((label != ignore_index) | (position >= num_samples))
    return rows, tl.where(is_sample, label, (position - num_samples).to(tl.int64)), exists


@triton.jit
def compare(
    described_rows, described_others, cosines, inverse_temperature, DENOMINATOR: tl.constexpr
):
    """Return tiles [R, J] of e_ij and of whether j is a positive of i."""
    rows, class_of_row, row_exists = described_rows
    others, class_of_other, other_exists = described_others
    compared = row_exists[:, None] & other_exists[None, :]
    same_class = class_of_row[:, None] == class_of_other[None, :]
    itself = rows[:, None] == others[None, :]
    positive = compared & same_class & ~itself
    if DENOMINATOR == "others":
        compared = compared & ~itself
    if DENOMINATOR == "negatives":
        compared = compared & ~same_class
    exponentials = tl.exp2((cosines - 1.0) * (inverse_temperature * LOG2_E))
    return tl.where(compared, exponentials, 0.0), positive


@triton.jit
def add(sums, tile):
    """Add the sums of a tile's columns to the sums in memory."""
    tl.store(sums, tl.load(sums) + tl.sum(tile, 0))


@triton.jit(do_not_specialize=NUMBERS)
def supcon_small_kernel(
    # Written if WITH_LOSS: [E], or [E, M] for "none".
    losses,
    # Written if WITH_GRADIENT: [E, num_trained, d].
    gradient,
    # Scratch memory, of each program: x [d, M]; c_ij of its own rows i, later W_ij r_j [M, BLOCK];
    # r [M]; 1 / D, 1 / n and the sum of c_ij - 1 over positives [M], before them sums over the
    # tiles so far. 1 / D and 1 / n are 0 where the anchor does not count. See `scratch_size`.
    scratch,
    # Read if WITH_GRADIENT for "none": [E, M].
    upstream, upstream_exit_stride, upstream_row_stride,
    labels, label_stride,
    samples, samples_exit_stride, samples_row_stride, samples_column_stride,
    label_rows, label_rows_exit_stride, label_rows_row_stride, label_rows_column_stride,
    teacher, teacher_row_stride, teacher_column_stride,
    teacher_label_rows, teacher_label_rows_row_stride, teacher_label_rows_column_stride,
    num_samples, num_labels, num_rows, width, first_trained, num_trained, ignore_index,
    inverse_temperature,
    HAS_LABELS: tl.constexpr, HAS_TEACHER: tl.constexpr, DENOMINATOR: tl.constexpr,
    REDUCTION: tl.constexpr, WITH_LOSS: tl.constexpr, WITH_GRADIENT: tl.constexpr,
    # Rows and columns of a tile of c, and the number of columns of x that are loaded at once.
    BLOCK: tl.constexpr, OTHERS: tl.constexpr, CHUNK: tl.constexpr, FEW_REGISTERS: tl.constexpr,
    COSINE_PRECISION: tl.constexpr, GRADIENT_PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: exits, blocks of trained rows; the first block of an exit also writes its loss."""
    exit = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    sizes = (num_samples, num_labels, num_rows, width)
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
    # The scratch memory is filled to whole tiles, so that the loops below need no mask.
    padded_rows = tl.cdiv(num_rows, BLOCK) * BLOCK
    padded_width = tl.cdiv(width, CHUNK) * CHUNK
    program = exit * tl.num_programs(1) + block
    x = scratch + program * (padded_rows * (padded_width + BLOCK + 4))
    pair_weights = x + padded_rows * padded_width
    inverse_norms = pair_weights + BLOCK * padded_rows
    inverse_sums = inverse_norms + padded_rows
    inverse_positives = inverse_sums + padded_rows
    distances = inverse_positives + padded_rows

    COPIED: tl.constexpr = CHUNK // 2 if FEW_REGISTERS else CHUNK
    num_existing = 0
    for first_row in range(0, num_rows, BLOCK):
        rows = first_row + tl.arange(0, BLOCK)
        described = describe(rows, sizes, labels, label_stride, ignore_index)
        num_existing += tl.sum(described[2].to(tl.int32), 0)
        # Summed after the loop: a product and the first step of a sum over threads would become one
        # multiply-add, whose rounding differs between threads that have the same sum.
        squares = tl.zeros([BLOCK, COPIED], tl.float32)
        for start in range(0, padded_width, COPIED):
            columns = start + tl.arange(0, COPIED)
            x_rows = gather(rows, described[2], columns, sizes, parts, HAS_LABELS, HAS_TEACHER)
            tl.store(x + columns[None, :] * padded_rows + rows[:, None], x_rows)
            squares += x_rows * x_rows
        norms = tl.sqrt_rn(tl.sum(squares, 1))
        # A NaN is not <= anything: it reaches the loss. 1 / inf gives a zero vector its 0.
        norms = tl.where(norms <= SHORTEST, float("inf"), norms)
        tl.store(inverse_norms + rows, tl.div_rn(1.0, norms))
        zeros = tl.zeros([BLOCK], tl.float32)
        tl.store(inverse_sums + rows, zeros)
        tl.store(inverse_positives + rows, zeros)
        tl.store(distances + rows, zeros)

    loss = 0.0
    num_anchors = 0
    # This program's rows: some may be constants or beyond the last row.
    first_mine = (first_trained // BLOCK + block) * BLOCK
    mine = tl.arange(0, BLOCK)
    for first_row in range(0, num_rows, BLOCK):
        # Other threads of the program read what a thread has written.
        tl.debug_barrier()
        rows = first_row + tl.arange(0, BLOCK)
        described_rows = describe(rows, sizes, labels, label_stride, ignore_index)
        row_norms = tl.load(inverse_norms + rows)
        sums = tl.zeros([BLOCK, OTHERS], tl.float32)
        positive_sums = tl.zeros([BLOCK, OTHERS], tl.float32)
        num_positives = tl.zeros([BLOCK, OTHERS], tl.float32)
        for first_other in range(first_row, num_rows, OTHERS):
            others = first_other + tl.arange(0, OTHERS)
            described_others = describe(others, sizes, labels, label_stride, ignore_index)
            cosines = tl.zeros([BLOCK, OTHERS], tl.float32)
            for start in range(0, padded_width, CHUNK):
                chunk = x + (start + tl.arange(0, CHUNK)) * padded_rows
                if FEW_REGISTERS:
                    x_rows = tl.trans(tl.load(chunk[:, None] + rows[None, :]))
                else:
                    x_rows = tl.load(chunk[None, :] + rows[:, None])
                x_others = tl.load(chunk[:, None] + others[None, :])
                cosines = tl.dot(x_rows, x_others, cosines, input_precision=COSINE_PRECISION)
            cosines *= row_norms[:, None] * tl.load(inverse_norms + others)[None, :]
            exponentials, positive = compare(
                described_rows, described_others, cosines, inverse_temperature, DENOMINATOR
            )
            is_positive = positive.to(tl.float32)
            below_one = tl.where(positive, cosines - 1.0, 0.0)
            sums += exponentials
            num_positives += is_positive
            positive_sums += below_one
            if first_other >= first_row + BLOCK:
                add(inverse_sums + others, exponentials)
                add(inverse_positives + others, is_positive)
                add(distances + others, below_one)
            if WITH_GRADIENT:
                if first_row == first_mine:
                    tl.store(pair_weights + others[None, :] * BLOCK + mine[:, None], cosines)
                elif first_other // BLOCK * BLOCK == first_mine:
                    own = (others - first_mine)[None, :]
                    tl.store(pair_weights + rows[:, None] * BLOCK + own, cosines)
        row_sums = tl.sum(sums, 1) + tl.load(inverse_sums + rows)
        row_positive_sums = tl.sum(positive_sums, 1) + tl.load(distances + rows)
        row_num = tl.sum(num_positives, 1) + tl.load(inverse_positives + rows)
        counts = row_num > 0
        if DENOMINATOR == "negatives":
            counts = counts & (row_num + 1 < num_existing)
        num_anchors += tl.sum(counts.to(tl.int32), 0)
        inverse_num = tl.where(counts, 1.0 / tl.maximum(row_num, 1.0), 0.0)
        # An anchor that does not count may have nothing to compare: no log(0), no 1 / 0.
        row_sums = tl.where(counts, row_sums, 1.0)
        if WITH_LOSS:
            row_losses = tl.log(row_sums) - row_positive_sums * inverse_temperature * inverse_num
            row_losses = tl.where(counts, row_losses, 0.0)
            loss += tl.sum(row_losses, 0)
            if REDUCTION == "none":
                is_mine = (rows < num_rows) & (block == 0)
                tl.store(losses + exit * num_rows + rows, row_losses, mask=is_mine)
        if WITH_GRADIENT:
            tl.store(inverse_sums + rows, tl.where(counts, 1.0 / row_sums, 0.0))
            tl.store(inverse_positives + rows, inverse_num)
    weight = 1.0
    if REDUCTION == "mean":
        weight = 1.0 / tl.maximum(num_anchors, 1).to(tl.float32)
    if WITH_LOSS and REDUCTION != "none":
        tl.store(losses + exit, loss * weight, mask=block == 0)

    if WITH_GRADIENT:
        tl.debug_barrier()
        weight *= inverse_temperature
        rows = first_mine + mine
        described_rows = describe(rows, sizes, labels, label_stride, ignore_index)
        row_sums = tl.load(inverse_sums + rows)
        row_num = tl.load(inverse_positives + rows)
        row_weights = tl.zeros([BLOCK], tl.float32) + weight
        if REDUCTION == "none":
            upstream += exit * upstream_exit_stride
            row_weights *= tl.load(
                upstream + rows.to(tl.int64) * upstream_row_stride, mask=row_num > 0, other=0.0
            )
        projections = tl.zeros([OTHERS, BLOCK], tl.float32)
        for first_other in range(0, num_rows, OTHERS):
            others = first_other + tl.arange(0, OTHERS)
            described_others = describe(others, sizes, labels, label_stride, ignore_index)
            own_pairs = pair_weights + others[:, None] * BLOCK + mine[None, :]
            # Rows beyond the last have no cosines.
            cosines = tl.load(own_pairs, mask=(rows < num_rows)[None, :], other=0.0)
            exponentials, positive = compare(
                described_others, described_rows, cosines, inverse_temperature, DENOMINATOR
            )
            other_sums = tl.load(inverse_sums + others)
            other_num = tl.load(inverse_positives + others)
            other_weights = tl.zeros([OTHERS], tl.float32) + weight
            if REDUCTION == "none":
                other_weights *= tl.load(
                    upstream + others.to(tl.int64) * upstream_row_stride,
                    mask=other_num > 0,
                    other=0.0,
                )
            # e / D is at most 1, whereas w / D may leave float32's range: D may be 1e-38.
            pairs = exponentials * row_sums[None, :] * row_weights[None, :]
            pairs += exponentials * other_sums[:, None] * other_weights[:, None]
            pulls = (row_num * row_weights)[None, :] + (other_num * other_weights)[:, None]
            pairs -= tl.where(positive, pulls, 0.0)
            pairs = tl.where(rows[None, :] != others[:, None], pairs, 0.0)
            projections += pairs * cosines
            tl.store(own_pairs, pairs * tl.load(inverse_norms + others)[:, None])
        tl.debug_barrier()

        row_norms = tl.load(inverse_norms + rows)
        scaled_projections = tl.sum(projections, 0) * row_norms
        trained = rows - first_trained
        is_trained = (trained >= 0) & (trained < num_trained)
        gradient += (exit * num_trained + trained.to(tl.int64)[None, :]) * width
        for start in range(0, padded_width, CHUNK):
            columns = start + tl.arange(0, CHUNK)
            chunk = x + columns[:, None] * padded_rows
            dx = tl.zeros([CHUNK, BLOCK], tl.float32)
            for first_other in range(0, num_rows, OTHERS):
                others = first_other + tl.arange(0, OTHERS)
                pairs = tl.load(pair_weights + others[:, None] * BLOCK + mine[None, :])
                x_others = tl.load(chunk + others[None, :])
                dx = tl.dot(x_others, pairs, dx, input_precision=GRADIENT_PRECISION)
            x_rows = tl.load(chunk + rows[None, :])
            dx = (dx - x_rows * scaled_projections[None, :]) * row_norms[None, :]
            # A row that is ignored or has no direction gets no NaN from other rows either.
            dx = tl.where(row_norms[None, :] != 0, dx, 0.0)
            tl.store(
                gradient + columns[:, None],
                dx,
                mask=is_trained[None, :] & (columns < width)[:, None],
            )


# By passes of shared memory, counted on compiled code (docs/kernels.md): 8 warps take a third more
# than 4. Tiles of 32 x 32 take a fifth less from M = 64 on, but a tenth more at M = 34, which they
# pad to 64. Chunks of 64 columns spill registers on sm_70 and sm_75, chunks of 16 on sm_70.
BLOCK, OTHERS, CHUNK = 32, 16, 32
NUM_WARPS = 4


def machine_constants(capability: int, *dtypes: torch.dtype) -> dict[str, Any]:
    """Return the constants for parts of these dtypes on such a GPU.

    The precisions are those of tl.dot with float32 operands, for x_i . x_j and for W x. Below sm_80
    Triton reaches no matrix unit. 16-bit numbers are exact in tf32; an operand with more digits is
    split by tf32x3, and the error is float32's. W is always split: a gradient's terms may cancel.
    """
    cosines, gradients = ("tf32x3" if torch.float32 in dtypes else "tf32"), "tf32x3"
    if capability < 80:
        cosines, gradients = "ieee", "ieee"
    return {
        "BLOCK": BLOCK, "OTHERS": OTHERS, "CHUNK": CHUNK,
        # Without it Triton 3.3.1 spills on sm_70. With it other versions spill on other GPUs, and
        # the matrix unit's operands meet in few banks of shared memory.
        "FEW_REGISTERS": capability < 75,
        "COSINE_PRECISION": cosines, "GRADIENT_PRECISION": gradients,
    }  # fmt: skip


def scratch_size(num_rows: int, width: int) -> int:
    """Return the number of float32 values in the scratch memory of a program."""
    padded_rows = triton.cdiv(num_rows, BLOCK) * BLOCK
    return padded_rows * (triton.cdiv(width, CHUNK) * CHUNK + BLOCK + 4)


def launch(
    parts: list[Tensor],
    labels: Tensor,
    options: Batch | BatchShape,
    trained: tuple[int, int],
    losses: Tensor | None,
    gradient: Tensor | None,
    upstream: Tensor | None,
) -> None:
    """Write `losses` and, for the rows from trained[0] up to trained[1], `gradient`."""
    samples = parts[0]
    num_exits = 1 if samples.dim() == 2 else samples.shape[0]
    num_samples, width = samples.shape[-2:]
    num_labels = parts[1].shape[-2] if len(parts) > 1 else 0
    num_rows = sum(part.shape[-2] for part in parts)
    num_trained = 0 if gradient is None else trained[1] - trained[0]
    num_blocks = triton.cdiv(trained[1], BLOCK) - trained[0] // BLOCK if num_trained else 1
    if num_exits == 0:
        return
    capability = machine.capability(samples.device)
    assert capability is not None, "machine.triton_obstacle has checked"
    constants = machine_constants(capability, *(part.dtype for part in parts))
    size = num_exits * num_blocks * scratch_size(num_rows, width)
    scratch = samples.new_empty(size, dtype=torch.float32)
    upstream_strides = (0, 0) if upstream is None else upstream.stride()
    # An absent tensor is never read, but needs an address.
    with torch.cuda.device_of(samples):
        supcon_small_kernel[(num_exits, num_blocks)](
            scratch if losses is None else losses,
            scratch if gradient is None else gradient,
            scratch,
            scratch if upstream is None else upstream,
            *upstream_strides if len(upstream_strides) == 2 else (0, *upstream_strides),
            labels, labels.stride(0),
            *part_arguments(parts),
            num_samples, num_labels, num_rows, width, trained[0], num_trained,
            options.ignore_index, 1 / options.temperature,
            HAS_LABELS=len(parts) > 1, HAS_TEACHER=len(parts) > 2,
            DENOMINATOR=options.denominator, REDUCTION=options.reduction,
            WITH_LOSS=losses is not None, WITH_GRADIENT=gradient is not None,
            **constants, num_warps=NUM_WARPS,
        )  # fmt: skip


def forward(batch: Batch, *trained: bool) -> tuple[Tensor, list[Tensor]]:
    """Return the loss and, except for "none", the gradient of the trained rows for upstream 1."""
    losses, gradients = allocate(batch, *trained)
    gradient = gradients[0] if gradients and gradients[0].shape[-2] > 0 else None
    rows = batch.shape(*trained).trained_rows
    launch(batch.parts, batch.labels, batch, rows, losses, gradient, None)
    return losses, gradients


def allocate(batch: Batch, *trained: bool) -> tuple[Tensor, list[Tensor]]:
    """Allocate the results of `forward`."""
    x = batch.embeddings
    losses = x.new_empty(batch.loss_shape, dtype=torch.float32)
    if batch.reduction == "none" or not any(trained):
        return losses, []
    first, last = batch.shape(*trained).trained_rows
    return losses, [x.new_empty((*batch.leading, last - first, x.shape[-1]), dtype=torch.float32)]


def backward(loss_gradient: Tensor, saved: list[Tensor], shape: BatchShape) -> list[Tensor]:
    """Return one gradient [.., n, d] of the trained rows."""
    (gradient,) = allocate_gradient(loss_gradient, saved, shape)
    if shape.reduction != "none":
        # One launch: the product is rounded to the dtype of the inputs where it is written.
        torch.mul(saved[0], loss_gradient[..., None, None], out=gradient)
    elif gradient.numel() > 0:
        labels, *parts = saved
        launch(parts, labels, shape, shape.trained_rows, None, gradient, loss_gradient)
    return [gradient]


def allocate_gradient(
    loss_gradient: Tensor, saved: list[Tensor], shape: BatchShape
) -> list[Tensor]:
    """Allocate the gradient of `backward`, in a dtype that suits all trained rows."""
    same_dtype = shape.label_dtype in (None, shape.sample_dtype)
    dtype = shape.sample_dtype if same_dtype else torch.float32
    if shape.reduction != "none":
        return [torch.empty_like(saved[0], dtype=dtype)]
    first, last = shape.trained_rows
    leading = loss_gradient.shape[:-1]
    return [loss_gradient.new_empty((*leading, last - first, shape.width), dtype=dtype)]


implementation = Implementation(
    "supcon_small", "triton", (forward, backward), (allocate, allocate_gradient),
    joint=True,
    # The gradient for "none" is computed in the backward pass.
    inputs_to_save=lambda batch: (
        [batch.labels, *batch.parts] if batch.reduction == "none" else []
    ),
)  # fmt: skip


def obstacle(width: int, dtype: torch.dtype, temperature: float, capability: int) -> str | None:
    """Return why the kernel cannot compute such a loss, or None."""
    return float32_obstacle(dtype, temperature)


def variants(capability: int) -> list[Variant]:
    """List the shipped compilations: loss and gradient per dtype, the gradient alone for "none".

    These options include the code of all others. Numbers are not specialized, so sizes and strides
    add no variant. bfloat16 differs from float16 only in loads and stores, and "none" has both.
    """
    types = {
        **dict.fromkeys(("losses", "scratch", "upstream"), "*fp32"), "labels": "*i64",
        "inverse_temperature": "fp32",
    }  # fmt: skip
    shipped = []
    for dtype, name, reduction in (
        (torch.float16, "fp16", "mean"),
        (torch.float32, "fp32", "mean"),
        (torch.bfloat16, "bf16", "none"),
    ):
        gradient = f"*{name}" if reduction == "none" else "*fp32"
        constants = {
            "HAS_LABELS": True, "HAS_TEACHER": True, "DENOMINATOR": "negatives",
            "REDUCTION": reduction, "WITH_LOSS": reduction != "none", "WITH_GRADIENT": True,
            **machine_constants(capability, dtype),
        }  # fmt: skip
        shipped.append(
            make_variant(
                f"supcon_small {name} {reduction}",
                supcon_small_kernel,
                constants,
                {**types, **part_types(name), "gradient": gradient},
                num_warps=NUM_WARPS,
                matrix_unit=capability >= 80,
            )
        )
    return shipped
