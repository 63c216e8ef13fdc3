"""Both passes of `supcon_global` on the matrix unit: `supcon_fused`'s with the own rows first."""

from typing import Any

import torch
from torch import Tensor

from ..gpu import large_batches
from ..gpu.pair_sums import row_sums
from ..gpu.row_steps import losses
from .batch import GlobalBatch, Spread

SMALLEST = torch.finfo(torch.float32).tiny


def forward(
    batch: GlobalBatch,
    label_embeddings: Tensor | None,
    teacher_label_embeddings: Tensor | None,
    temperature: float,
    denominator: str,
    reduction: str,
    ignore_index: int,
    *,
    with_gradient: bool,
    with_labels: bool,
) -> tuple[Tensor, list[Tensor], tuple[Any, ...]]:
    """The loss (for "none" the losses of the own rows), and what `backward` needs to know."""
    spread, embeddings = batch.spread, batch.embeddings
    num_rows, num_own_rows = spread.num_rows, spread.num_own_rows
    with torch.cuda.device_of(embeddings):
        rows = large_batches.prepare(
            embeddings, batch.labels, label_embeddings, batch.teacher_embeddings,
            teacher_label_embeddings, temperature, ignore_index,
        )  # fmt: skip
        order = spread.own_first(embeddings.device)
        num_padded_rows = rows.z.shape[1]
        padding = torch.arange(num_rows, num_padded_rows, device=order.device)
        padded_order = torch.cat([order, padding])
        z = rows.z.index_select(1, padded_order)
        shifts = rows.shifts.index_select(0, padded_order)
        classes = rows.padded_classes.index_select(0, padded_order)
        own_sums = shifts.new_empty(z.shape[0], 0)
        if num_own_rows > 0:
            own_sums = row_sums(
                z, z, shifts, classes, classes, num_own_rows, num_rows, 0,
                temperature, denominator, large_batches.tiles(z).forward,
            ).sum(0)  # fmt: skip
        # In the global order, so that every rank adds up the same numbers in the same order.
        of_all = spread.place_rows if reduction == "none" else spread.gather_rows
        loss, u, inverse_positives = losses(
            of_all(own_sums)[None], rows.z, rows.padded_classes, rows.sums_by_class, rows.starts,
            temperature, denominator,
        )  # fmt: skip
    loss = loss.index_select(-1, order[:num_own_rows]) if reduction == "none" else loss.sum(-1)
    num_anchors = torch.count_nonzero(inverse_positives).clamp_(min=1)
    if reduction == "mean":
        loss /= num_anchors
    loss = loss.view(embeddings.shape[:-2] + loss.shape[1:])
    if not with_gradient:
        return loss, [], ()
    saved = [
        padded_order, own_sums, z, rows.inverse_norms.index_select(1, padded_order), shifts,
        classes, u.index_select(1, padded_order), inverse_positives.index_select(0, padded_order),
        rows.sums_by_class,
        # The rows by class, by their places in the local order.
        torch.argsort(order).index_select(0, rows.order),
        rows.starts,
    ]  # fmt: skip
    if reduction == "mean":
        saved.append(num_anchors)
    known = (with_labels, embeddings.shape[-1], temperature, denominator, reduction)
    return loss, saved, known


def backward(
    spread: Spread,
    loss_gradient: Tensor,
    saved: list[Tensor],
    known: tuple[Any, ...],
    sample_dtype: torch.dtype,
    label_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients [.., N_r, d] of the own samples and, if they are trained, [.., K, d]."""
    with_labels, width, temperature, denominator, reduction = known
    padded_order, own_sums, *rows = saved
    leading = loss_gradient.shape[: -1 if reduction == "none" else None]
    if reduction == "none":
        order = padded_order[: spread.num_rows]
        upstream = spread.mean_weights(loss_gradient.reshape(own_sums.shape).float())
        own = torch.stack([own_sums, upstream], dim=-2)
        sums, loss_gradient = spread.gather_rows(own).index_select(-1, order).unbind(-2)
        u = torch.nn.functional.pad(
            sums.clamp(min=SMALLEST).reciprocal(), (0, padded_order.shape[0] - order.shape[0])
        )
        inverse_positives = rows[5]
        rows[4] = u.masked_fill(inverse_positives == 0, 0)
    num_samples, num_ranks = spread.num_samples[spread.rank], spread.num_ranks
    trains_labels = with_labels and label_dtype is not None
    if num_samples == 0 and not trains_labels:
        return own_sums.new_empty(*leading, 0, width, dtype=sample_dtype), None
    # One factor for all rows: that of the samples, taken from the few label embeddings again.
    gradients = large_batches.backward(
        loss_gradient * num_ranks, rows, num_samples, spread.num_labels or None, width,
        spread.num_rows, temperature, denominator, reduction,
        sample_dtype, torch.float32 if trains_labels else None,
    )  # fmt: skip
    samples, *labels = (gradient.view(leading + gradient.shape[1:]) for gradient in gradients)
    if not trains_labels:
        return samples, None
    return samples, (labels[0] / num_ranks).to(label_dtype)
