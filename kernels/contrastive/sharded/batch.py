"""The rows of a contrastive batch that is spread over the ranks of a process group.

The global batch has the samples of all ranks, in the order of the ranks, then the label embeddings
ONCE, then their teacher counterparts: row for row the batch of one process that holds all samples.
A rank's own rows are its samples, all label embeddings and their teacher counterparts.

Three collectives make a loss: `agree` (512 bytes a rank, which also finds out who passes what
others do not), `gather_batch` (labels and embeddings) and `Spread.gather_rows` (one number a row).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .agreement import ProcessGroup, all_gather

# Parts of a message begin at multiples of the largest element.
ALIGNMENT = 8


@dataclass(frozen=True)
class Spread:
    """Which rows of a global batch are whose.

    num_samples: of every rank, in order; num_labels: K, or 0; num_copies: 2 with teacher rows.
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
        """M, of all ranks."""
        return self.num_copies * (sum(self.num_samples) + self.num_labels)

    @property
    def num_own_rows(self) -> int:
        return self.num_copies * (self.num_samples[self.rank] + self.num_labels)

    @property
    def own_samples(self) -> slice:
        """This rank's samples among all."""
        start = sum(self.num_samples[: self.rank])
        return slice(start, start + self.num_samples[self.rank])

    def own_rows(self, device: torch.device) -> Tensor:
        """The places of the own rows [m] in the global batch: samples, labels, teacher's."""
        total, num_labels, own = sum(self.num_samples), self.num_labels, self.own_samples
        places = torch.arange(self.num_copies * (total + num_labels), device=device)
        by_copy = places.view(self.num_copies, total + num_labels)
        return torch.cat([by_copy[:, own], by_copy[:, total:]], dim=1).flatten()

    def own_first(self, device: torch.device) -> Tensor:
        """The places of all rows [M] in the global batch, the own ones first."""
        total, own = sum(self.num_samples), self.own_samples
        places = torch.arange(self.num_rows, device=device).view(self.num_copies, -1)
        others = torch.cat([places[:, : own.start], places[:, own.stop : total]], dim=1)
        return torch.cat([self.own_rows(device), others.flatten()])

    def place_rows(self, values: Tensor) -> Tensor:
        """Values [.., M] of all rows from those of the own rows [.., m]; 1 for the others."""
        placed = values.new_ones(*values.shape[:-1], self.num_rows)
        placed[..., self.own_rows(values.device)] = values
        return placed

    def mean_weights(self, upstream: Tensor) -> Tensor:
        """Weights [.., m] of the own rows in the mean over ranks, for `gather_rows`.

        From the gradients that this rank's losses receive: a sample is in one rank's, a label
        embedding in all of them, whose mean `gather_rows` takes.
        """
        num_own = self.num_samples[self.rank]
        by_copy = upstream.reshape(*upstream.shape[:-1], self.num_copies, num_own + self.num_labels)
        samples, labels = by_copy[..., :num_own] / self.num_ranks, by_copy[..., num_own:]
        return torch.cat([samples, labels], dim=-1).flatten(-2)

    def gather_rows(self, values: Tensor) -> Tensor:
        """Values [.., M] of all rows from those of the own rows [.., m], with one all-gather.

        A sample's value is that of its rank. A label embedding has one on every rank: their mean,
        so that the result is the same, bit for bit, on all ranks.
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
        # Divided first: the sum of large denominators might leave the range of their dtype.
        parts.append((received[..., largest:] / self.num_ranks).sum(0))
        return torch.cat(parts, dim=-1).flatten(-2)


@dataclass(frozen=True)
class GlobalBatch:
    """The samples of all ranks, without a graph: [.., N, d], [N] and, with a teacher, [N, d]."""

    spread: Spread
    embeddings: Tensor
    labels: Tensor
    teacher_embeddings: Tensor | None


def gather_batch(
    spread: Spread, embeddings: Tensor, labels: Tensor, teacher_embeddings: Tensor | None
) -> GlobalBatch:
    """The samples of all ranks as they were passed, in their own dtypes, with one all-gather.

    Not normalised: 16-bit embeddings stay 16 bits on the way, and what is computed from them is
    what one process would compute. Labels become int64.
    """
    largest = max(spread.num_samples)
    # Samples first, so that a rank's samples are a slice.
    own = [labels.long(), embeddings.detach().movedim(-2, 0)]
    if teacher_embeddings is not None:
        own.append(teacher_embeddings.detach())
    sent = torch.cat([padded_bytes(part, largest) for part in own])
    received = sent.new_empty(spread.num_ranks, sent.numel())
    all_gather(received, sent, spread.process_group)
    parts, start = [], 0
    for part in own:
        shape = (largest, *part.shape[1:])
        num_bytes = shape_bytes(shape, part.dtype)
        by_rank = [
            row[start : start + num_bytes].view(part.dtype).view(shape)[:number]
            for row, number in zip(received, spread.num_samples, strict=True)
        ]
        parts.append(torch.cat(by_rank))
        start += aligned(num_bytes)
    return GlobalBatch(
        spread,
        parts[1].movedim(0, -2).contiguous(),
        parts[0],
        parts[2] if len(parts) > 2 else None,
    )


def padded_bytes(part: Tensor, num_samples: int) -> Tensor:
    """The elements of a part [n, ..] as bytes, padded to those of [num_samples, ..]."""
    found = part.contiguous().view(-1).view(torch.uint8)
    num_bytes = aligned(shape_bytes((num_samples, *part.shape[1:]), part.dtype))
    return torch.nn.functional.pad(found, (0, num_bytes - found.numel()))


def shape_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
