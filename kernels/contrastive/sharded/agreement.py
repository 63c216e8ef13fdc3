"""Agreement of all ranks of a process group on one batch, before any rank computes."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, distributed

DESCRIPTION_BYTES = 512
# Length of an error text; a character takes up to six bytes.
REFUSAL_CHARACTERS = 80

ProcessGroup = Any


def check_process_group(process_group: ProcessGroup) -> int:
    """Return the number of ranks; raise if it is no group, or this process is no member of it."""
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
    """Return the types of devices whose tensors the group can gather."""
    # "cpu:gloo,cuda:nccl"
    backends = str(distributed.get_backend_config(process_group)).split(",")
    return [backend.partition(":")[0] for backend in backends]


def check_device(process_group: ProcessGroup, device: torch.device) -> None:
    """Raise ValueError if the group cannot gather tensors of this device."""
    found = device_types(process_group)
    if device.type not in found:
        raise ValueError(
            f"embeddings are on {device} and process_group has collectives for {', '.join(found)} "
            "only: move the embeddings, or make the group with a backend for them "
            '(backend="cpu:gloo,cuda:nccl")'
        )


def announce_refusal(process_group: ProcessGroup, error: Exception) -> None:
    """Make the other ranks' call of `agree` raise too, instead of waiting for this rank."""
    exchange(process_group, -1, f"{type(error).__name__}: {error}"[:REFUSAL_CHARACTERS])


def agree(process_group: ProcessGroup, num_samples: int, call: dict[str, Any]) -> tuple[int, ...]:
    """Return the number of samples of every rank if all ranks describe the same call.

    Raises:
        ValueError: on every rank; the message names what differs and the value of each rank.
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
    """Return every rank's count and description as JSON, with one all-gather."""
    text = json.dumps(description, ensure_ascii=False).encode(errors="replace")
    assert len(text) <= DESCRIPTION_BYTES, f"a description of {len(text)} bytes"
    message = count.to_bytes(8, "little", signed=True) + text.ljust(DESCRIPTION_BYTES)
    # On the CPU where the group supports it: there the sizes are known without waiting for a GPU.
    types = device_types(process_group)
    sent = torch.frombuffer(bytearray(message), dtype=torch.uint8)
    sent = sent.to("cpu" if "cpu" in types else types[0])
    received = sent.new_empty(distributed.get_world_size(process_group), len(message))
    all_gather(received, sent, process_group)
    messages = [row.tobytes() for row in received.cpu().numpy()]
    counts = tuple(int.from_bytes(message[:8], "little", signed=True) for message in messages)
    return counts, [message[8:].rstrip() for message in messages]


def differences(calls: list[dict[str, Any]]) -> str:
    """Describe the differences between the ranks' calls."""
    found = []
    for name in dict.fromkeys(name for call in calls for name in call):
        values = [str(call.get(name)) for call in calls]
        parts = []
        for value in dict.fromkeys(values):
            ranks = [str(rank) for rank, other in enumerate(values) if other == value]
            parts.append(f"{value} on rank{'s' * (len(ranks) > 1)} {', '.join(ranks)}")
        if len(parts) > 1:
            found.append(f"{name} ({'; '.join(parts)})")
    return (
        f"the ranks of process_group differ in {' and in '.join(found)}: every rank must pass the "
        "same, and only the number of samples may differ"
    )


def all_gather(received: Tensor, sent: Tensor, process_group: ProcessGroup) -> None:
    """Gather `sent` [..] of every rank into `received` [W, ..]."""
    # As bytes: backends support different dtypes.
    received_bytes = received.view(-1).view(torch.uint8)
    sent_bytes = sent.contiguous().view(-1).view(torch.uint8)
    # torch 2.13 renamed it, and warns about the old name.
    renamed = getattr(distributed, "all_gather_single", None)
    gather = renamed or distributed.all_gather_into_tensor
    gather(received_bytes, sent_bytes, group=process_group)
