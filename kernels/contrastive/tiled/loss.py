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

exp needs no shift by a maximum: |s_ij| <= 1 / temperature, and the sums stay inside float32 while
that is at most 70, inside float64 while it is at most 690.

On the CPU a small batch is computed by one compiled call (supcon_compiled.py), not by tiles.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...support.machine import triton_obstacle
from ..autograd import without_autocast
from ..batch import ZERO_NORM, accumulate_dtype, compute_classes, parts_in_order
from . import cpu_loop

# Rows and columns of a tile on the CPU; the backward pass holds two of them, 2 MiB in float32.
TILE = 512
# On a GPU one tile must fill the chip: 32 MiB in float16, 64 MiB in float32, and there is one.
GPU_TILE = 4096
# Pairs of all exits up to which they are computed at once and kept for the gradient.
ONE_TILE = 512 * 512
# float16 holds numbers from 6e-8 to 65504. The pairs' weights, about 2 / M, are lifted by at most
# this factor.
HALF_LIFT = 64.0
# The largest sum that a float16 product of a tile may reach.
HALF_LARGEST = 60000.0
# Below, |s| may be 20 and more, where float16's steps are 2^-6: the loss would be off by 1e-2.
HALF_MIN_TEMPERATURE = 0.05
# Up to here a mask gives the class sums: fewer operations than scatter and gather, which at 34 rows
# of width 64 took an eighth of the whole.
FEW_ROWS = 128
MAX_EXPONENT = {torch.float32: 70.0, torch.float64: 690.0}


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
    # Both do the same; outside torch.compile an operator would only add its dispatch, which at
    # 32 rows is a sixth of the whole.
    if torch.compiler.is_compiling():
        return supcon_tiled(*arguments)[0]
    return TiledLoss.apply(*arguments)


def compute_dtype(temperature: float, *dtypes: torch.dtype) -> torch.dtype | None:
    """The dtype in which no sum of exp(1 / temperature) overflows; None if there is none."""
    for dtype in (accumulate_dtype(*dtypes), torch.float64):
        if 1 / temperature <= MAX_EXPONENT[dtype]:
            return dtype
    return None


class Rows(NamedTuple):
    """What is known of M rows before any pair is looked at."""

    # [.., M, d] and [.., M, 1]: x times inverse_norm is y.
    y: Tensor
    inverse_norm: Tensor
    # [M]: 0 in weight for a row that does not exist, in reduction_weight for one that does not
    # count.
    classes: Tensor
    weight: Tensor
    # [.., M, d]: the sum over the row's positives.
    others: Tensor
    # [M]
    inverse_positives: Tensor
    reduction_weight: Tensor
    may_ignore: bool


