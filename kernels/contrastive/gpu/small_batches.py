"""The contrastive losses of small batches: one launch gives loss and gradient of all exits.

With r_i = 1 / ||x_i||, c_ij = x_i . x_j r_i r_j and e_ij = exp((c_ij - 1) / temperature), 0 where
the denominator leaves the pair out:

    D_i = sum_j e_ij
    L_i = log D_i - sum_{j in P_i} (c_ij - 1) / (n_i temperature)        n_i = |P_i|

Gradient for row weights w_i (upstream, times 1 / #anchors for "mean"; 0 where the anchor does not
count), with p_ij = 1 where j is a positive of i, else 0:

    W_ij = (e_ij (w_i / D_i + w_j / D_j) - p_ij (w_i / n_i + w_j / n_j)) / temperature
    dx_i = r_i (sum_j W_ij r_j x_j - r_i x_i sum_j W_ij c_ij)

sum_j W_ij c_ij is known before the last line, so dx is finished chunk by chunk along d. The
diagonal of W would add a multiple of x_i, which the projection removes: it is left out. The shift
1 / temperature replaces a running maximum, for no c_ij is above 1.

A program finishes the gradient of one block of rows of one exit, and computes r and D of all M rows
itself: 2 M^2 d + 4 M^2 d / B operations on each of B multiprocessors, which a small batch leaves
idle, instead of 6 M^2 d on one, and no program waits for another. It first gathers the parts, in
any dtypes and strides, into notes of its own, M d float32: the loops over pairs then read whole
aligned tiles of one tensor. With the four parts' addresses in those loops every tile size spilled
registers.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...support import machine
from ...support.variant import Variant
from ..batch import ZERO_NORM

MAX_ROWS = 256
# The smallest exponential, exp(-2 / temperature), stays a normal float32 down to here.
MIN_TEMPERATURE = 0.023

SHORTEST = tl.constexpr(ZERO_NORM)
LOG2_E = tl.constexpr(1.4426950408889634)

PARTS = ("samples", "label_rows", "teacher", "teacher_label_rows")
# Numbers by whose divisibility nothing is gained: one compilation serves all sizes and strides.
NUMBERS = [
    "upstream_exit_stride", "upstream_row_stride", "label_stride",
    "samples_exit_stride", "samples_row_stride", "samples_column_stride",
    "label_rows_exit_stride", "label_rows_row_stride", "label_rows_column_stride",
    "teacher_row_stride", "teacher_column_stride",
    "teacher_label_rows_row_stride", "teacher_label_rows_column_stride",
    "num_samples", "num_labels", "num_rows", "width", "first_trained", "num_trained",
    "ignore_index",
]  # fmt: skip


@triton.jit
def describe(rows, sizes, labels, label_stride, ignore_index):
    """The rows, the class of each, int64, and whether it exists."""
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
def load_part(part, rows, columns, wanted):
    """x [R, CHUNK] float32 of one part, 0 where it is not wanted."""
    start, row_stride, column_stride = part
    row_offsets = rows.to(tl.int64)[:, None] * row_stride
    column_offsets = columns.to(tl.int64)[None, :] * column_stride
    return tl.load(start + row_offsets + column_offsets, mask=wanted, other=0.0).to(tl.float32)


@triton.jit
def gather(described, columns, sizes, parts, HAS_LABELS: tl.constexpr, HAS_TEACHER: tl.constexpr):
    """x [R, CHUNK] float32; 0 for a row that does not exist, so that its NaN goes nowhere."""
    rows, _, exists = described
    num_samples, num_labels, _, width = sizes
    wanted = exists[:, None] & (columns < width)[None, :]
    x = load_part(parts[0], rows, columns, wanted & (rows < num_samples)[:, None])
    if HAS_LABELS:
        position = rows - num_samples
        here = (position >= 0) & (position < num_labels)
        x += load_part(parts[1], position, columns, wanted & here[:, None])
    if HAS_TEACHER:
        position = rows - num_samples - num_labels
        here = (position >= 0) & (position < num_samples)
        x += load_part(parts[2], position, columns, wanted & here[:, None])
        position -= num_samples
        x += load_part(parts[3], position, columns, wanted & (position >= 0)[:, None])
    return x


@triton.jit
def compare(
    described_rows,
    described_others,
    x,
    inverse_norms,
    padded_width,
    inverse_temperature,
    DENOMINATOR: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile [R, J] of c_ij, of e_ij, and of whether j is a positive of i."""
    rows, class_of_row, row_exists = described_rows
    others, class_of_other, other_exists = described_others
    columns = tl.arange(0, CHUNK)
    row_starts = x + rows[:, None] * padded_width + columns[None, :]
    other_starts = x + others[None, :] * padded_width + columns[:, None]
    cosines = tl.zeros([rows.shape[0], others.shape[0]], tl.float32)
    for start in range(0, padded_width, CHUNK):
        x_rows = tl.load(row_starts + start)
        x_others = tl.load(other_starts + start)
        cosines = tl.dot(x_rows, x_others, cosines, input_precision=PRECISION)
    cosines *= tl.load(inverse_norms + rows)[:, None] * tl.load(inverse_norms + others)[None, :]

    compared = row_exists[:, None] & other_exists[None, :]
    same_class = class_of_row[:, None] == class_of_other[None, :]
    itself = rows[:, None] == others[None, :]
    positive = compared & same_class & ~itself
    if DENOMINATOR == "others":
        compared = compared & ~itself
    if DENOMINATOR == "negatives":
        compared = compared & ~same_class
    exponentials = tl.exp2((cosines - 1.0) * (inverse_temperature * LOG2_E))
    return cosines, tl.where(compared, exponentials, 0.0), positive


