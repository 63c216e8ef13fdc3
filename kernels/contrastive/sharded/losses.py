"""The contrastive losses over the samples of all ranks of a process group.

All rows of the global batch (see `batch`) are anchors, positives and negatives, as if one process
held all samples. A rank computes the sums over pairs of its own rows with all rows, 1/W of the
whole, and those of the label embeddings, which are few, on every rank:

    gather the samples        [N, d]: the one large message
    D_i of the own rows       own rows x all rows
    gather D                  one number per row; now every rank knows all L_i
    gradient of the own rows  sum_j e_ij (u_i + u_j) y_j over all rows: e is symmetric, so the own
                              rows' gradient through other ranks' anchors needs only those u_j, and
                              nothing is sent back

The objective of W ranks whose gradients are averaged is the mean of what the ranks return. So for
"mean" and "sum" every rank returns the global loss L, its samples get W dL/dx, and label
embeddings, whose gradient every rank computes whole, get dL/dl. For "none" a rank returns the
losses of its own rows. With upstream gradients g_r of rank r, row j has the weight
w_j = sum_r g_rj / W; these weights are gathered with D, in the backward pass.
"""

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import reference
from ..autograd import Passes
from ..batch import Batch
from .batch import Spread, gather_batch

NO_SECOND_DERIVATIVE = (
    "with a process_group only impl='reference' (reduction 'mean' or 'sum') can be "
    "differentiated twice"
)


def contrastive_loss(name: str, spread: Spread, batch: Batch) -> Tensor:
    """Return the loss of all ranks' samples by the implementation of that name.

    The batch is this rank's, checked; its options are, by `agreement.agree`, those of all ranks.
    """
    everyone = gather_batch(spread, batch)
    if name == "reference":
        return reference_loss(spread, batch.embeddings, everyone)
    module: ModuleType
    if name == "tiled":
        from . import tiled_passes as module
    else:
        from . import gpu_passes as module

    def forward(_: Batch, *trained: bool) -> tuple[Tensor, list[Tensor]]:
        return module.forward(spread, everyone, any(trained))

    backward = functools.partial(module.backward, spread)
    return Passes(NO_SECOND_DERIVATIVE, forward, backward).loss(batch)


def reference_loss(spread: Spread, embeddings: Tensor, everyone: Batch) -> Tensor:
    """Return `reference.contrastive_loss` of all samples, differentiable for the own ones."""
    samples = place(spread, embeddings.movedim(-2, 0), everyone.embeddings.movedim(-2, 0))
    loss = reference.contrastive_loss(everyone._replace(embeddings=samples.movedim(0, -2)))
    return OwnRows.apply(loss, spread) if everyone.reduction == "none" else loss


def place(spread: Spread, own: Tensor, gathered: Tensor) -> Tensor:
    """Return the gathered samples [N, ..] with the own ones, which keep their graph, among them."""
    scaled = own.view_as(own)
    if scaled.requires_grad:
        scaled.register_hook(lambda gradient: gradient * spread.num_ranks)
    start, stop = spread.own_samples.start, spread.own_samples.stop
    return torch.cat([gathered[:start], scaled, gathered[stop:]])


class OwnRows(torch.autograd.Function):
    """The own rows' losses [.., m] of all losses [.., M], with the gradients of all ranks."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor, spread: Spread) -> Tensor:
        ctx.spread = spread
        return losses.index_select(-1, spread.own_rows(losses.device))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.spread.gather_rows(ctx.spread.mean_weights(gradient)), None