def prepare(
    embeddings: Tensor,
    labels: Tensor,
    label_embeddings: Tensor | None,
    teacher_embeddings: Tensor | None,
    teacher_label_embeddings: Tensor | None,
    temperature: float,
    denominator: str,
    reduction: str,
    ignore_index: int,
) -> Rows:
    """Unit vectors, classes, sums over positives and row weights: all that is O(M d)."""
    parts = parts_in_order(
        embeddings, label_embeddings, teacher_embeddings, teacher_label_embeddings
    )
    dtypes = [part.dtype for part in parts]
    dtype = compute_dtype(temperature, *dtypes)
    assert dtype is not None, "dispatch.choose refuses such a temperature"
    num_labels = None if label_embeddings is None else label_embeddings.shape[-2]
    num_classes = labels.shape[0] if num_labels is None else num_labels
    num_copies = 1 if teacher_embeddings is None else 2
    classes, may_ignore = compute_classes(labels, num_labels, ignore_index, num_copies)  # [M]

    y = torch.cat(parts, dim=-2).to(dtype)
    weight = y.new_ones(classes.shape)  # 1, or 0 for a row that does not exist
    if may_ignore:
        ignored = classes == num_classes
        weight.masked_fill_(ignored, 0)
        y.masked_fill_(ignored[:, None], 0)
    # `threshold` lets NaN through, and 1 / inf is the 0 that a zero vector wants.
    norm = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
    inverse_norm = torch.threshold_(norm, ZERO_NORM, torch.inf).mul_(temperature**0.5).reciprocal_()
    y *= inverse_norm

    if classes.shape[0] <= FEW_ROWS:
        positive = (classes[:, None] == classes).to(dtype).fill_diagonal_(0)  # [M, M]
        if may_ignore:
            positive *= weight
        num_positives = positive.sum(1)
        others = positive @ y  # the sum over the row's positives, [.., M, d]
    else:
        num_members = y.new_zeros(num_classes + 1).index_add_(0, classes, weight)
        num_positives = num_members.index_select(0, classes).sub_(1)
        others = class_sums(y, classes, num_classes).sub_(y).contiguous()
    if denominator == "negatives":
        num_positives.masked_fill_(num_positives + 1 == weight.sum(), 0)
    inverse_positives = torch.threshold_(num_positives, 0.5, torch.inf).reciprocal_()
    reduction_weight = inverse_positives.sign()
    if reduction == "mean":
        reduction_weight /= reduction_weight.sum().clamp_(min=1)
    return Rows(
        y, inverse_norm, classes, weight, others, inverse_positives, reduction_weight, may_ignore
    )


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
    """The loss, and what `backward` needs to know of this pass.

    Shapes: a leading exit dimension is there when the embeddings have one.
    """
    parts = (embeddings, label_embeddings, teacher_embeddings, teacher_label_embeddings)
    present = [part for part in parts if part is not None]
    dtype = compute_dtype(temperature, *(part.dtype for part in present))
    if cpu_loop.takes(present, dtype, reduction):
        losses, gradient = cpu_loop.loss_and_gradient(
            *parts[:1], labels, *parts[1:],
            temperature, denominator, reduction, ignore_index, with_gradient,
        )  # fmt: skip
        return losses, [] if gradient is None else [gradient]
    rows = prepare(
        embeddings, labels, *parts[1:], temperature, denominator, reduction, ignore_index
    )
    y, inverse_norm, classes, weight, others, inverse_positives, reduction_weight, _ = rows
    one_tile = fits_one_tile(y)
    if one_tile:
        tile = exponentials(y, y, denominator, classes, classes, is_diagonal=True)
        sums = torch.matmul(tile, weight)  # D, [.., M]
    else:
        half = half_operands(embeddings, temperature, *parts[1:])
        sums = pair_sums(y, weight, classes, denominator, half, classes.shape[0])
    losses = reduced_losses(rows, sums, denominator, reduction)
    losses = losses.to(accumulate_dtype(*(part.dtype for part in present)))
    if not with_gradient:
        return losses, []
    if not one_tile or reduction == "none":
        return losses, [
            classes, reduction_weight, inverse_positives, y, inverse_norm, sums, others,
        ]  # fmt: skip
    # The row weights are known up to a factor, and the pairs are still there.
    num_trained = sum(part.shape[-2] for part in parts[:2] if part is not None)
    u = reduction_weight / sums
    v = (reduction_weight * inverse_positives)[:num_trained, None]
    pairs = u[..., :num_trained, None] + u[..., None, :]
    gradient = pairs.mul_(tile[..., :num_trained, :]) @ y
    gradient.addcmul_(others[..., :num_trained, :], v, value=-2)
    return losses, [through_normalization(gradient, y, inverse_norm, temperature)]


def reduced_losses(rows: Rows, sums: Tensor, denominator: str, reduction: str) -> Tensor:
    """The loss, or the losses [.., M], from D [.., M], whose zeros are replaced in place."""
    if denominator != "all" or rows.may_ignore:
        # A row with nothing to compare has D = 0 and does not count: keep 0 * log D at 0.
        sums.clamp_(min=torch.finfo(sums.dtype).tiny)
    positive_mean = (rows.others * rows.y).sum(-1).mul_(rows.inverse_positives)
    losses = sums.log().sub_(positive_mean)
    if reduction == "none":
        return losses.mul_(rows.reduction_weight)
    return losses @ rows.reduction_weight


@without_autocast
def backward(
    loss_gradient: Tensor,
    saved: list[Tensor],
    num_classes: int,
    num_trained: int,
    temperature: float,
    denominator: str,
    reduction: str,
    half: bool,
) -> Tensor:
    """Gradient [.., num_trained, d] with respect to the first `num_trained` rows."""
    if len(saved) == 1:
        return saved[0] * (loss_gradient[:, None, None] if loss_gradient.dim() else loss_gradient)
    classes, reduction_weight, inverse_positives, y, inverse_norm, sums, others = saved
    w = reduction_weight * (loss_gradient if reduction == "none" else loss_gradient[..., None])
    u = w / sums  # [.., M]
    v = (w * inverse_positives)[..., None]  # [.., M, 1]
    if half:
        # A pair's weight is at most that of its rows: lifted into float16's range, and back after.
        # All rows of a tile may look at one row, and |y| = 1 / sqrt(temperature).
        lift = min(HALF_LIFT, HALF_LARGEST * temperature**0.5 / (tile_rows(y) + 1))
        largest = w.abs().amax(-1, keepdim=True).clamp_(min=1e-30)
        u *= lift / largest

    gradient = pair_gradient(y, u, classes, num_trained, denominator, half)
    if half:
        gradient *= (largest / lift)[..., None]
    trained_v, trained_others = v[..., :num_trained, :], others[..., :num_trained, :]
    if reduction == "none":
        gradient.addcmul_(trained_others, trained_v, value=-1)
        gradient -= class_sums(y * v, classes, num_classes)[..., :num_trained, :]
        gradient.addcmul_(y[..., :num_trained, :], trained_v)
    else:
        # All rows of a class have the same v, so both class terms are equal.
        gradient.addcmul_(trained_others, trained_v, value=-2)
    gradient = through_normalization(gradient, y, inverse_norm, temperature)
    if half:
        # Nobody's D holds an ignored row, so its own weights may have left float16's range.
        gradient.masked_fill_(inverse_norm[..., :num_trained, :] == 0, 0)
    return gradient


