"""The contrastive losses with tensors as temperatures, several labels a row, memories and weights.

    p_ij = y_i . y_j       for memberships y, 1 or 0 for classes; with positives="each"
                           sum_c y_ic y_jc / (n_c - 1), where n_c rows have label c
    W_i  = sum_{j != i} p_ij
    L_i  = log D_i - (1 / W_i) sum_{j != i} p_ij z_i . z_j / tau_i
    D_i  = sum_k exp(z_i . z_k / tau_i)

Only D_i looks at pairs: `pairs` computes its logarithm and the gradient of it. The rest is a sum
over classes, O(R d + R K), which PyTorch differentiates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..batch import WiderBatch
from ..reference import normalize
from ..tiled.loss import batch_dtype
from .members import Members, find_members
from .pairs import log_denominators


def contrastive_loss(
    wider: WiderBatch, log_denominators: Callable[..., Tensor] = log_denominators
) -> Tensor:
    """Return the loss: a scalar or [E]; for reduction "none" [.., A].

    log_denominators: `pairs.log_denominators`, or what does its work for several processes.
    """
    batch, num_anchors = wider.batch, wider.num_anchors
    members = find_members(wider)
    dtype = batch_dtype(batch)
    z = normalize(wider.concatenate(dtype), members.exists)  # [.., R, d]
    scale = wider.anchor_temperatures(dtype).reciprocal()
    log_sums = log_denominators(
        z, scale, members, batch.denominator, num_anchors, wider.num_trained, batch.pair_memory
    )  # [.., A]
    positive_sums = PositiveSums.apply(z, members, num_anchors, wider.num_trained)
    products = (z[..., :num_anchors, :] * positive_sums).sum(-1)
    shared = members.shared.to(dtype)
    if scale.dim() == len(batch.leading) and scale.dim() > 0:
        scale = scale[..., None]
    losses = log_sums - scale * products / shared.masked_fill(shared == 0, 1)
    # With "negatives" an anchor may have no negative; a NaN counts.
    counts = (members.anchor_weights > 0) & (log_sums.detach() != -torch.inf)  # [.., A]
    weights = torch.where(counts, members.anchor_weights, 0).to(dtype)
    losses = losses.masked_fill(~counts, 0) * weights
    if batch.reduction != "none":
        losses = losses.sum(-1)
    if batch.reduction == "mean":
        weight = weights.sum(-1)
        losses = losses / weight.masked_fill(weight == 0, 1)
    return losses.to(batch.accumulate_dtype)


class PositiveSums(torch.autograd.Function):
    """The sums over positives [.., A, d] of z [.., R, d], whose first rows get a gradient."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, members: Members, num_anchors: int, trained: int) -> Tensor:
        ctx.members, ctx.trained, ctx.num_rows = members, trained, z.shape[-2]
        return members.positive_sums(z, num_anchors).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        # p is symmetric.
        found = ctx.members.positive_sums(gradient, ctx.trained).to(gradient.dtype)
        missing = ctx.num_rows - ctx.trained
        return torch.nn.functional.pad(found, (0, 0, 0, missing)), None, None, None
