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

from ..autograd import NO_SECOND_DERIVATIVE, refuse_second_derivative
from ..batch import ZERO_NORM, WiderBatch
from ..tiled.loss import batch_dtype
from .members import Members, find_members
from .pairs import log_denominators

# Their unit vectors are float16 for the matrix unit: of the two formats it has three bits more.
HALVES = (torch.float16, torch.bfloat16)


def contrastive_loss(
    name: str, wider: WiderBatch, log_denominators: Callable[..., Tensor] = log_denominators
) -> Tensor:
    """Return the loss: a scalar or [E]; for reduction "none" [.., A].

    name: "tiled" or "supcon_fused", the implementation of sums over pairs.
    log_denominators: `pairs.log_denominators`; with several processes, one that shares its work.
    """
    batch, num_anchors = wider.batch, wider.num_anchors
    members = find_members(wider)
    is_fused = name == "supcon_fused"
    # The kernels shift exponentials into float32's range.
    dtype = batch.accumulate_dtype if is_fused else batch_dtype(batch)
    num_trained = wider.num_trained
    z = Normalize.apply(wider.trained_rows(dtype), members.exists[:num_trained])
    rows = all_rows(wider, z.detach(), members)  # [.., R, d]
    scale = wider.anchor_temperatures(dtype).reciprocal()
    log_sums = log_denominators(
        z, rows.half() if is_fused and batch.embeddings.dtype in HALVES else rows, scale, members,
        batch.denominator, num_anchors, batch.pair_memory,
        float(wider.temperature) if is_fused else None,
    )  # fmt: skip  # [.., A]
    products = PositiveProducts.apply(z, rows, members, num_anchors)
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


def all_rows(wider: WiderBatch, z: Tensor, members: Members) -> Tensor:
    """Return the unit vectors of all rows [.., R, d] from those of the trained ones."""
    constants = wider.constant_rows(z.dtype)
    if constants is None:
        return z
    num_trained, num_constants = z.shape[-2], constants.shape[0]
    constants, norm = masked_norms(constants, members.exists[num_trained:])
    rows = z.new_empty(*z.shape[:-2], num_trained + num_constants, z.shape[-1])
    rows[..., :num_trained, :] = z
    out = rows[..., num_trained:, :]
    torch.div(constants.expand(out.shape), norm, out=out)
    return rows


def masked_norms(x: Tensor, exists: Tensor, shortest: float = ZERO_NORM) -> tuple[Tensor, Tensor]:
    """Return x, 0 for rows that are ignored, and ||x|| [.., 1], infinity for rows of zeros.

    shortest: a default, because torch.compile with dynamic shapes loses track of a global number.
    """
    # On a GPU all rows are masked, since reading which exist would wait for it.
    if exists.device.type != "cpu" or torch.compiler.is_compiling() or not bool(exists.all()):
        x = x.masked_fill(~exists[:, None], 0)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    # A NaN is not <= anything.
    return x, norm.masked_fill_(norm <= shortest, torch.inf)


class Normalize(torch.autograd.Function):
    """Unit vectors [.., n, d] of rows x, of which `exists` [n] do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, exists: Tensor) -> Tensor:
        x, norm = masked_norms(x, exists)
        z = x / norm
        ctx.save_for_backward(z, norm)
        return z

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        refuse_second_derivative(NO_SECOND_DERIVATIVE.format("this loss"))
        z, norm = ctx.saved_tensors
        projection = (gradient * z).sum(-1, keepdim=True)
        return torch.addcmul(gradient, z, projection, value=-1).div_(norm), None


class PositiveProducts(torch.autograd.Function):
    """sum_{j != i} p_ij z_i . z_j of the anchors [.., A] as a function of the trained z.

    rows: z and constants [.., R, d].
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, rows: Tensor, members: Members, num_anchors: int) -> Tensor:
        sums = members.positive_sums(rows, num_anchors).to(z.dtype)
        anchors = rows[..., :num_anchors, :]
        ctx.members, ctx.num_trained = members, z.shape[-2]
        ctx.save_for_backward(anchors, sums[..., : z.shape[-2], :])
        return (anchors * sums).sum(-1)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        refuse_second_derivative(NO_SECOND_DERIVATIVE.format("this loss"))
        anchors, sums = ctx.saved_tensors
        weighted = anchors * upstream[..., None]
        # p is symmetric.
        gradient = ctx.members.positive_sums(weighted, ctx.num_trained).to(weighted.dtype)
        gradient.addcmul_(sums, upstream[..., : ctx.num_trained, None])
        return gradient, None, None, None
