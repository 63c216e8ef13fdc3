"""Both passes of the loss over all ranks' samples by tiles, with the own rows first."""

from torch import Tensor

from ..batch import Batch, BatchShape
from ..tiled import loss as tiled
from .batch import Spread


def forward(spread: Spread, batch: Batch, with_gradient: bool) -> tuple[Tensor, list[Tensor]]:
    """Return the loss (for "none" the losses of the own rows), and what `backward` needs."""
    rows = tiled.prepare(batch)
    order = spread.own_first(batch.embeddings.device)
    y, classes = rows.y.index_select(-2, order), rows.classes.index_select(0, order)
    half = tiled.uses_half(y, batch.embeddings.dtype, batch.temperature)
    own_sums = tiled.pair_sums(
        y, rows.weight.index_select(0, order), classes, batch.denominator, half,
        spread.num_own_rows,
    )  # fmt: skip
    sums = spread.all_sums(own_sums, batch.reduction)  # D, [.., M]
    losses = tiled.reduced_losses(rows, sums, batch)
    if batch.reduction == "none":
        losses = losses.index_select(-1, order[: spread.num_own_rows])
    losses = losses.to(batch.accumulate_dtype)
    if not with_gradient:
        return losses, []
    # The student's rows of this rank: its samples and all label embeddings.
    student = order[: spread.num_own_rows // spread.num_copies]
    return losses, [
        order, classes,
        rows.reduction_weight.index_select(0, order),
        rows.inverse_positives.index_select(0, order),
        y,
        rows.inverse_norm.index_select(-2, student),
        sums.index_select(-1, order),
        rows.others.index_select(-2, student),
    ]  # fmt: skip


def backward(
    spread: Spread, loss_gradient: Tensor, saved: list[Tensor], shape: BatchShape
) -> list[Tensor]:
    """Return gradients of the own samples and, if they are trained, of the label embeddings."""
    order, *rows = saved
    if shape.reduction == "none":
        own_sums = rows[5][..., : spread.num_own_rows]
        rows[5], loss_gradient = spread.gather_upstream(own_sums, loss_gradient, order)
    # The classes are those of all ranks; frozen label embeddings need no gradient.
    (gradient,) = tiled.backward(
        loss_gradient,
        rows,
        shape._replace(
            num_classes=spread.num_labels or sum(spread.num_samples),
            num_labels=shape.num_labels if shape.trains_labels else None,
        ),
    )
    samples = gradient[..., : shape.num_samples, :] * spread.num_ranks
    return [samples, gradient[..., shape.num_samples :, :]]