def half_operands(embeddings: Tensor, temperature: float, *others: Tensor | None) -> bool:
    """Whether the matrix products of tiles are done in float16.

    On a GPU, for samples of 16 bits, as an autocast product would do: tensor cores, also on V100.
    Of the two 16-bit formats float16 has three bits more, and |y| <= 1 / sqrt(temperature). Not
    where temperature makes the similarities so large that their rounding shows in the loss.
    """
    dtypes = [part.dtype for part in (embeddings, *others) if part is not None]
    return (
        has_epilogue(embeddings)
        and embeddings.dtype in (torch.float16, torch.bfloat16)
        and temperature >= HALF_MIN_TEMPERATURE
        and accumulate_dtype(*dtypes) == torch.float32
    )


def has_epilogue(tensor: Tensor) -> bool:
    """Whether a Triton kernel works on the tiles between their products."""
    return (
        tensor.device.type == "cuda"
        and tensor.dtype != torch.float64
        and triton_obstacle(tensor.device) is None
    )


def pair_sums(
    y: Tensor, weight: Tensor, classes: Tensor, denominator: str, half: bool, num_rows: int
) -> Tensor:
    """sum_j e_ij weight_j [.., num_rows] of the first `num_rows` rows over all M."""
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


def pair_gradient(
    y: Tensor, u: Tensor, classes: Tensor, num_trained: int, denominator: str, half: bool
) -> Tensor:
    """sum_j e_ij (u_i + u_j) y_j [.., num_trained, d] of the first `num_trained` rows."""
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
    """gradient += tile @ y; a float16 product is added in the gradient's float32."""
    if tile.dtype == gradient.dtype:
        gradient.addmm_(tile, y)
    else:
        gradient += tile @ y


def epilogue() -> ModuleType:
    """The Triton kernels for tiles, which need Triton and so are not imported with this file."""
    from . import gpu_epilogue

    return gpu_epilogue


def through_normalization(
    gradient: Tensor, y: Tensor, inverse_norm: Tensor, temperature: float
) -> Tensor:
    """dx from G [.., num_trained, d], in place."""
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
    """e_ij [.., rows, columns]: exp(s_ij), or 0 where D_i leaves the pair out."""
    out = torch.matmul(y_rows, y_columns.mT, out=out)
    out.exp_()
    if denominator == "negatives":
        out *= row_classes[:, None] != column_classes
    elif denominator == "others" and is_diagonal:
        out.diagonal(dim1=-2, dim2=-1).zero_()
    return out


def class_sums(y: Tensor, classes: Tensor, num_classes: int) -> Tensor:
    """The sum over each row's class [.., M, d] (ignored rows share one that nobody reads)."""
    # Unlike `index_add_`, `index_put_` adds in a fixed order on every device, and for small batches
    # it starts no threads.
    by_row = y.movedim(-2, 0)
    sums = y.new_zeros(num_classes + 1, *by_row.shape[1:])
    sums.index_put_((classes,), by_row, accumulate=True)
    return sums.index_select(0, classes).movedim(0, -2)


def fits_one_tile(y: Tensor) -> bool:
    """Whether the pairs of all exits fit a tile's memory."""
    return y.shape[:-1].numel() * y.shape[-2] <= ONE_TILE


def tile_rows(y: Tensor) -> int:
    """Rows and columns of a tile where these rows are."""
    largest = GPU_TILE if y.device.type == "cuda" else TILE
    return max(1, min(largest, y.shape[-2]))


def as_exits(tensor: Tensor, num_dims: int = 2) -> Tensor:
    """The tensor with a leading exit dimension before its last `num_dims`."""
    return tensor if tensor.dim() > num_dims else tensor[None]


def blocks(start: int, stop: int, size: int) -> list[slice]:
    """The rows from start to stop in blocks of at most `size`."""
    return [slice(row, min(row + size, stop)) for row in range(start, stop, size)]


def block_pairs(num_rows: int, num_columns: int, size: int) -> list[tuple[slice, slice]]:
    """The blocks whose tiles hold the pairs of the first `num_rows` rows with all columns.

    A tile serves the rows of both its sides: of two blocks among those rows only one order.
    """
    rows, others = blocks(0, num_rows, size), blocks(num_rows, num_columns, size)
    upper_triangle = [(i, j) for index, i in enumerate(rows) for j in rows[index:]]
    return upper_triangle + [(i, j) for i in rows for j in others]


