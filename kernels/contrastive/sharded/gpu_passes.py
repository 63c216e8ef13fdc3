"""Both passes of the loss over all ranks' samples on the matrix unit, with the own rows first."""

import torch
from torch import Tensor

from ..batch import Batch, BatchShape
from ..gpu import large_batches
from ..gpu.pair_sums import PartialSums, row_sums
from ..gpu.row_steps import losses
from .batch import Spread


def forward(spread: Spread, batch: Batch, with_gradient: bool) -> tuple[Tensor, list[Tensor]]:
    """Return the loss (for "none" the losses of the own rows), and what `backward` needs."""
    num_rows, num_own_rows = spread.num_rows, spread.num_own_rows
    with torch.cuda.device_of(batch.embeddings):
        rows = large_batches.prepare(batch)
        order = spread.own_first(batch.embeddings.device)
        padding = torch.arange(num_rows, rows.z.shape[1], device=order.device)
        padded_order = torch.cat([order, padding])
        own_first = rows._replace(
            z=rows.z.index_select(1, padded_order),
            inverse_norms=rows.inverse_norms.index_select(1, padded_order),
            shifts=rows.shifts.index_select(0, padded_order),
            classes=rows.classes.index_select(0, padded_order),
            # The rows sorted by class, by their positions in the local order.
            order=torch.argsort(order).index_select(0, rows.order),
        )
        z = own_first.z
        own_sums = own_first.shifts.new_empty(z.shape[0], 0)
        if num_own_rows > 0:
            own_sums = row_sums(
                z, own_first.shifts, own_first.classes, num_own_rows, num_rows,
                batch.temperature, batch.denominator, large_batches.tiles(z).forward,
            ).sum(0)  # fmt: skip
        sums = spread.all_sums(own_sums, batch.reduction)
        loss, u, inverse_positives = losses(
            PartialSums.of_splits(sums[None]), rows, batch.temperature, batch.denominator
        )
    if batch.reduction == "none":
        loss = loss.index_select(-1, order[:num_own_rows])
    loss, num_anchors = large_batches.reduced(loss, inverse_positives, batch)
    if not with_gradient:
        return loss, []
    return loss, [
        padded_order, own_sums, *own_first,
        u.index_select(1, padded_order), inverse_positives.index_select(0, padded_order),
        *num_anchors,
    ]  # fmt: skip


def backward(
    spread: Spread, loss_gradient: Tensor, saved: list[Tensor], shape: BatchShape
) -> list[Tensor]:
    """Return gradients of the own samples and, if they are trained, of the label embeddings."""
    padded_order, own_sums, *rows = saved
    leading = loss_gradient.shape[:-1] if shape.reduction == "none" else loss_gradient.shape
    if shape.reduction == "none":
        order = padded_order[: spread.num_rows]
        sums, loss_gradient = spread.gather_upstream(
            own_sums, loss_gradient.reshape(own_sums.shape).float(), order
        )
        u = sums.clamp(min=torch.finfo(torch.float32).tiny).reciprocal()
        u = torch.nn.functional.pad(u, (0, padded_order.shape[0] - order.shape[0]))
        inverse_positives = rows[8]
        rows[7] = u.masked_fill(inverse_positives == 0, 0)
    if shape.num_samples == 0 and not shape.trains_labels:
        return [own_sums.new_empty(*leading, 0, shape.width)]
    # The kernels have one factor for all rows: the few label embeddings are divided by it again.
    gradients = large_batches.backward(
        loss_gradient * spread.num_ranks, rows, shape._replace(label_dtype=torch.float32)
    )
    samples, *labels = (gradient.view(leading + gradient.shape[-2:]) for gradient in gradients)
    return [samples, *(gradient / spread.num_ranks for gradient in labels)]