@triton.jit(do_not_specialize=NUMBERS)
def supcon_small_kernel(
    # Written if WITH_LOSS: [E], or [E, M] for "none".
    losses,
    # Written if WITH_GRADIENT: [E, num_trained, d].
    gradient,
    # What a program notes for itself: x [M, d], W_ij r_j of its own rows i [BLOCK, M], r [M],
    # 1 / D [M] and 1 / n [M], the last two 0 where the anchor does not count. See `notes_size`.
    notes,
    # Read if WITH_GRADIENT, for "none": [E, M].
    upstream,
    upstream_exit_stride,
    upstream_row_stride,
    labels,
    label_stride,
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
    num_samples,
    num_labels,
    num_rows,
    width,
    first_trained,
    num_trained,
    ignore_index,
    inverse_temperature,
    HAS_LABELS: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    DENOMINATOR: tl.constexpr,
    REDUCTION: tl.constexpr,
    WITH_LOSS: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    # Rows and columns of a tile, and the part of d that is loaded at once.
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    COSINE_PRECISION: tl.constexpr,
    GRADIENT_PRECISION: tl.constexpr,
):
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
    # The notes are filled to whole tiles, so that the loops below need no mask.
    padded_rows = tl.cdiv(num_rows, BLOCK) * BLOCK
    padded_width = tl.cdiv(width, CHUNK) * CHUNK
    program = exit * tl.num_programs(1) + block
    x = notes + program * (padded_rows * (padded_width + BLOCK + 3))
    pair_weights = x + padded_rows * padded_width
    inverse_norms = pair_weights + BLOCK * padded_rows
    inverse_sums = inverse_norms + padded_rows
    inverse_positives = inverse_sums + padded_rows

    num_existing = 0
    for first_row in range(0, num_rows, BLOCK):
        rows = first_row + tl.arange(0, BLOCK)
        described = describe(rows, sizes, labels, label_stride, ignore_index)
        num_existing += tl.sum(described[2].to(tl.int32), 0)
        squares = tl.zeros([BLOCK], tl.float32)
        for start in range(0, padded_width, CHUNK):
            columns = start + tl.arange(0, CHUNK)
            x_rows = gather(described, columns, sizes, parts, HAS_LABELS, HAS_TEACHER)
            tl.store(x + rows[:, None] * padded_width + columns[None, :], x_rows)
            squares += tl.sum(x_rows * x_rows, 1)
        norms = tl.sqrt(squares)
        # NaN is not <= anything: it goes through to the loss. 1 / inf is a zero vector's 0.
        norms = tl.where(norms <= SHORTEST, float("inf"), norms)
        tl.store(inverse_norms + rows, 1.0 / norms)
    # What one thread notes, others of the program read.
    tl.debug_barrier()

    loss = 0.0
    num_anchors = 0
    for first_row in range(0, num_rows, BLOCK):
        rows = first_row + tl.arange(0, BLOCK)
        described_rows = describe(rows, sizes, labels, label_stride, ignore_index)
        sums = tl.zeros([BLOCK], tl.float32)
        positive_sums = tl.zeros([BLOCK], tl.float32)
        num_positives = tl.zeros([BLOCK], tl.int32)
        for first_other in range(0, num_rows, BLOCK):
            others = first_other + tl.arange(0, BLOCK)
            described_others = describe(others, sizes, labels, label_stride, ignore_index)
            cosines, exponentials, positive = compare(
                described_rows, described_others, x, inverse_norms, padded_width,
                inverse_temperature, DENOMINATOR, CHUNK, COSINE_PRECISION,
            )  # fmt: skip
            sums += tl.sum(exponentials, 1)
            positive_sums += tl.sum(tl.where(positive, cosines - 1.0, 0.0), 1)
            num_positives += tl.sum(positive.to(tl.int32), 1)
        counts = num_positives > 0
        if DENOMINATOR == "negatives":
            counts = counts & (num_positives + 1 < num_existing)
        num_anchors += tl.sum(counts.to(tl.int32), 0)
        inverse_num = tl.where(counts, 1.0 / tl.maximum(num_positives, 1).to(tl.float32), 0.0)
        # An anchor that does not count may have nothing to compare: no log(0), no 1 / 0.
        sums = tl.where(counts, sums, 1.0)
        if WITH_LOSS:
            row_losses = tl.log(sums) - positive_sums * inverse_temperature * inverse_num
            row_losses = tl.where(counts, row_losses, 0.0)
            loss += tl.sum(row_losses, 0)
            if REDUCTION == "none":
                is_mine = (rows < num_rows) & (block == 0)
                tl.store(losses + exit * num_rows + rows, row_losses, mask=is_mine)
        if WITH_GRADIENT:
            tl.store(inverse_sums + rows, tl.where(counts, 1.0 / sums, 0.0))
            tl.store(inverse_positives + rows, inverse_num)
    weight = 1.0
    if REDUCTION == "mean":
        weight = 1.0 / tl.maximum(num_anchors, 1).to(tl.float32)
    if WITH_LOSS and REDUCTION != "none":
        tl.store(losses + exit, loss * weight, mask=block == 0)

    if WITH_GRADIENT:
        tl.debug_barrier()
        weight *= inverse_temperature
        trained = block * BLOCK + tl.arange(0, BLOCK)
        is_trained = trained < num_trained
        # Past the end a row is computed again, and not written.
        rows = tl.minimum(first_trained + trained, num_rows - 1)
        described_rows = describe(rows, sizes, labels, label_stride, ignore_index)
        row_sums = tl.load(inverse_sums + rows)
        row_num = tl.load(inverse_positives + rows)
        row_weights = tl.zeros([BLOCK], tl.float32) + weight
        if REDUCTION == "none":
            upstream += exit * upstream_exit_stride
            row_weights *= tl.load(
                upstream + rows.to(tl.int64) * upstream_row_stride, mask=row_num > 0, other=0.0
            )
        projections = tl.zeros([BLOCK], tl.float32)
        own_weights = pair_weights + tl.arange(0, BLOCK)[:, None] * padded_rows
        for first_other in range(0, num_rows, BLOCK):
            others = first_other + tl.arange(0, BLOCK)
            described_others = describe(others, sizes, labels, label_stride, ignore_index)
            cosines, exponentials, positive = compare(
                described_rows, described_others, x, inverse_norms, padded_width,
                inverse_temperature, DENOMINATOR, CHUNK, COSINE_PRECISION,
            )  # fmt: skip
            other_sums = tl.load(inverse_sums + others)
            other_num = tl.load(inverse_positives + others)
            other_weights = tl.zeros([BLOCK], tl.float32) + weight
            if REDUCTION == "none":
                other_weights *= tl.load(
                    upstream + others.to(tl.int64) * upstream_row_stride,
                    mask=other_num > 0,
                    other=0.0,
                )
            # e / D is at most 1, whereas w / D may leave float32: D goes down to 1e-38.
            pairs = exponentials * row_sums[:, None] * row_weights[:, None]
            pairs += exponentials * other_sums[None, :] * other_weights[None, :]
            pulls = (row_num * row_weights)[:, None] + (other_num * other_weights)[None, :]
            pairs -= tl.where(positive, pulls, 0.0)
            pairs = tl.where(rows[:, None] != others[None, :], pairs, 0.0)
            projections += tl.sum(pairs * cosines, 1)
            pairs *= tl.load(inverse_norms + others)[None, :]
            tl.store(own_weights + others[None, :], pairs)
        tl.debug_barrier()

        row_norms = tl.load(inverse_norms + rows)
        projections *= row_norms
        gradient += (exit * num_trained + trained.to(tl.int64)[:, None]) * width
        for start in range(0, padded_width, CHUNK):
            columns = start + tl.arange(0, CHUNK)
            dx = tl.zeros([BLOCK, CHUNK], tl.float32)
            for first_other in range(0, num_rows, BLOCK):
                others = first_other + tl.arange(0, BLOCK)
                pairs = tl.load(own_weights + others[None, :])
                x_others = tl.load(x + others[:, None] * padded_width + columns[None, :])
                dx = tl.dot(pairs, x_others, dx, input_precision=GRADIENT_PRECISION)
            x_rows = tl.load(x + rows[:, None] * padded_width + columns[None, :])
            dx = (dx - x_rows * projections[:, None]) * row_norms[:, None]
            # A row that is ignored or has no direction gets no NaN from others either.
            dx = tl.where(row_norms[:, None] != 0, dx, 0.0)
            tl.store(
                gradient + columns[None, :],
                dx,
                mask=is_trained[:, None] & (columns < width)[None, :],
            )


