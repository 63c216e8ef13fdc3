"""Alternatives to `acl_loss(..., process_group=...)` from other libraries.

Each function takes samples, labels and label embeddings of one rank of the default group; all ranks
have equally many samples. The mean of the results over the ranks is the mean loss of all M rows,
and the mean of the ranks' gradients is its gradient. Denominator "all", reduction "mean".
"""

from collections.abc import Iterator
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.nn.functional import normalize

from ....kernels.contrastive.sharded.agreement import all_gather

# Message tags: blocks and gradients travel around the ring at the same time.
BLOCK, GRADIENT = 0, 1


class Anchors(NamedTuple):
    """Classes, numbers of positives and weights of a rank's rows."""

    all_labels: Tensor  # [W, N]
    classes: Tensor  # [m]: own samples, then label embeddings
    num_positives: Tensor  # [m]
    weights: Tensor  # [m]; their sum over all ranks is W

    @property
    def column_classes(self) -> Tensor:
        """Classes of the samples of all ranks, then of the label embeddings: [M]."""
        return torch.cat([self.all_labels.flatten(), self.classes[self.all_labels.shape[1] :]])


def anchors_of(labels: Tensor, num_labels: int) -> Anchors:
    """Gather the labels and count positives: their number depends on all ranks."""
    num_ranks = distributed.get_world_size()
    gathered = labels.new_empty(num_ranks * labels.shape[0])
    all_gather(gathered, labels, distributed.group.WORLD)
    # Label embeddings count as positives; a row is not its own positive.
    num_positives = torch.bincount(gathered, minlength=num_labels)
    num_anchors = gathered.shape[0] + num_positives.count_nonzero()
    classes = torch.cat([labels, torch.arange(num_labels)])
    own = num_positives[classes]
    # A label embedding is an anchor on every rank, a sample on its own rank only.
    copies = torch.ones(classes.shape[0])
    copies[: labels.shape[0]] = num_ranks
    return Anchors(gathered.view(num_ranks, -1), classes, own, copies * (own > 0) / num_anchors)


