"""The specification of the contrastive losses: dense, plain PyTorch, differentiated by autograd.

    z_r  = x_r / ||x_r||           0 where ||x_r|| <= 1e-12: such a row has no direction
    s_ij = z_i . z_j / temperature
    P_i  = {j != i : y_j = y_i}
    D_i  = sum_k exp(s_ik)         over all rows ("all": arXiv 2602.03563 eq. 1), over k != i
                                   ("others": Khosla et al. 2020), or over the rows of other
                                   classes ("negatives": Yeh et al. 2021)
    L_i  = log D_i - (1 / |P_i|) sum_{j in P_i} s_ij

An anchor without a positive (with "negatives": or without a negative) has L_i = 0 and does not
count. A row whose label is ignored does not exist.
"""

import torch
from torch import Tensor

from .batch import ZERO_NORM, Batch, accumulate_dtype


def contrastive_loss(batch: Batch) -> Tensor:
    """Return the loss: a scalar or [E]; for reduction "none" [.., M].

    Computed in float32 (float64 if an input is). Memory: several [M, M] matrices per exit.
    """
    classes, _ = batch.find_classes()  # [M]
    exists = classes < batch.num_classes

    dtype = accumulate_dtype(*(part.dtype for part in batch.parts))
    z = normalize(batch.concatenate(dtype), exists)  # [.., M, d]
    similarity = z @ z.mT / batch.temperature  # [.., M, M]

    pair_exists = exists[:, None] & exists  # [M, M]
    same_class = (classes[:, None] == classes) & pair_exists
    itself = torch.eye(exists.shape[0], dtype=torch.bool, device=exists.device)
    positive = same_class & ~itself
    in_denominator = {
        "all": pair_exists,
        "others": pair_exists & ~itself,
        "negatives": pair_exists & ~same_class,
    }[batch.denominator]
    num_positives = positive.sum(1)  # [M]
    is_anchor = (num_positives > 0) & in_denominator.any(1)

    log_denominator = similarity.masked_fill(~in_denominator, -torch.inf).logsumexp(-1)  # [.., M]
    positive_sum = similarity.masked_fill(~positive, 0).sum(-1)
    losses = log_denominator - positive_sum / num_positives.clamp(min=1)
    losses = losses.masked_fill(~is_anchor, 0)

    if batch.reduction != "none":
        losses = losses.sum(-1)
    if batch.reduction == "mean":
        losses = losses / is_anchor.sum().clamp(min=1)
    return losses


def normalize(x: Tensor, exists: Tensor) -> Tensor:
    """Return unit vectors [.., M, d]; zero vectors and ignored rows become 0 with gradient 0."""
    # A NaN is not <= anything: it reaches the loss.
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    directionless = (norm <= ZERO_NORM) | ~exists[:, None]
    # Vector and length are both replaced before the division, so that neither 0/0 nor an ignored
    # row's NaN enters the backward pass.
    x = x.masked_fill(directionless, 0)
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).masked_fill(directionless, 1)