# Rows and columns of a tile: with 64, float32 rows spill registers.
BLOCK = 32
NUM_WARPS = 8


def chunk(capability: int) -> int:
    """Width of a chunk of d: 64 spills registers on sm_80 and sm_90, 32 on sm_75."""
    return 64 if capability == 75 else 32


def notes_size(num_rows: int, width: int, capability: int) -> int:
    """How many float32 a program notes."""
    padded_rows = triton.cdiv(num_rows, BLOCK) * BLOCK
    padded_width = triton.cdiv(width, chunk(capability)) * chunk(capability)
    return padded_rows * (padded_width + BLOCK + 3)


def precisions(capability: int, *dtypes: torch.dtype) -> tuple[str, str]:
    """What tl.dot does with float32 operands, for x_i . x_j and for W x.

    Below sm_80 Triton reaches no matrix unit. 16-bit numbers are exact in tf32; where an
    operand has more digits, tf32x3 splits it, and the error is float32's. W is split always: it
    costs one of B + 2 shares of the work, and a gradient is a difference.
    """
    if capability < 80:
        return "ieee", "ieee"
    return ("tf32x3" if torch.float32 in dtypes else "tf32"), "tf32x3"


def launch(
    parts: list[Tensor],
    labels: Tensor,
    options: tuple[float, str, str, int],
    trained: tuple[int, int],
    losses: Tensor | None,
    gradient: Tensor | None,
    upstream: Tensor | None,
) -> None:
    """Writes `losses` and, for the rows from trained[0] up to trained[1], `gradient`."""
    temperature, denominator, reduction, ignore_index = options
    samples = parts[0]
    # What is absent is never read, but needs an address.
    label_rows = parts[1] if len(parts) > 1 else samples
    teacher, teacher_label_rows = parts[2:] if len(parts) > 2 else (samples, samples)
    num_exits = 1 if samples.dim() == 2 else samples.shape[0]
    num_samples, width = samples.shape[-2:]
    num_labels = label_rows.shape[-2] if len(parts) > 1 else 0
    num_rows = sum(part.shape[-2] for part in parts)
    num_trained = 0 if gradient is None else trained[1] - trained[0]
    num_blocks = max(1, triton.cdiv(num_trained, BLOCK))
    if num_exits == 0:
        return
    capability = machine.capability(samples.device)
    assert capability is not None, "machine.triton_obstacle has looked"
    notes = samples.new_empty(
        num_exits * num_blocks * notes_size(num_rows, width, capability), dtype=torch.float32
    )
    cosine_precision, gradient_precision = precisions(capability, *(part.dtype for part in parts))
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(samples):
        supcon_small_kernel[(num_exits, num_blocks)](
            notes if losses is None else losses,
            notes if gradient is None else gradient,
            notes,
            notes if upstream is None else upstream,
            *((0, 0) if upstream is None else exit_strides(upstream, 1)),
            labels, labels.stride(0),
            samples, *exit_strides(samples),
            label_rows, *exit_strides(label_rows),
            teacher, *teacher.stride()[-2:],
            teacher_label_rows, *teacher_label_rows.stride()[-2:],
            num_samples, num_labels, num_rows, width, trained[0], num_trained,
            ignore_index, 1 / temperature,
            HAS_LABELS=len(parts) > 1,
            HAS_TEACHER=len(parts) > 2,
            DENOMINATOR=denominator,
            REDUCTION=reduction,
            WITH_LOSS=losses is not None,
            WITH_GRADIENT=gradient is not None,
            BLOCK=BLOCK,
            CHUNK=chunk(capability),
            COSINE_PRECISION=cosine_precision,
            GRADIENT_PRECISION=gradient_precision,
            num_warps=NUM_WARPS,
        )  # fmt: skip


