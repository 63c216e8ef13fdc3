"""What one would use instead: each is written the way its users write it."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def dense_supcon(
    embeddings: Tensor, labels: Tensor, temperature: float = 0.5, denominator: str = "others"
) -> Tensor:
    """The dense formula in eager PyTorch, mean over the anchors that have a positive.

    Follows the steps of the loss published with Khosla et al. 2020 (positive mask, maximum
    subtracted, masked exponentials, mean log probability of the positives) with one view per
    sample, without its loop over views.
    """
    z = torch.nn.functional.normalize(embeddings, dim=1)
    similarity = torch.mm(z, z.t()) / temperature
    similarity = similarity - similarity.max(dim=1, keepdim=True).values.detach()
    others = torch.ones_like(similarity).fill_diagonal_(0)
    positive = torch.eq(labels[:, None], labels[None, :]).to(similarity.dtype) * others
    exponentials = torch.exp(similarity)
    if denominator == "others":
        exponentials = exponentials * others
    log_probability = similarity - torch.log(exponentials.sum(1, keepdim=True))
    num_positives = positive.sum(1)
    mean_log_probability = (positive * log_probability).sum(1) / num_positives.clamp(min=1)
    return -mean_log_probability.sum() / (num_positives > 0).sum()


def dense_acl(
    embeddings: Tensor, labels: Tensor, label_embeddings: Tensor, temperature: float = 0.5
) -> Tensor:
    """`dense_supcon` of samples and label embeddings, concatenated, over all rows (eq. 1)."""
    label_ids = torch.arange(label_embeddings.shape[0], device=labels.device)
    return dense_supcon(
        torch.cat([embeddings, label_embeddings]),
        torch.cat([labels, label_ids]),
        temperature,
        denominator="all",
    )


def metric_learning_supcon(temperature: float = 0.5) -> Callable[[Tensor, Tensor], Tensor]:
    """SupConLoss of pytorch-metric-learning (denominator "others")."""
    from pytorch_metric_learning.losses import SupConLoss

    return SupConLoss(temperature=temperature)


def concatenated_dot_norm(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """(a . b, |a|^2, |b|^2) the usual way: flatten both lists, one dot, two norms."""
    flat_a = torch.cat([tensor.reshape(-1) for tensor in a])
    flat_b = torch.cat([tensor.reshape(-1) for tensor in b])
    return torch.stack([torch.dot(flat_a, flat_b), flat_a.norm() ** 2, flat_b.norm() ** 2])


def foreach_combine_(a: Sequence[Tensor], b: Sequence[Tensor], weight: float, scale: float) -> None:
    """a <- scale ((1 - weight) a + weight b) with PyTorch's multi-tensor operations."""
    torch._foreach_lerp_(list(a), list(b), weight)
    torch._foreach_mul_(list(a), scale)
