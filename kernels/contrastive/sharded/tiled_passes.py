"""Both passes of `supcon_global` by tiles: those of `supcon_tiled` with the own rows first."""

from typing import Any

import torch
from torch import Tensor

from ..batch import accumulate_dtype
from ..tiled import loss as tiled
from .batch import GlobalBatch, Spread


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
    others = (label_embeddings, batch.teacher_embeddings, teacher_label_embeddings)
    rows = tiled.prepare(
        embeddings, batch.labels, *others, temperature, denominator, reduction, ignore_index
    )
    order = spread.own_first(embeddings.device)
    y, classes = rows.y.index_select(-2, order), rows.classes.index_select(0, order)
    half = tiled.half_operands(embeddings, temperature, *others)
    own_sums = tiled.pair_sums(
        y, rows.weight.index_select(0, order), classes, denominator, half, spread.num_own_rows
    )
    # In the global order, so that every rank adds up the same numbers in the same order.
    of_all = spread.place_rows if reduction == "none" else spread.gather_rows
    sums = of_all(own_sums)  # D, [.., M]
    losses = tiled.reduced_losses(rows, sums, denominator, reduction)
    if reduction == "none":
        losses = losses.index_select(-1, order[: spread.num_own_rows])
    dtypes = [part.dtype for part in (embeddings, *others) if part is not None]
    losses = losses.to(accumulate_dtype(*dtypes))
    if not with_gradient:
        return losses, [], ()

    num_trained = spread.num_samples[spread.rank] + (spread.num_labels if with_labels else 0)
    trained = order[:num_trained]
    saved = [
        order, classes,
        rows.reduction_weight.index_select(0, order),
        rows.inverse_positives.index_select(0, order),
        y,
        rows.inverse_norm.index_select(-2, trained),
        sums.index_select(-1, order),
        rows.others.index_select(-2, trained),
    ]  # fmt: skip
    num_classes = spread.num_labels or sum(spread.num_samples)
    return losses, saved, (num_classes, num_trained, temperature, denominator, reduction, half)


def backward(
    spread: Spread,
    loss_gradient: Tensor,
    saved: list[Tensor],
    known: tuple[Any, ...],
    sample_dtype: torch.dtype,
    label_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the own samples and, if they are trained, of the label embeddings."""
    order, *rows = saved
    reduction = known[4]
    if reduction == "none":
        own_sums = rows[5][..., : spread.num_own_rows]
        own = torch.stack([own_sums, spread.mean_weights(loss_gradient).to(own_sums.dtype)], -2)
        rows[5], loss_gradient = spread.gather_rows(own).index_select(-1, order).unbind(-2)
    gradient = tiled.backward(loss_gradient, rows, *known)
    num_samples = spread.num_samples[spread.rank]
    samples = gradient[..., :num_samples, :] * spread.num_ranks
    labels = gradient[..., num_samples:, :]
    if label_dtype is None or labels.shape[-2] == 0:
        return samples.to(sample_dtype), None
    return samples.to(sample_dtype), labels.to(label_dtype)