def exit_strides(tensor: Tensor, num_dims: int = 2) -> tuple[int, ...]:
    """Strides with that of the exits first, 0 where there are none."""
    return tensor.stride() if tensor.dim() > num_dims else (0, *tensor.stride())


def present(*parts: Tensor | None) -> list[Tensor]:
    """The parts that are there, in row order."""
    return [part for part in parts if part is not None]


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
    first_trained: int,
    last_trained: int,
) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient [.., rows, d] float32 with respect to the trained rows.

    The gradient is that for upstream 1, [.., 0, d] where upstream is no factor of it ("none").
    """
    parts = present(embeddings, label_embeddings, teacher_embeddings, teacher_label_embeddings)
    losses, gradient = allocate(parts, reduction, first_trained, last_trained)
    launch(
        parts, labels, (temperature, denominator, reduction, ignore_index),
        (first_trained, last_trained),
        losses, gradient if gradient.shape[-2] > 0 else None, None,
    )  # fmt: skip
    return losses, gradient


def allocate(
    parts: list[Tensor], reduction: str, first_trained: int, last_trained: int
) -> tuple[Tensor, Tensor]:
    """The tensors that `forward` returns."""
    leading, width = parts[0].shape[:-2], parts[0].shape[-1]
    num_rows = sum(part.shape[-2] for part in parts)
    per_row = reduction == "none"
    num_trained = 0 if per_row else last_trained - first_trained
    losses = parts[0].new_empty((*leading, num_rows) if per_row else leading, dtype=torch.float32)
    return losses, parts[0].new_empty((*leading, num_trained, width), dtype=torch.float32)


def backward(
    loss_gradient: Tensor,
    embeddings: Tensor,
    labels: Tensor,
    label_embeddings: Tensor | None,
    teacher_embeddings: Tensor | None,
    teacher_label_embeddings: Tensor | None,
    temperature: float,
    denominator: str,
    ignore_index: int,
    first_trained: int,
    last_trained: int,
) -> Tensor:
    """Gradient [.., rows, d] with respect to the trained rows, for upstream [.., M] ("none")."""
    parts = present(embeddings, label_embeddings, teacher_embeddings, teacher_label_embeddings)
    gradient = embeddings.new_empty(
        (*embeddings.shape[:-2], last_trained - first_trained, embeddings.shape[-1]),
        dtype=gradient_dtype(embeddings, label_embeddings),
    )
    if gradient.numel() > 0:
        launch(
            parts, labels, (temperature, denominator, "none", ignore_index),
            (first_trained, last_trained), None, gradient, loss_gradient,
        )  # fmt: skip
    return gradient


def gradient_dtype(embeddings: Tensor, label_embeddings: Tensor | None) -> torch.dtype:
    """The dtype in which one tensor can hold the gradients of both."""
    if label_embeddings is None or label_embeddings.dtype == embeddings.dtype:
        return embeddings.dtype
    return torch.float32


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, temperature, denominator, reduction, ignore_index, first, last = inputs
    embeddings, label_embeddings = tensors[0], tensors[2]
    ctx.set_materialize_grads(False)
    ctx.per_row = reduction == "none"
    if ctx.per_row:
        ctx.save_for_backward(*tensors)
        ctx.options = (temperature, denominator, ignore_index, first, last)
    else:
        ctx.save_for_backward(output[1])
    ctx.num_samples, ctx.first_trained, ctx.last_trained = embeddings.shape[-2], first, last
    ctx.dtypes = embeddings.dtype, None if label_embeddings is None else label_embeddings.dtype
    ctx.gradient_dtype = gradient_dtype(embeddings, label_embeddings)


def input_gradients(
    ctx: Any, loss_gradient: Tensor | None, row_backward: Callable[..., Tensor]
) -> tuple[Tensor | None, ...]:
    """The gradients of `forward`'s arguments; `row_backward` is `backward` or its operator."""
    nothing = (None,) * 11
    if loss_gradient is None:
        return nothing
    if ctx.per_row:
        gradient = row_backward(loss_gradient, *ctx.saved_tensors, *ctx.options)
    else:
        (saved,) = ctx.saved_tensors
        # One launch: the product is rounded to the dtype of the inputs where it is written.
        gradient = torch.empty_like(saved, dtype=ctx.gradient_dtype)
        torch.mul(saved, loss_gradient[..., None, None], out=gradient)
    # The trained rows are the samples, the label embeddings, or both.
    num_samples = max(0, ctx.num_samples - ctx.first_trained)
    sample_dtype, label_dtype = ctx.dtypes
    samples = label_rows = None
    if ctx.first_trained == 0:
        samples = gradient[..., :num_samples, :].to(sample_dtype)
    if label_dtype is not None and ctx.last_trained > ctx.num_samples:
        label_rows = gradient[..., num_samples:, :].to(label_dtype)
    return samples, None, label_rows, *nothing[3:]


