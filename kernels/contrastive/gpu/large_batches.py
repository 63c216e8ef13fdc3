"""The contrastive losses of large batches on the matrix unit; only O(M d) leaves the chip.

The sums over pairs are those of `pair_sums`; `row_steps` computes the rest row by row, and has the
formulas. The row weights in the sums over pairs are at most 1: the largest upstream gradient and
1 / temperature are multiplied afterwards, in float32.
"""

import itertools

import torch
from torch import Tensor

from ...support import machine
from ...support.variant import Variant
from ..autograd import Implementation
from ..batch import Batch, BatchShape
from .pair_sums import padded, padded_width, pair_gradient, pair_variants, symmetric_row_sums
from .row_steps import (
    Rows,
    class_sums,
    finish_gradients,
    losses,
    normalize,
    row_variants,
    unit_dtype,
)  # fmt: skip
from .tiles import MAX_WIDTH, Blocks, float32_obstacle, shipped, tuned


def obstacle(width: int, dtype: torch.dtype, temperature: float, capability: int) -> str | None:
    """Return why these kernels cannot compute such a loss, or None."""
    if capability < 80:
        return (
            f"compute capability {capability / 10} has no matrix unit that Triton reaches: 8.0 or "
            "newer is needed for a large batch (impl='tiled' uses cuBLAS there)"
        )
    if width > MAX_WIDTH:
        return f"width {width} is above {MAX_WIDTH} (impl='tiled' takes any width)"
    return float32_obstacle(dtype, temperature)


def prepare(batch: Batch) -> Rows:
    """Compute unit vectors, classes and class sums in O(M d), on the current device."""
    classes, _ = batch.find_classes()  # [M]
    # On a GPU, whose labels are not checked, one outside [0, K) stops at this operation's bounds.
    ids = torch.arange(batch.num_classes + 1, device=classes.device)
    classes = ids.index_select(0, classes)

    unit_rows = normalize(batch, classes)
    # Stable: the order of a class's rows decides the rounding of its sum.
    in_order, order = classes.sort(stable=True)
    starts = torch.searchsorted(in_order, ids)
    return Rows(*unit_rows, class_sums(unit_rows[0], None, order, starts), order, starts)


def forward(batch: Batch, trains_samples: bool, trains_labels: bool) -> tuple[Tensor, list[Tensor]]:
    """Return the loss and what `backward` needs, O(M d)."""
    temperature, denominator = batch.temperature, batch.denominator
    with torch.cuda.device_of(batch.embeddings):
        rows = prepare(batch)
        num_rows = rows.order.shape[0]
        partial_sums = symmetric_row_sums(
            rows.z, rows.shifts, rows.classes, num_rows, temperature, denominator,
            tiles(rows.z).forward,
        )  # fmt: skip
        loss, u, inverse_positives = losses(partial_sums, rows, temperature, denominator)
    loss, num_anchors = reduced(loss, inverse_positives, batch)
    saved = [*rows, u, inverse_positives, *num_anchors]
    return loss, saved if trains_samples or trains_labels else []


