"""A contrastive batch that is spread over the ranks of a process group.

The global batch has the samples of all ranks, in the order of the ranks, then the label embeddings
ONCE, then their teacher counterparts: the same rows as the batch of one process that holds all
samples. A rank's own rows are its samples, all label embeddings and their teacher counterparts.

A loss takes three collectives: `agree`, `gather_batch` and `Spread.gather_rows`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..batch import Batch
from .agreement import ProcessGroup, all_gather

# Parts of a message start at multiples of the size of the largest element.
ALIGNMENT = 8


@dataclass(frozen=True)
class Spread:
    """The distribution of the rows of a global batch over the ranks.

    num_samples: number of samples of each rank, in order.
    num_labels: K, or 0 without label embeddings.
    num_copies: 2 with teacher rows, else 1.
    """

    process_group: ProcessGroup
    rank: int
    num_samples: tuple[int, ...]
    num_labels: int
    num_copies: int

    @property
    def num_ranks(self) -> int:
        return len(self.num_samples)

    @property
    def num_rows(self) -> int:
        """The number M of rows of all ranks."""
        return self.num_copies * (sum(self.num_samples) + self.num_labels)

    @property
    def num_own_rows(self) -> int:
        return self.num_copies * (self.num_samples[self.rank] + self.num_labels)

    @property
    def own_samples(self) -> slice:
        """The slice of this rank's samples among all samples."""
        start = sum(self.num_samples[: self.rank])
        return slice(start, start + self.num_samples[self.rank])

    def own_rows(self, device: torch.device) -> Tensor:
        """Return the positions of the own rows [m] in the global batch."""
        by_copy = torch.arange(self.num_rows, device=device).view(self.num_copies, -1)
        labels = by_copy[:, sum(self.num_samples) :]
        return torch.cat([by_copy[:, self.own_samples], labels], dim=1).flatten()

    def own_first(self, device: torch.device) -> Tensor:
        """Return the positions of all rows [M] in the global batch, the own rows first."""
        total, own = sum(self.num_samples), self.own_samples
        positions = torch.arange(self.num_rows, device=device).view(self.num_copies, -1)
        others = torch.cat([positions[:, : own.start], positions[:, own.stop : total]], dim=1)
        return torch.cat([self.own_rows(device), others.flatten()])

    def mean_weights(self, upstream: Tensor) -> Tensor:
        """Return weights [.., m] of the own rows in the mean over ranks, for `gather_rows`.

        upstream: gradients [.., m]. A label embedding has one on every rank, of which `gather_rows`
            takes the mean; a sample has one on one rank.
        """
        num_own = self.num_samples[self.rank]
        by_copy = upstream.reshape(*upstream.shape[:-1], self.num_copies, num_own + self.num_labels)
        samples, labels = by_copy[..., :num_own] / self.num_ranks, by_copy[..., num_own:]
        return torch.cat([samples, labels], dim=-1).flatten(-2)

    def gather_rows(self, values: Tensor) -> Tensor:
        """Return values [.., M] of all rows from the own rows' [.., m], with one all-gather.

        Of a label embedding's values on all ranks it is the mean: all ranks have the same bits.
        """
        num_own, largest = self.num_samples[self.rank], max(self.num_samples)
        leading = values.shape[:-1]
        by_copy = values.reshape(*leading, self.num_copies, num_own + self.num_labels)
        samples = by_copy[..., :num_own]
        padding = by_copy.new_zeros(*by_copy.shape[:-1], largest - num_own)
        sent = torch.cat([samples, padding, by_copy[..., num_own:]], dim=-1)
        received = sent.new_empty(self.num_ranks, *sent.shape)
        all_gather(received, sent, self.process_group)
        parts = [received[rank, ..., :number] for rank, number in enumerate(self.num_samples)]
        # Divided before the sum, which might leave the range of the dtype.
        parts.append((received[..., largest:] / self.num_ranks).sum(0))
        return torch.cat(parts, dim=-1).flatten(-2)

    def all_sums(self, own_sums: Tensor, reduction: str) -> Tensor:
        """Return D [.., M] in the global order from that of the own rows [.., m].

        With "none" other rows have 1, and D is gathered in the backward pass. In the global order
        every rank adds up the same numbers in one order.
        """
        if reduction != "none":
            return self.gather_rows(own_sums)
        placed = own_sums.new_ones(*own_sums.shape[:-1], self.num_rows)
        placed[..., self.own_rows(own_sums.device)] = own_sums
        return placed

    def gather_upstream(
        self, own_sums: Tensor, upstream: Tensor, order: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return D and the upstream gradients [.., M] of all rows in this order, for "none"."""
        own = torch.stack([own_sums, self.mean_weights(upstream).to(own_sums.dtype)], dim=-2)
        sums, weights = self.gather_rows(own).index_select(-1, order).unbind(-2)
        return sums, weights


def gather_batch(spread: Spread, batch: Batch) -> Batch:
    """Return the batch with the samples of all ranks, without a graph, after one all-gather.

    Not normalized, so that 16-bit embeddings are sent as 16 bits. Labels become int64.
    """
    # The sample dimension comes first, so that a rank's samples are a slice.
    own = [batch.labels.long(), batch.embeddings.detach().movedim(-2, 0)]
    if batch.teacher_embeddings is not None:
        own.append(batch.teacher_embeddings.detach())
    parts = gather_parts(spread, own, spread.num_samples)
    return batch._replace(
        embeddings=parts[1].movedim(0, -2).contiguous(),
        labels=parts[0],
        teacher_embeddings=parts[2] if len(parts) > 2 else None,
    )


def gather_parts(spread: Spread, own: list[Tensor], counts: tuple[int, ...]) -> list[Tensor]:
    """Return parts [sum of counts, ..] from those of all ranks [n, ..], after one all-gather."""
    largest = max(counts)
    if largest == 0:
        # No rank has a row, and none sends.
        return own
    sent = torch.cat([padded_bytes(part, largest) for part in own])
    received = sent.new_empty(spread.num_ranks, sent.numel())
    all_gather(received, sent, spread.process_group)
    parts, start = [], 0
    for part in own:
        shape = (largest, *part.shape[1:])
        num_bytes = shape_bytes(shape, part.dtype)
        by_rank = [
            row[start : start + num_bytes].view(part.dtype).view(shape)[:number]
            for row, number in zip(received, counts, strict=True)
        ]
        parts.append(torch.cat(by_rank))
        start += aligned(num_bytes)
    return parts


def padded_bytes(part: Tensor, num_samples: int) -> Tensor:
    """Return the bytes of a part [n, ..], padded to the size of [num_samples, ..]."""
    # A copy, since one element may have any stride, and be contiguous nevertheless.
    found = part.new_empty(part.shape).copy_(part).view(-1).view(torch.uint8)
    num_bytes = aligned(shape_bytes((num_samples, *part.shape[1:]), part.dtype))
    return torch.nn.functional.pad(found, (0, num_bytes - found.numel()))


def shape_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