class SmallLoss(torch.autograd.Function):
    """`supcon_small` without an operator's dispatch."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = forward(*inputs)
        setup_context(ctx, inputs, output)
        return output[0]

    @staticmethod
    def backward(ctx: Any, loss_gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            # Gradients of this gradient would leave the kernel out without a word.
            raise RuntimeError(
                "impl='triton' has no second derivative, and backward was called with "
                "create_graph=True: impl='reference' can be differentiated twice"
            )
        return input_gradients(ctx, loss_gradient, backward)


supcon_small = torch.library.custom_op("fusedacl::supcon_small", forward, mutates_args=())
supcon_small_backward = torch.library.custom_op(
    "fusedacl::supcon_small_backward", backward, mutates_args=()
)
supcon_small.register_autograd(
    lambda ctx, loss_gradient, _: input_gradients(ctx, loss_gradient, supcon_small_backward),
    setup_context=setup_context,
)


@supcon_small.register_fake
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
    first_trained: int,
    last_trained: int,
) -> tuple[Tensor, Tensor]:
    parts = present(embeddings, label_embeddings, teacher_embeddings, teacher_label_embeddings)
    return allocate(parts, reduction, first_trained, last_trained)


@supcon_small_backward.register_fake
def _(
    loss_gradient: Tensor,
    embeddings: Tensor,
    labels: Tensor,
    label_embeddings: Tensor | None,
    teacher_embeddings: Tensor | None,
    teacher_label_embeddings: Tensor | None,
    temperature: float,
    denominator: str,
    ignore_index: int,
    first_trained: int,
    last_trained: int,
) -> Tensor:
    return embeddings.new_empty(
        (*embeddings.shape[:-2], last_trained - first_trained, embeddings.shape[-1]),
        dtype=gradient_dtype(embeddings, label_embeddings),
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
    """The loss as in `reference.contrastive_loss`.

    Launches: one for the loss and the gradient for upstream 1, one to multiply it by upstream;
    for "none" one for the loss and one for the gradient. Where samples and label embeddings differ
    in dtype, one more converts the gradient of each that is not float32.
    """
    num_samples = embeddings.shape[-2]
    first_trained = last_trained = 0
    if torch.is_grad_enabled():
        if embeddings.requires_grad:
            last_trained = num_samples
        if label_embeddings is not None and label_embeddings.requires_grad:
            first_trained = 0 if embeddings.requires_grad else num_samples
            last_trained = num_samples + label_embeddings.shape[-2]
    arguments = (
        embeddings, labels, label_embeddings, teacher_embeddings, teacher_label_embeddings,
        temperature, denominator, reduction, ignore_index, first_trained, last_trained,
    )  # fmt: skip
    # Both do the same; outside torch.compile an operator would only add its dispatch.
    if torch.compiler.is_compiling():
        return supcon_small(*arguments)[0]
    return SmallLoss.apply(*arguments)


def obstacle(
    num_rows: int, width: int, dtype: torch.dtype, temperature: float, capability: int
) -> str | None:
    """What keeps the kernel from running this, or None."""
    if dtype == torch.float64:
        return (
            "it computes in float32 and the embeddings are float64 (impl='tiled' or "
            "impl='reference' computes in float64)"
        )
    if num_rows > MAX_ROWS:
        return (
            f"{num_rows} rows are more than the {MAX_ROWS} for which one launch is meant "
            "(impl='tiled' takes any number)"
        )
    if temperature < MIN_TEMPERATURE:
        return (
            f"temperature {temperature} is below {MIN_TEMPERATURE}, where float32 exponentials "
            "leave their range (impl='tiled' goes down to 1 / 690, impl='reference' takes any)"
        )
    return None


def variants(capability: int) -> list[Variant]:
    """Loss and gradient in one launch by dtype, and the gradient alone, for "none".

    Label embeddings, teacher and the "negatives" mask bring all the code that options have. Numbers
    are not specialised, so sizes and strides add no variant. bfloat16 differs from float16 in loads
    and stores only, and "none" has both of them.
    """
    pointers = {"losses": "*fp32", "notes": "*fp32", "upstream": "*fp32", "labels": "*i64"}
    shipped = []
    for dtype, name, reduction in (
        (torch.float16, "fp16", "mean"),
        (torch.float32, "fp32", "mean"),
        (torch.bfloat16, "bf16", "none"),
    ):
        cosine_precision, gradient_precision = precisions(capability, dtype)
        pointers |= dict.fromkeys(PARTS, f"*{name}")
        pointers["gradient"] = f"*{name}" if reduction == "none" else "*fp32"
        numbers = dict.fromkeys(NUMBERS, "i32") | {"inverse_temperature": "fp32"}
        shipped.append(
            Variant(
                name=f"supcon_small {name} {reduction}",
                kernel=supcon_small_kernel,
                types=pointers | numbers,
                constants={
                    "HAS_LABELS": True,
                    "HAS_TEACHER": True,
                    "DENOMINATOR": "negatives",
                    "REDUCTION": reduction,
                    "WITH_LOSS": reduction != "none",
                    "WITH_GRADIENT": True,
                    "BLOCK": BLOCK,
                    "CHUNK": chunk(capability),
                    "COSINE_PRECISION": cosine_precision,
                    "GRADIENT_PRECISION": gradient_precision,
                },
                num_warps=NUM_WARPS,
                divisible_by_16=frozenset(pointers),
                matrix_unit=capability >= 80,
            )
        )
    return shipped
