"""The contrastive losses in float64, in blocks of rows, for any number of rows.

Same formula as kernels/contrastive/reference.py: the loss of all rows, the gradient of some rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..suite import relative_error

# Number of rows whose gradient is checked.
NUM_CHECKED = 256
# Pairs per float64 block: 256 MiB.
BLOCK_PAIRS = 2**25

# Rows in the denominator, and rows in the mean: eq. 1 of the paper; Khosla et al. 2020 and the
# libraries; SupContrast, whose mean also counts anchors without a positive.
ALL, OTHERS, OTHERS_ALL_ROWS = (
    "all rows, mean of anchors",
    "other rows, mean of anchors",
    "other rows, mean of all rows",
)
# Not a loss over rows, but something else in its place: SigLIP with several positives.
SIGMOIDS = "sigmoids of all pairs, mean of pairs"


@dataclass(frozen=True)
class Exact:
    """The loss, and its gradient [n, d] at some rows [n], in float64."""

    loss: Tensor
    rows: Tensor
    gradient: Tensor


def exact_in_blocks(
    embeddings: Tensor,
    labels: Tensor,
    formula: str = OTHERS,
    *,
    temperature: float,
    num_checked: int = NUM_CHECKED,
    num_trained: int | None = None,
) -> Exact:
    """Loss of rows [M, d] with labels [M] from 0 on, and its gradient at evenly spaced rows.

    num_trained: the gradient is that of the first rows, None for all.
    """
    x = embeddings.double()
    norm = x.norm(dim=1, keepdim=True)
    z = x / norm
    num_rows, without_itself = z.shape[0], formula != ALL
    block = max(1, min(num_rows, BLOCK_PAIRS // num_rows))
    everything = torch.arange(num_rows, device=z.device)
    parts = everything.split(block)
    sums = [exponentials(z, part, temperature, without_itself).sum(1) for part in parts]
    denominators = torch.cat(sums)

    num_classes = int(labels.max()) + 1
    of_class = z.new_zeros(num_classes, z.shape[1]).index_add_(0, labels, z)[labels]  # [M, d]
    num_positives = (torch.bincount(labels, minlength=num_classes)[labels] - 1).double()
    is_anchor = num_positives > 0
    positive_mean = ((of_class - z) * z).sum(1) / temperature / num_positives.clamp(min=1)
    counted = num_rows if formula == OTHERS_ALL_ROWS else int(is_anchor.sum())
    weight = is_anchor / counted
    loss = ((denominators.log() - positive_mean) * weight).sum()

    trained = everything[:num_trained]
    rows = trained[:: max(1, len(trained) // num_checked)]
    u = weight / denominators
    v = weight / num_positives.clamp(min=1)
    gradients = []
    for part in rows.split(block):
        pairs = exponentials(z, part, temperature, without_itself) * (u[part, None] + u)
        of_z = (pairs @ z - 2 * v[part, None] * (of_class - z)[part]) / temperature
        # The diagonal's contribution is parallel to z, so the normalisation removes it.
        along = (of_z * z[part]).sum(1, keepdim=True)
        gradients.append((of_z - along * z[part]) / norm[part])
    return Exact(loss, rows, torch.cat(gradients))


def sigmoids_in_blocks(
    embeddings: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    num_trained: int | None = None,
) -> Exact:
    """The mean over all pairs of log(1 + exp(s)), or of log(1 + exp(-s)) / n for the n of a class.

    Rows [M, d] stand on both sides; s is their cosine over the temperature.
    """
    x = embeddings.double()
    norm = x.norm(dim=1, keepdim=True)
    z = x / norm
    num_rows = z.shape[0]
    everything = torch.arange(num_rows, device=z.device)
    block = max(1, min(num_rows, BLOCK_PAIRS // num_rows))
    weight = 1 / torch.bincount(labels)[labels].double()

    def pairs(part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Similarities, sign and weight of each pair of these rows with all rows."""
        positive = labels[part, None] == labels
        return (
            (z[part] @ z.T) / temperature,
            torch.where(positive, -1.0, 1.0),
            torch.where(positive, weight[part, None], 1.0),
        )

    loss = z.new_zeros(())
    for part in everything.split(block):
        similarity, sign, of_pair = pairs(part)
        loss += (torch.nn.functional.softplus(sign * similarity) * of_pair).sum()
    trained = everything[:num_trained]
    rows = trained[:: max(1, len(trained) // NUM_CHECKED)]
    gradients = []
    for part in rows.split(block):
        similarity, sign, of_pair = pairs(part)
        # A row is on both sides.
        of_z = 2 / temperature * (torch.sigmoid(sign * similarity) * sign * of_pair) @ z
        along = (of_z * z[part]).sum(1, keepdim=True)
        gradients.append((of_z - along * z[part]) / norm[part])
    return Exact(loss / num_rows**2, rows, torch.cat(gradients) / num_rows**2)


def exponentials(z: Tensor, rows: Tensor, temperature: float, without_itself: bool) -> Tensor:
    """Exponentials [rows, M] of similarities; 0 for a row with itself if it does not count."""
    pairs = (z[rows] @ z.T).div_(temperature).exp_()
    return pairs.scatter_(1, rows[:, None], 0.0) if without_itself else pairs


def error_of(loss: Tensor, gradient: Tensor, upstream: float, exact: Exact) -> float:
    """Largest `relative_error` of a loss and of its gradient at the rows of `exact`."""
    of_gradient = relative_error(gradient[exact.rows], exact.gradient * upstream)
    return max(relative_error(loss, exact.loss), of_gradient)
