"""The rows of a contrastive batch that is spread over the ranks of a process group.

The global batch has the samples of all ranks, in the order of the ranks, then the label embeddings
ONCE, then their teacher counterparts: row for row the batch of one process that holds all samples.
A rank's own rows are its samples, all label embeddings and their teacher counterparts.

Three collectives make a loss: `agree` (512 bytes a rank, which also finds out who passes what
others do not), `gather_batch` (labels and embeddings) and `Spread.gather_rows` (one number a row).
"""

import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

# Bytes of the description of a call.
DESCRIPTION_BYTES = 512
# A refusal's text is cut to this: a character takes up to six bytes.
REFUSAL_CHARACTERS = 80
# Parts of a message begin at multiples of the largest element.
ALIGNMENT = 8

ProcessGroup = Any


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


def check_process_group(process_group: ProcessGroup) -> int:
    """The number of its ranks.

    Raises:
        TypeError, ValueError: what is no process group, or none that this process takes part in.
    """
    if not distributed.is_available():
        raise ValueError("process_group was given, but this torch is built without distributed")
    if process_group == distributed.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            "process_group is that of other ranks: this process is no member of it and must not "
            "take part in the loss (torch.distributed.new_group lists the members)"
        )
    if not isinstance(process_group, distributed.ProcessGroup):
        raise TypeError(
            f"process_group must be a torch.distributed.ProcessGroup or None, not "
            f"{type(process_group).__name__} (all ranks: torch.distributed.group.WORLD, after "
            "torch.distributed.init_process_group; of a DeviceMesh: mesh.get_group())"
        )
    if not distributed.is_initialized():
        raise ValueError(
            "process_group was given, but torch.distributed is not initialised (any more): "
            "torch.distributed.init_process_group comes first"
        )
    if distributed.get_rank(process_group) < 0:
        raise ValueError("process_group was destroyed, or this process is no member of it")
    return distributed.get_world_size(process_group)


def device_types(process_group: ProcessGroup) -> list[str]:
    """The types of devices on whose tensors the group has collectives."""
    # "cpu:gloo,cuda:nccl"
    backends = str(distributed.get_backend_config(process_group)).split(",")
    return [backend.partition(":")[0] for backend in backends]


def check_device(process_group: ProcessGroup, device: torch.device) -> None:
    """Raises ValueError where the group cannot gather tensors of this device."""
    found = device_types(process_group)
    if device.type not in found:
        raise ValueError(
            f"embeddings are on {device} and process_group has collectives for {', '.join(found)} "
            "only: move the embeddings, or make the group with a backend for them "
            '(backend="cpu:gloo,cuda:nccl")'
        )


def announce_refusal(process_group: ProcessGroup, error: Exception) -> None:
    """The other ranks' call of `agree` then raises too, instead of waiting for this rank."""
    exchange(process_group, -1, f"{type(error).__name__}: {error}"[:REFUSAL_CHARACTERS])


def agree(process_group: ProcessGroup, num_samples: int, call: dict[str, Any]) -> tuple[int, ...]:
    """The number of samples of every rank, if all ranks describe the same call.

    Args:
        call: names and values (those of JSON) that must be the same on all ranks.

    Raises:
        ValueError: on every rank, naming what differs and who passes what.
    """
    counts, descriptions = exchange(process_group, num_samples, call)
    for rank, count in enumerate(counts):
        if count < 0:
            raise ValueError(
                f"rank {rank} of process_group refused its arguments and computes no loss "
                f"({json.loads(descriptions[rank])} …)"
            )
    if len(set(descriptions)) > 1:
        raise ValueError(differences([json.loads(text) for text in descriptions]))
    return counts


def exchange(
    process_group: ProcessGroup, count: int, description: Any
) -> tuple[tuple[int, ...], list[bytes]]:
    """Every rank's count and its description as JSON, with one all-gather."""
    text = json.dumps(description, ensure_ascii=False).encode(errors="replace")
    assert len(text) <= DESCRIPTION_BYTES, f"a description of {len(text)} bytes"
    message = count.to_bytes(8, "little", signed=True) + text.ljust(DESCRIPTION_BYTES)
    # On the CPU where the group can do that: there the sizes are known without waiting for a GPU.
    types = device_types(process_group)
    sent = torch.frombuffer(bytearray(message), dtype=torch.uint8)
    sent = sent.to("cpu" if "cpu" in types else types[0])
    received = sent.new_empty(distributed.get_world_size(process_group), len(message))
    all_gather(received, sent, process_group)
    messages = [row.tobytes() for row in received.cpu().numpy()]
    counts = tuple(int.from_bytes(message[:8], "little", signed=True) for message in messages)
    return counts, [message[8:].rstrip() for message in messages]


def differences(calls: list[dict[str, Any]]) -> str:
    """What the ranks' calls do not have in common, in words."""
    found = []
    for name in dict.fromkeys(name for call in calls for name in call):
        ranks_by_value: dict[str, list[int]] = {}
        for rank, call in enumerate(calls):
            ranks_by_value.setdefault(str(call.get(name)), []).append(rank)
        if len(ranks_by_value) > 1:
            values = "; ".join(
                f"{value} on rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
                for value, ranks in ranks_by_value.items()
            )
            found.append(f"{name} ({values})")
    return (
        f"the ranks of process_group differ in {' and in '.join(found)}: every rank must pass the "
        "same, and only the number of samples may differ"
    )


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


def all_gather(received: Tensor, sent: Tensor, process_group: ProcessGroup) -> None:
    """received [W, ..] <- sent [..] of every rank."""
    # As bytes: backends differ in the dtypes that they know.
    received_bytes = received.view(-1).view(torch.uint8)
    sent_bytes = sent.contiguous().view(-1).view(torch.uint8)
    # torch 2.13 renamed it, and warns of the old name.
    renamed = getattr(distributed, "all_gather_single", None)
    gather = renamed or distributed.all_gather_into_tensor
    gather(received_bytes, sent_bytes, group=process_group)
