"""The contrastive losses by tiles of the M x M similarity matrix; only O(M d) outlives a tile.

With y_i = z_i / sqrt(temperature), so that s_ij = y_i . y_j, and e_ij = exp(s_ij), 0 where the
denominator leaves the pair out:

    D_i = sum_j e_ij                                  the only sum over pairs
    L_i = log D_i - y_i . (Y_i - y_i) / n_i           Y_i = sum of y_j over the class of i

Gradient for upstream row weights w_i, with u_i = w_i / D_i and v_i = w_i / n_i:

    G_i  = sum_j e_ij (u_i + u_j) y_j - v_i (Y_i - y_i) - (A_i - v_i y_i)
    A_i  = sum of v_j y_j over the class of i
    dx_i = (G_i - z_i (z_i . G_i)) / (sqrt(temperature) ||x_i||)

e is symmetric, so a tile serves the rows of both its sides and only tiles on or above the diagonal
are visited. The diagonal of e adds to G_i a multiple of z_i, which the last line removes.

exp needs no shift: the sums stay inside float32 for 1 / temperature <= 70, float64 for <= 690.
On the CPU, compiled calls compute float32: cpu_loop.py small batches, cpu_triangle.py the others.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ...support.machine import triton_obstacle
from ..autograd import Implementation
from ..batch import ZERO_NORM, Batch, BatchShape, accumulate_dtype
from . import cpu_loop, cpu_triangle

# Rows and columns of a tile on the CPU; the backward pass holds two of them, 2 MiB in float32.
TILE = 512
# From four of them on. They are as fast on idle cores, and threads wait for each other less often:
# beside a busy core M = 4096 took 2.4 to 2.5 times as long, and 3.1 to 3.9 times in tiles of 512.
LARGE_TILE = 1024
# On a GPU one tile must fill the chip: 32 MiB in float16, 64 MiB in float32.
GPU_TILE = 4096
# Up to this many pairs of all exits are computed at once and kept for the gradient.
ONE_TILE = 512 * 512
# The weights of pairs, about 2 / M, are multiplied by at most this factor, so that float16 holds
# them, and the largest sum that a float16 product may reach.
HALF_LIFT = 64.0
HALF_LARGEST = 60000.0
# Below it |s| may exceed 20, where float16 has steps of 2^-6: the loss would be off by 1e-2.
HALF_MIN_TEMPERATURE = 0.05
# Up to this many rows a mask gives the class sums: eight times faster for 34 rows of width 64.
FEW_ROWS = 128
MAX_EXPONENT = {torch.float32: 70.0, torch.float64: 690.0}


def compute_dtype(temperature: float, *dtypes: torch.dtype) -> torch.dtype | None:
    """Return the dtype in which no sum of exp(1 / temperature) overflows; None if none exists."""
    for dtype in (accumulate_dtype(*dtypes), torch.float64):
        if 1 / temperature <= MAX_EXPONENT[dtype]:
            return dtype
    return None


def batch_dtype(batch: Batch) -> torch.dtype:
    dtype = compute_dtype(batch.temperature, *(part.dtype for part in batch.parts))
    assert dtype is not None, "dispatch.choose refuses such a temperature"
    return dtype


class Rows(NamedTuple):
    """Everything about the M rows that needs no pair."""

    # [.., M, d] and [.., M, 1]: x times inverse_norm is y.
    y: Tensor
    inverse_norm: Tensor
    # [M]: a row that does not exist has the weight 0.
    classes: Tensor
    weight: Tensor
    # [.., M, d]: the sum over the row's positives.
    others: Tensor
    # [M]: a row that does not count has the reduction_weight 0.
    inverse_positives: Tensor
    reduction_weight: Tensor
    may_ignore: bool


def prepare(batch: Batch) -> Rows:
    """Compute unit vectors, classes, sums over positives and row weights in O(M d)."""
    classes, may_ignore = batch.find_classes()  # [M]
    num_classes = batch.num_classes
    y = batch.concatenate(batch_dtype(batch))
    weight = y.new_ones(classes.shape)  # 1, or 0 for a row that does not exist
    if may_ignore:
        ignored = classes == num_classes
        weight.masked_fill_(ignored, 0)
        y.masked_fill_(ignored[:, None], 0)
    # `threshold` keeps a NaN, and 1 / inf gives a zero vector its 0.
    norm = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
    inverse_norm = (
        torch.threshold_(norm, ZERO_NORM, torch.inf).mul_(batch.temperature**0.5).reciprocal_()
    )
    y *= inverse_norm

    if classes.shape[0] <= FEW_ROWS:
        positive = (classes[:, None] == classes).to(y.dtype).fill_diagonal_(0)  # [M, M]
        if may_ignore:
            positive *= weight
        num_positives = positive.sum(1)
        others = positive @ y  # [.., M, d]
    else:
        num_members = y.new_zeros(num_classes + 1).index_add_(0, classes, weight)
        num_positives = num_members.index_select(0, classes).sub_(1)
        others = class_sums(y, classes, num_classes).sub_(y).contiguous()
    if batch.denominator == "negatives":
        num_positives.masked_fill_(num_positives + 1 == weight.sum(), 0)
    inverse_positives = torch.threshold_(num_positives, 0.5, torch.inf).reciprocal_()
    reduction_weight = inverse_positives.sign()
    if batch.reduction == "mean":
        reduction_weight /= reduction_weight.sum().clamp_(min=1)
    return Rows(
        y, inverse_norm, classes, weight, others, inverse_positives, reduction_weight, may_ignore
    )


def forward(batch: Batch, trains_samples: bool, trains_labels: bool) -> tuple[Tensor, list[Tensor]]:
    """Return the loss and what `backward` needs: the gradient itself, or what is known of rows."""
    with_gradient = trains_samples or trains_labels
    if loop := loop_for(batch):
        losses, gradient, _ = loop.loss_and_gradient(batch, with_gradient)
        return losses, [] if gradient is None else [gradient]
    rows = prepare(batch)
    y, inverse_norm, classes, weight, others, inverse_positives, reduction_weight, _ = rows
    one_tile = fits_one_tile(y)
    if one_tile:
        tile = exponentials(y, y, batch.denominator, classes, classes, is_diagonal=True)
        sums = torch.matmul(tile, weight)  # D, [.., M]
    else:
        half = uses_half(y, batch.embeddings.dtype, batch.temperature)
        sums = pair_sums(y, weight, classes, batch.denominator, half, classes.shape[0])
    losses = reduced_losses(rows, sums, batch).to(batch.accumulate_dtype)
    if not with_gradient:
        return losses, []
    if not one_tile or batch.reduction == "none":
        return losses, [
            classes, reduction_weight, inverse_positives, y, inverse_norm, sums, others,
        ]  # fmt: skip
    # The row weights are known up to a factor, and the pairs are still in memory.
    num_trained = batch.shape(True, True).num_student_rows
    u = reduction_weight / sums
    v = (reduction_weight * inverse_positives)[:num_trained, None]
    pairs = u[..., :num_trained, None] + u[..., None, :]
    gradient = pairs.mul_(tile[..., :num_trained, :]) @ y
    gradient.addcmul_(others[..., :num_trained, :], v, value=-2)
    return losses, [through_normalization(gradient, y, inverse_norm, batch.temperature)]


def loop_for(batch: Batch) -> ModuleType | None:
    """Return the module whose compiled call computes this batch, or None."""
    for loop in (cpu_loop, cpu_triangle):
        if loop.takes(batch, batch_dtype(batch)):
            return loop
    return None


def reduced_losses(rows: Rows, sums: Tensor, batch: Batch) -> Tensor:
    """Return the loss, or the losses [.., M], from D [.., M], whose zeros are replaced in place."""
    if batch.denominator != "all" or rows.may_ignore:
        # A row with nothing to compare has D = 0 and does not count: keep 0 * log D at 0.
        sums.clamp_(min=torch.finfo(sums.dtype).tiny)
    positive_mean = (rows.others * rows.y).sum(-1).mul_(rows.inverse_positives)
    losses = sums.log().sub_(positive_mean)
    if batch.reduction == "none":
        return losses.mul_(rows.reduction_weight)
    return losses @ rows.reduction_weight


def backward(loss_gradient: Tensor, saved: list[Tensor], shape: BatchShape) -> list[Tensor]:
    """Return one gradient [.., N + K, d] of samples and label embeddings."""
    if len(saved) == 1:
        return [saved[0] * (loss_gradient[:, None, None] if loss_gradient.dim() else loss_gradient)]
    classes, reduction_weight, inverse_positives, y, inverse_norm, sums, others = saved
    num_trained, per_row = shape.num_student_rows, shape.reduction == "none"
    half = uses_half(y, shape.sample_dtype, shape.temperature)
    w = reduction_weight * (loss_gradient if per_row else loss_gradient[..., None])
    u = w / sums  # [.., M]
    v = (w * inverse_positives)[..., None]  # [.., M, 1]
    if half:
        # A pair's weight is at most that of its rows: scaled into float16's range, and back after.
        # All rows of a tile may be close to one row, and |y| = 1 / sqrt(temperature).
        lift = min(HALF_LIFT, HALF_LARGEST * shape.temperature**0.5 / (tile_rows(y) + 1))
        largest = w.abs().amax(-1, keepdim=True).clamp_(min=1e-30)
        u *= lift / largest

    gradient = pair_gradient(y, u, classes, half, shape)
    if half:
        gradient *= (largest / lift)[..., None]
    trained_v, trained_others = v[..., :num_trained, :], others[..., :num_trained, :]
    if per_row:
        gradient.addcmul_(trained_others, trained_v, value=-1)
        gradient -= class_sums(y * v, classes, shape.num_classes)[..., :num_trained, :]
        gradient.addcmul_(y[..., :num_trained, :], trained_v)
    else:
        # All rows of a class have the same v, so both class terms are equal.
        gradient.addcmul_(trained_others, trained_v, value=-2)
    gradient = through_normalization(gradient, y, inverse_norm, shape.temperature)
    if half:
        # No D contains an ignored row, so its own weights may have left float16's range.
        gradient.masked_fill_(inverse_norm[..., :num_trained, :] == 0, 0)
    return [gradient]


def uses_half(y: Tensor, sample_dtype: torch.dtype, temperature: float) -> bool:
    """Return whether tiles are multiplied in float16, on a GPU: tensor cores, also on V100.

    Of the two 16-bit formats it has three bits more, and |y| <= 1 / sqrt(temperature).
    """
    return (
        has_epilogue(y)
        and sample_dtype in (torch.float16, torch.bfloat16)
        and temperature >= HALF_MIN_TEMPERATURE
    )


def has_epilogue(y: Tensor) -> bool:
    """Return whether a Triton kernel processes the tiles between their products."""
    return (
        y.device.type == "cuda" and y.dtype != torch.float64 and triton_obstacle(y.device) is None
    )


def pair_sums(
    y: Tensor, weight: Tensor, classes: Tensor, denominator: str, half: bool, num_rows: int
) -> Tensor:
    """Return sum_j e_ij weight_j [.., num_rows] of the first `num_rows` rows over all M."""
    if cpu_triangle.takes_pass(y):
        passes = [
            cpu_triangle.run_pass(exit_y, classes, denominator, num_rows, exists=weight)
            for exit_y in as_exits(y)
        ]
        return torch.stack(passes).view(*y.shape[:-2], num_rows)
    sums = y.new_zeros(*y.shape[:-2], num_rows)
    operands = y.half() if half else y
    tile_size = tile_rows(y)
    buffer = operands.new_empty(tile_size * tile_size)
    for exit_y, exit_sums in zip(as_exits(operands), as_exits(sums, 1), strict=True):
        for i, j in block_pairs(num_rows, classes.shape[0], tile_size):
            tile = shaped(buffer, i, j)
            serves_both = i != j and j.stop <= num_rows
            sides = (exit_y[i], exit_y[j], denominator, classes[i], classes[j])
            if has_epilogue(y):
                of_rows, of_columns = epilogue().sums(*sides, weight[i], weight[j], i == j, tile)
                exit_sums[i] += of_rows
                if serves_both:
                    exit_sums[j] += of_columns
                continue
            exponentials(*sides, is_diagonal=i == j, out=tile)
            exit_sums[i].addmv_(tile, weight[j])
            if serves_both:
                exit_sums[j].addmv_(tile.t(), weight[i])
    return sums


def pair_gradient(y: Tensor, u: Tensor, classes: Tensor, half: bool, shape: BatchShape) -> Tensor:
    """Return sum_j e_ij (u_i + u_j) y_j [.., n, d] of the n = N + K student rows."""
    num_trained, denominator = shape.num_student_rows, shape.denominator
    if cpu_triangle.takes_pass(y):
        passes = [
            cpu_triangle.run_pass(
                exit_y, classes, denominator, num_trained, u=exit_u, pair_memory=shape.pair_memory
            )
            for exit_y, exit_u in zip(as_exits(y), as_exits(u, 1), strict=True)
        ]
        return torch.stack(passes).view(*y.shape[:-2], num_trained, y.shape[-1])
    gradient = y.new_zeros(*y.shape[:-2], num_trained, y.shape[-1])
    operands = y.half() if half else y
    tile_size = tile_rows(y)
    # The epilogue works in place; PyTorch needs a second tile for u_i + u_j.
    buffers = operands.new_empty(1 if has_epilogue(y) else 2, tile_size * tile_size)
    for exit_y, exit_u, exit_gradient in zip(
        as_exits(operands), as_exits(u, 1), as_exits(gradient), strict=True
    ):
        for i, j in block_pairs(num_trained, y.shape[-2], tile_size):
            tile = shaped(buffers[0], i, j)
            sides = (exit_y[i], exit_y[j], denominator, classes[i], classes[j])
            if has_epilogue(y):
                epilogue().pair_weights(*sides, exit_u[i], exit_u[j], i == j, tile)
            else:
                exponentials(*sides, is_diagonal=i == j, out=tile)
                tile *= torch.add(exit_u[i, None], exit_u[j], out=shaped(buffers[1], i, j))
            accumulate(exit_gradient[i], tile, exit_y[j])
            if i != j and j.stop <= num_trained:
                accumulate(exit_gradient[j], tile.t(), exit_y[i])
    return gradient


def accumulate(gradient: Tensor, tile: Tensor, y: Tensor) -> None:
    """Add tile @ y to the gradient, also a float16 product to a float32 gradient."""
    if tile.dtype == gradient.dtype:
        gradient.addmm_(tile, y)
    else:
        gradient += tile @ y


def epilogue() -> ModuleType:
    """Import the Triton kernels for tiles, which need Triton, when they are used."""
    from . import gpu_epilogue

    return gpu_epilogue


def through_normalization(
    gradient: Tensor, y: Tensor, inverse_norm: Tensor, temperature: float
) -> Tensor:
    """Turn G [.., num_trained, d] into dx in place."""
    num_trained = gradient.shape[-2]
    y = y[..., :num_trained, :]
    # y = z / sqrt(temperature), hence z (z . G) = temperature * y (y . G).
    projection = (gradient * y).sum(-1, keepdim=True)
    gradient.addcmul_(y, projection, value=-temperature)
    return gradient.mul_(inverse_norm[..., :num_trained, :])


def exponentials(
    y_rows: Tensor,
    y_columns: Tensor,
    denominator: str,
    row_classes: Tensor,
    column_classes: Tensor,
    *,
    is_diagonal: bool,
    out: Tensor | None = None,
) -> Tensor:
    """Return e_ij [.., rows, columns]: exp(s_ij), or 0 where D_i leaves the pair out."""
    out = torch.matmul(y_rows, y_columns.mT, out=out)
    out.exp_()
    if denominator == "negatives":
        out *= row_classes[:, None] != column_classes
    elif denominator == "others" and is_diagonal:
        out.diagonal(dim1=-2, dim2=-1).zero_()
    return out


def class_sums(
    y: Tensor, classes: Tensor, num_classes: int, wanted: Tensor | None = None
) -> Tensor:
    """Return the sum over each row's class [.., M, d]; that of ignored rows is never used.

    wanted: classes whose sums are returned, instead of those of the rows.
    """
    # Unlike `index_add_`, `index_put_` adds in a fixed order on every device.
    by_row = y.movedim(-2, 0)
    sums = y.new_zeros(num_classes + 1, *by_row.shape[1:])
    sums.index_put_((classes,), by_row, accumulate=True)
    return sums.index_select(0, classes if wanted is None else wanted).movedim(0, -2)


def describe_cpu() -> str:
    """Describe how float32 batches are computed on this CPU."""
    if cpu_loop.compiled_loop() is None:
        return (
            "PyTorch operations on tiles; a compiled loop is faster: it is built when fusedacl is "
            "installed on a machine with a C compiler"
        )
    return f"compiled loops; {cpu_triangle.describe()}"


def fits_one_tile(y: Tensor) -> bool:
    """Return whether the pairs of all exits fit in the memory of one tile."""
    return y.shape[:-1].numel() * y.shape[-2] <= ONE_TILE


def tile_rows(y: Tensor) -> int:
    """Return the number of rows and columns of a tile on the device of y."""
    num_rows = y.shape[-2]
    if y.device.type == "cuda":
        return max(1, min(GPU_TILE, num_rows))
    largest = LARGE_TILE if num_rows >= 4 * LARGE_TILE else TILE
    return max(1, min(largest, num_rows))


def as_exits(tensor: Tensor, num_dims: int = 2) -> Tensor:
    """Return the tensor with an exit dimension before its last `num_dims` dimensions."""
    return tensor if tensor.dim() > num_dims else tensor[None]


def blocks(start: int, stop: int, size: int) -> list[slice]:
    """Split the rows from start to stop into blocks of at most `size`."""
    return [slice(row, min(row + size, stop)) for row in range(start, stop, size)]


def block_pairs(num_rows: int, num_columns: int, size: int) -> list[tuple[slice, slice]]:
    """Return the blocks of tiles for the first `num_rows` rows; a tile serves both its sides."""
    rows, others = blocks(0, num_rows, size), blocks(num_rows, num_columns, size)
    upper_triangle = [(i, j) for index, i in enumerate(rows) for j in rows[index:]]
    return upper_triangle + [(i, j) for i in rows for j in others]


def shaped(buffer: Tensor, i: slice, j: slice) -> Tensor:
    """Return a contiguous tile [rows, columns] at the start of a flat buffer."""
    num_rows, num_columns = i.stop - i.start, j.stop - j.start
    return buffer[: num_rows * num_columns].view(num_rows, num_columns)


def fake_forward(
    batch: Batch, trains_samples: bool, trains_labels: bool
) -> tuple[Tensor, list[Tensor]]:
    num_rows, leading = batch.num_rows, batch.leading
    y = batch.embeddings.new_empty(
        *leading, num_rows, batch.embeddings.shape[-1], dtype=batch_dtype(batch)
    )
    loss = y.new_empty(batch.loss_shape, dtype=batch.accumulate_dtype)
    if not (trains_samples or trains_labels):
        return loss, []
    at_once = fits_one_tile(y) and batch.reduction != "none"
    if at_once or loop_for(batch) is not None:
        num_trained = batch.shape(True, True).num_student_rows
        return loss, [y.new_empty(*leading, num_trained, y.shape[-1])]
    return loss, [
        batch.labels.new_empty(num_rows, dtype=torch.int64),
        y.new_empty(num_rows),
        y.new_empty(num_rows),
        y,
        y.new_empty(*leading, num_rows, 1),
        y.new_empty(*leading, num_rows),
        torch.empty_like(y),
    ]


def fake_backward(loss_gradient: Tensor, saved: list[Tensor], shape: BatchShape) -> list[Tensor]:
    if len(saved) == 1:
        return [torch.empty_like(saved[0])]
    y = saved[3]
    return [y.new_empty(*y.shape[:-2], shape.num_student_rows, y.shape[-1])]


implementation = Implementation(
    "supcon_tiled", "tiled", (forward, backward), (fake_forward, fake_backward), joint=True
)