def shaped(buffer: Tensor, i: slice, j: slice) -> Tensor:
    """A contiguous tile [rows, columns] at the start of a flat buffer."""
    num_rows, num_columns = i.stop - i.start, j.stop - j.start
    return buffer[: num_rows * num_columns].view(num_rows, num_columns)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    embeddings, labels, label_embeddings, *teachers = inputs[:5]
    temperature, denominator, reduction = inputs[5:8]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1])
    num_samples = num_trained = num_classes = labels.shape[0]
    label_dtype = None
    if label_embeddings is not None:
        num_classes, label_dtype = label_embeddings.shape[-2], label_embeddings.dtype
        num_trained += num_classes
    half = half_operands(embeddings, temperature, label_embeddings, *teachers)
    ctx.options = (num_classes, num_trained, temperature, denominator, reduction, half)
    ctx.trained = (num_samples, embeddings.dtype, label_dtype)


def input_gradients(ctx: Any, loss_gradient: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 10
    if loss_gradient is None:
        return nothing
    as_operator = torch.compiler.is_compiling()
    if torch.is_grad_enabled() and not as_operator:
        # Gradients of this gradient would leave the tiles out without a word.
        raise RuntimeError(
            "impl='tiled' has no second derivative, and backward was called with "
            "create_graph=True: impl='reference' can be differentiated twice"
        )
    function = supcon_tiled_backward if as_operator else backward
    gradient = function(loss_gradient, list(ctx.saved_tensors), *ctx.options)
    num_samples, sample_dtype, label_dtype = ctx.trained
    sample_gradient = gradient[..., :num_samples, :].to(sample_dtype)
    if label_dtype is None:
        return sample_gradient, *nothing[1:]
    return sample_gradient, None, gradient[..., num_samples:, :].to(label_dtype), *nothing[3:]


class TiledLoss(torch.autograd.Function):
    """`supcon_tiled` without an operator's dispatch."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = forward(*inputs)
        setup_context(ctx, inputs, output)
        return output[0]

    backward = staticmethod(input_gradients)


# The schemas are spelt out because torch 2.6 does not derive them from `list[Tensor]`.
supcon_tiled = torch.library.custom_op(
    "fusedacl::supcon_tiled",
    without_autocast(forward),
    mutates_args=(),
    schema=(
        "(Tensor embeddings, Tensor labels, Tensor? label_embeddings, Tensor? teacher_embeddings, "
        "Tensor? teacher_label_embeddings, float temperature, str denominator, str reduction, "
        "SymInt ignore_index, bool with_gradient) -> (Tensor, Tensor[])"
    ),
)


supcon_tiled.register_autograd(input_gradients, setup_context=setup_context)


supcon_tiled_backward = torch.library.custom_op(
    "fusedacl::supcon_tiled_backward",
    backward,
    mutates_args=(),
    schema=(
        "(Tensor loss_gradient, Tensor[] saved, SymInt num_classes, SymInt num_trained, "
        "float temperature, str denominator, str reduction, bool half) -> Tensor"
    ),
)


@supcon_tiled.register_fake
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
    leading, width = embeddings.shape[:-2], embeddings.shape[-1]
    dtype = compute_dtype(temperature, *(part.dtype for part in parts))
    y = embeddings.new_empty(*leading, num_rows, width, dtype=dtype)
    loss = y.new_empty(
        (*leading, num_rows) if reduction == "none" else leading,
        dtype=accumulate_dtype(*(part.dtype for part in parts)),
    )
    if not with_gradient:
        return loss, []
    at_once = fits_one_tile(y) and reduction != "none"
    if at_once or cpu_loop.takes(parts, dtype, reduction):
        num_trained = sum(part.shape[-2] for part in parts[: 1 if label_embeddings is None else 2])
        return loss, [y.new_empty(*leading, num_trained, width)]
    return loss, [
        labels.new_empty(num_rows, dtype=torch.int64),
        y.new_empty(num_rows),
        y.new_empty(num_rows),
        y,
        y.new_empty(*leading, num_rows, 1),
        y.new_empty(*leading, num_rows),
        torch.empty_like(y),
    ]


@supcon_tiled_backward.register_fake
def _(
    loss_gradient: Tensor,
    saved: list[Tensor],
    num_classes: int,
    num_trained: int,
    temperature: float,
    denominator: str,
    reduction: str,
    half: bool,
) -> Tensor:
    if len(saved) == 1:
        return torch.empty_like(saved[0])
    y = saved[3]
    return y.new_empty(*y.shape[:-2], num_trained, y.shape[-1])