def reduced(loss: Tensor, inverse_positives: Tensor, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    """Return the loss [..] or losses [.., m] and, for "mean", the number of anchors."""
    num_anchors = []
    if batch.reduction != "none":
        loss = loss.sum(-1)
    if batch.reduction == "mean":
        num_anchors = [torch.count_nonzero(inverse_positives).clamp_(min=1)]
        loss /= num_anchors[0]
    return loss.view(batch.leading + loss.shape[1:]), num_anchors


def backward(loss_gradient: Tensor, saved: list[Tensor], shape: BatchShape) -> list[Tensor]:
    """Return gradients [.., N, d] and, if label embeddings are trained, [.., K, d]."""
    rows, (u, inverse_positives, *num_anchors) = Rows(*saved[:7]), saved[7:]
    per_row = shape.reduction == "none"
    num_exits, num_padded_rows, _ = rows.z.shape
    num_rows = rows.order.shape[0]
    v, weighted_sums = inverse_positives, rows.sums_by_class
    with torch.cuda.device_of(rows.z):
        if per_row:
            upstream = torch.nn.functional.pad(
                loss_gradient.reshape(num_exits, num_rows).float(), (0, num_padded_rows - num_rows)
            ).masked_fill_(inverse_positives == 0, 0)
            # The sums over pairs need row weights of at most 1.
            largest = upstream.abs().amax(-1, keepdim=True)
            largest.clamp_(min=torch.finfo(torch.float32).tiny)
            upstream /= largest
            u = u * upstream
            v = inverse_positives * upstream
            weighted_sums = class_sums(rows.z, v, rows.order, rows.starts)
            factors = largest
        else:
            factors = loss_gradient.reshape(num_exits).float()
            if num_anchors:
                factors = factors / num_anchors[0]
            factors = factors.contiguous()

        # Frozen label embeddings are constants, as those of the teacher are.
        num_trained = shape.num_student_rows if shape.trains_labels else shape.num_samples
        partial_gradients = pair_gradient(
            rows.z, u, rows.shifts, rows.classes, num_trained, num_rows,
            shape.temperature, shape.denominator, tiles(rows.z).backward,
        )  # fmt: skip
        gradients = finish_gradients(partial_gradients, rows, weighted_sums, v, factors, shape)
    leading = loss_gradient.shape[:-1] if per_row else loss_gradient.shape
    return [gradient.view(leading + gradient.shape[1:]) for gradient in gradients]


def tiles(z: Tensor) -> Blocks:
    """Return the tiles for these unit rows on their device: measured ones, or those shipped."""
    capability = machine.capability(z.device)
    assert capability is not None, "dispatch.choose refuses such a device"
    kind = (z.device, z.dtype, z.shape[-1])
    blocks = shipped(capability, *kind[1:])
    return Blocks(
        tuned("row_sums", *kind) or blocks.forward, tuned("pair_gradient", *kind) or blocks.backward
    )


def fake_forward(
    batch: Batch, trains_samples: bool, trains_labels: bool
) -> tuple[Tensor, list[Tensor]]:
    num_rows, num_exits = batch.num_rows, batch.leading.numel()
    loss = batch.embeddings.new_empty(batch.loss_shape, dtype=torch.float32)
    if not (trains_samples or trains_labels):
        return loss, []
    labels, num_starts = batch.labels, batch.num_classes + 1
    num_padded_rows, width = padded(num_rows), padded_width(batch.embeddings.shape[-1])
    unit = unit_dtype(batch.embeddings.dtype)
    saved = [
        loss.new_empty(num_exits, num_padded_rows, width, dtype=unit),
        loss.new_empty(num_exits, num_padded_rows),
        loss.new_empty(num_padded_rows),
        loss.new_empty(num_padded_rows, dtype=torch.int32),
        loss.new_empty(num_starts, num_exits, width),
        labels.new_empty(num_rows, dtype=torch.int64),
        labels.new_empty(num_starts, dtype=torch.int64),
        loss.new_empty(num_exits, num_padded_rows),
        loss.new_empty(num_padded_rows),
    ]
    if batch.reduction == "mean":
        saved.append(labels.new_empty((), dtype=torch.int64))
    return loss, saved


def fake_backward(loss_gradient: Tensor, saved: list[Tensor], shape: BatchShape) -> list[Tensor]:
    leading = loss_gradient.shape[:-1] if shape.reduction == "none" else loss_gradient.shape
    rows: list[tuple[int, torch.dtype | None]] = [(shape.num_samples, shape.sample_dtype)]
    if shape.trains_labels:
        rows.append((shape.num_labels or 0, shape.label_dtype))
    return [saved[0].new_empty(*leading, num, shape.width, dtype=dtype) for num, dtype in rows]


implementation = Implementation(
    "supcon_fused", "triton", (forward, backward), (fake_forward, fake_backward)
)


def variants(capability: int) -> list[Variant]:
    """List the shipped compilations: each padded width up to 256, and one larger width for all."""
    if capability < 80:
        return []
    found = []
    for dtype, width in itertools.product((torch.float16, torch.float32), (32, 64, 128, 256, 768)):
        found += pair_variants(capability, dtype, width)
        found += row_variants(dtype, width)
    return found