class GatherWithGradient(torch.autograd.Function):
    """Rows [W N, d] of all ranks; backward, every rank sums the gradients of its own rows.

    Backward is an all-to-all and a sum, as in torch.distributed.nn.all_gather: gloo's
    reduce-scatter is an all-reduce, which sends twice the bytes.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        gathered = rows.new_empty(distributed.get_world_size() * rows.shape[0], rows.shape[1])
        all_gather(gathered, rows, distributed.group.WORLD)
        return gathered

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        parts = torch.empty_like(gradient)
        distributed.all_to_all_single(parts, gradient.contiguous())
        return parts.unflatten(0, (distributed.get_world_size(), -1)).sum(0)


def gather_all(
    embeddings: Tensor, labels: Tensor, label_embeddings: Tensor, temperature: float
) -> Tensor:
    """The whole M x M matrix on every rank (open_clip's local_loss=False)."""
    classes = anchors_of(labels, label_embeddings.shape[0]).column_classes
    gathered = GatherWithGradient.apply(normalize(embeddings, dim=1))
    rows = torch.cat([gathered, normalize(label_embeddings, dim=1)])
    num_positives = torch.bincount(classes)[classes] - 1
    is_anchor = num_positives > 0
    positive = _positives(classes, classes, torch.arange(rows.shape[0]))
    return _dense(rows, rows, positive, num_positives, is_anchor / is_anchor.sum(), temperature)


def gather_rows(
    embeddings: Tensor, labels: Tensor, label_embeddings: Tensor, temperature: float
) -> Tensor:
    """Own rows x all rows (open_clip's local_loss=True, sentence-transformers)."""
    anchors = anchors_of(labels, label_embeddings.shape[0])
    samples, label_rows = normalize(embeddings, dim=1), normalize(label_embeddings, dim=1)
    columns = torch.cat([GatherWithGradient.apply(samples), label_rows])
    own = torch.arange(labels.shape[0]) + distributed.get_rank() * labels.shape[0]
    # The label embeddings are the last columns.
    own = torch.cat([own, torch.arange(anchors.all_labels.numel(), columns.shape[0])])
    positive = _positives(anchors.classes, anchors.column_classes, own)
    rows = torch.cat([samples, label_rows])
    return _dense(rows, columns, positive, anchors.num_positives, anchors.weights, temperature)


def _positives(classes: Tensor, column_classes: Tensor, own_columns: Tensor) -> Tensor:
    """Mask of the pairs that are positives of each other, without a row and its own column."""
    positive = classes[:, None] == column_classes
    positive[torch.arange(len(classes)), own_columns] = False
    return positive


def _dense(
    rows: Tensor,
    columns: Tensor,
    positive: Tensor,
    num_positives: Tensor,
    weights: Tensor,
    temperature: float,
) -> Tensor:
    """Weighted losses of the rows in eager PyTorch."""
    similarity = rows @ (columns / temperature).t()
    positive = positive.to(similarity.dtype)
    positive_mean = (similarity * positive).sum(1) / num_positives.clamp(min=1)
    return ((similarity.logsumexp(1) - positive_mean) * weights).sum()


def ring(
    embeddings: Tensor, labels: Tensor, label_embeddings: Tensor, temperature: float
) -> Tensor:
    """Blocks travel around a ring, in the backward pass with their gradients (Inf-CL)."""
    anchors = anchors_of(labels, label_embeddings.shape[0])
    scale = temperature**-0.5
    return RingLoss.apply(
        normalize(embeddings, dim=1) * scale, normalize(label_embeddings, dim=1) * scale, anchors
    )


class RingLoss(torch.autograd.Function):
    """Weighted losses of the own rows, given rows whose products are the similarities."""

    @staticmethod
    def forward(ctx: Any, samples: Tensor, label_rows: Tensor, anchors: Anchors) -> Tensor:
        rows = torch.cat([samples, label_rows])
        sums = rows.new_zeros(rows.shape[0])
        positives = rows.new_zeros(rows.shape[0])
        for columns, owner in chain(_travelling(samples), [(label_rows, None)]):
            similarity = rows @ columns.t()
            same = (anchors.classes[:, None] == _classes(anchors, owner)).to(similarity.dtype)
            positives += (same * similarity).sum(1)
            sums += similarity.exp_().sum(1)
        positives -= rows.square().sum(1)
        losses = sums.log() - positives / anchors.num_positives.clamp(min=1)
        ctx.save_for_backward(samples, label_rows, sums)
        ctx.anchors = anchors
        return (losses * anchors.weights).sum()

    @staticmethod
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        samples, label_rows, sums = ctx.saved_tensors
        anchors: Anchors = ctx.anchors
        rows = torch.cat([samples, label_rows])
        weights = anchors.weights * loss_gradient
        of_denominator = weights / sums
        of_positives = weights / anchors.num_positives.clamp(min=1)
        # Corrects for the pair of a row with itself, which the blocks count as a positive.
        gradient = 2 * of_positives[:, None] * rows

        def add_pairs(columns: Tensor, owner: int | None) -> Tensor:
            """Add the columns' share to the rows' gradient; return the columns' gradient."""
            pairs = (rows @ columns.t()).exp_().mul_(of_denominator[:, None])
            same = anchors.classes[:, None] == _classes(anchors, owner)
            pairs -= same * of_positives[:, None]
            gradient.addmm_(pairs, columns)
            return pairs.t() @ rows

        returning: Exchange | None = None
        for block, owner in _travelling(samples):
            own = add_pairs(block, owner)
            if returning is not None:
                own += returning.wait()
            if distributed.get_world_size() > 1:
                returning = Exchange(own, GRADIENT)
        if returning is not None:
            # After W steps the gradient of the own block has returned.
            own = returning.wait()
        label_gradient = add_pairs(label_rows, None)
        num_samples = samples.shape[0]
        return own + gradient[:num_samples], label_gradient + gradient[num_samples:], None


def _travelling(samples: Tensor) -> Iterator[tuple[Tensor, int | None]]:
    """Samples of each rank, the own ones first, and their owner; the next ones arrive meanwhile."""
    num_ranks, owner = distributed.get_world_size(), distributed.get_rank()
    block = samples.contiguous()
    for step in range(num_ranks):
        exchange = Exchange(block, BLOCK) if step + 1 < num_ranks else None
        yield block, owner
        if exchange is not None:
            block, owner = exchange.wait(), (owner - 1) % num_ranks


def _classes(anchors: Anchors, owner: int | None) -> Tensor:
    """Classes of a rank's samples, or of the label embeddings if `owner` is None."""
    num_samples = anchors.all_labels.shape[1]
    return anchors.classes[num_samples:] if owner is None else anchors.all_labels[owner]


class Exchange:
    """Send a tensor to the next rank while the previous rank's tensor arrives."""

    def __init__(self, sent: Tensor, tag: int) -> None:
        rank, num_ranks = distributed.get_rank(), distributed.get_world_size()
        self.sent = sent.contiguous()
        self.received = torch.empty_like(self.sent)
        self.requests: list[Any] = [
            distributed.isend(self.sent, (rank + 1) % num_ranks, tag=tag),
            distributed.irecv(self.received, (rank - 1) % num_ranks, tag=tag),
        ]

    def wait(self) -> Tensor:
        for request in self.requests:
            request.wait()
        return self.received
