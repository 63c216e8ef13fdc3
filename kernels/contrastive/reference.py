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

from .batch import (
    ZERO_NORM,
    Batch,
    WiderBatch,
    accumulate_dtype,
    count_classes,
    existing_rows,
    memberships_of,
)


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


def wider_loss(wider: WiderBatch) -> Tensor:
    """Return the loss of a wider batch: a scalar or [E]; for reduction "none" [.., A].

    With A anchors, the first of R rows, memberships y and temperatures tau_i:

        p_ij = y_i . y_j               overlap; or sum_c y_ic y_jc / (n_c - 1), n_c rows having c
        L_i  = log D_i - (1 / W_i) sum_{j != i} p_ij s_ij     s_ij = z_i . z_j / tau_i
        W_i  = sum_{j != i} p_ij

    An anchor has the weight sum_c w_c y_ic / sum_c y_ic for class weights w; where every label is
    an anchor, sum of w_c over its labels that another row has. "mean" divides by the weights.
    """
    batch, num_anchors = wider.batch, wider.num_anchors
    exists, overlap, shared, weights = pair_memberships(wider)
    anchors = slice(0, num_anchors)
    dtype = accumulate_dtype(*(part.dtype for part in batch.parts))
    shared, weights = shared.to(dtype), weights.to(dtype)  # [A, R], [A]
    x, constants = wider.trained_rows(dtype), wider.constant_rows(dtype)
    if constants is not None:
        x = torch.cat([x, constants.expand(*x.shape[:-2], -1, -1)], dim=-2)
    z = normalize(x, exists)  # [.., R, d]
    temperature = wider.anchor_temperatures(dtype)
    if temperature.dim() <= len(batch.leading):
        temperature = temperature[..., None]
    similarity = z[..., anchors, :] @ z.mT / temperature[..., None]  # [.., A, R]

    pair_exists = exists[anchors, None] & exists  # [A, R]
    itself = torch.eye(*pair_exists.shape, dtype=torch.bool, device=exists.device)
    p = shared.masked_fill(itself | ~pair_exists, 0)
    in_denominator = {
        "all": pair_exists,
        "others": pair_exists & ~itself,
        "negatives": pair_exists & (overlap == 0) & ~itself,
    }[batch.denominator]
    total = p.sum(1)
    counts = (total > 0) & in_denominator.any(1)

    log_denominator = similarity.masked_fill(~in_denominator, -torch.inf).logsumexp(-1)  # [.., A]
    positive_sum = (similarity.masked_fill(p == 0, 0) * p).sum(-1)
    losses = log_denominator - positive_sum / total.masked_fill(total == 0, 1)
    weights = weights.masked_fill(~counts, 0)
    losses = losses.masked_fill(~counts, 0) * weights
    if batch.reduction != "none":
        losses = losses.sum(-1)
    if batch.reduction == "mean":
        losses = losses / weights.sum().masked_fill(weights.sum() == 0, 1)
    return losses


def pair_memberships(wider: WiderBatch) -> tuple[Tensor, ...]:
    """Return which rows exist [R], y_i . y_j and p_ij [A, R], and the weights of anchors [A]."""
    batch = wider.batch
    exists, num_classes = existing_rows(wider), count_classes(wider)
    labels, memory_labels = [batch.labels], wider.memory_labels
    if num_classes is None:
        # Any integers: as positions among the different ones.
        found = labels if memory_labels is None else [*labels, memory_labels]
        different, positions = torch.cat(found).unique(return_inverse=True)
        num_classes, num_samples = max(different.shape[0], 1), batch.labels.shape[0]
        labels, memory_labels = [positions[:num_samples]], positions[num_samples:]
    parts = [memberships_of(one, num_classes) for one in labels]
    if batch.num_labels is not None:
        parts.append(torch.eye(num_classes, dtype=torch.float64, device=exists.device))
    parts *= batch.num_copies
    if memory_labels is not None:
        parts.append(memberships_of(memory_labels, num_classes))
    y = torch.cat(parts).masked_fill(~exists[:, None], 0)  # [R, K]
    class_weights = y.new_ones(num_classes)
    if wider.class_weights is not None:
        class_weights = wider.class_weights.double()
    of_anchors = y[: wider.num_anchors]
    overlap = of_anchors @ y.T
    if wider.positives == "each":
        others = y.sum(0) - 1
        factors = torch.where(others > 0, class_weights / others.clamp(min=1), 0)
        weights = of_anchors @ (class_weights * (others > 0))
        return exists, overlap, (of_anchors * factors) @ y.T, weights
    weights = of_anchors @ class_weights / of_anchors.sum(1).clamp(min=1e-300)
    return exists, overlap, overlap, weights


def normalize(x: Tensor, exists: Tensor) -> Tensor:
    """Return unit vectors [.., M, d]; zero vectors and ignored rows become 0 with gradient 0."""
    # A NaN is not <= anything: it reaches the loss.
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    directionless = (norm <= ZERO_NORM) | ~exists[:, None]
    # Vector and length are both replaced before the division, so that neither 0/0 nor an ignored
    # row's NaN enters the backward pass.
    x = x.masked_fill(directionless, 0)
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).masked_fill(directionless, 1)
