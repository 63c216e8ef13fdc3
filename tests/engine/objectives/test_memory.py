"""The memory: its order and length, what exists of it, and the losses that read it."""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import Any

import pytest
import torch
from fusedacl.engine import MemoryBank
from fusedacl.engine.config.sections import ObjectiveOptions
from fusedacl.engine.model.multi_exit import MultiExitOutput
from fusedacl.engine.objectives.large_batches import Chunk, cached_losses
from fusedacl.kernels import acl_loss, supcon_loss
from torch import Tensor

WIDTH, NUM_LABELS = 5, 3


def samples(number: int) -> tuple[Tensor, Tensor]:
    return torch.randn(number, WIDTH), torch.randint(NUM_LABELS, (number,))


@pytest.mark.parametrize("sizes", [[3, 0, 4], [2, 2, 2, 2, 2], [11], [9, 1]])
def test_keeps_the_last_in_order(sizes: list[int]) -> None:
    memory, kept = MemoryBank(8, WIDTH), deque([(torch.zeros(WIDTH), -100)] * 8, maxlen=8)
    for size in sizes:
        rows, labels = samples(size)
        memory.add(rows.requires_grad_(), labels)
        kept.extend(zip(rows.detach(), labels.tolist(), strict=True))
    assert torch.equal(memory.embeddings, torch.stack([row for row, _ in kept]))
    assert memory.labels.tolist() == [label for _, label in kept]
    assert not memory.embeddings.requires_grad


def test_rows_that_are_not_filled_do_not_exist() -> None:
    (x, y), (earlier, labels) = samples(6), samples(4)
    memory = MemoryBank(64, WIDTH)
    memory.add(earlier, labels)
    loss = supcon_loss(x, y, memory_embeddings=memory.embeddings, memory_labels=memory.labels)
    expected = supcon_loss(x, y, memory_embeddings=earlier, memory_labels=labels)
    torch.testing.assert_close(loss, expected)
    assert not torch.allclose(loss, supcon_loss(x, y))


def test_a_loss_keeps_the_rows_that_it_has_read() -> None:
    (x, y), first, second = samples(6), samples(4), samples(4)
    memory = MemoryBank(4, WIDTH)
    memory.add(*first)
    found = []
    for adds in (False, True):
        leaf = x.clone().requires_grad_()
        loss = supcon_loss(
            leaf, y, memory_embeddings=memory.embeddings, memory_labels=memory.labels
        )
        if adds:
            memory.add(*second)
        loss.backward()
        found.append(leaf.grad)
    assert torch.equal(*found)


def test_the_state_is_all_of_it() -> None:
    memory, other = MemoryBank(8, WIDTH), MemoryBank(8, WIDTH)
    memory.add(*samples(5))
    other.load_state_dict(memory.state_dict())
    rows = samples(6)
    for bank in (memory, other):
        bank.add(*rows)
    assert torch.equal(memory.embeddings, other.embeddings)
    assert torch.equal(memory.labels, other.labels)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MemoryBank(0, 4), "size=0 must be an integer of at least 1"),
        (lambda: MemoryBank(4, 0), "width=0 must be an integer of at least 1"),
        (lambda: MemoryBank(4, 4, dtype=torch.int64), "must be a floating-point type"),
        (lambda: MemoryBank(4, 4).add(*samples(3)), r"\(3, 5\): this memory takes \[N, 4\]"),
        (
            lambda: MemoryBank(4, 5).add(torch.zeros(2, 3, 5), torch.zeros(3)),
            r"\(2, 3, 5\): .* \(with several exits, pass those of one\)",
        ),
        (
            lambda: MemoryBank(4, 5).add(torch.zeros(3, 5), torch.zeros(3)),
            r"labels has shape \(3,\) and dtype torch.float32: .* \[3\]",
        ),
        (
            lambda: MemoryBank(4, 5).add(torch.zeros(3, 5), torch.zeros(2, dtype=torch.int64)),
            r"labels has shape \(2,\)",
        ),
        (
            lambda: MemoryBank(4, 5, device="meta").add(*samples(3)),
            r"embeddings is on cpu and the memory on meta: move the memory with .to\('cpu'\)",
        ),
    ],
)
def test_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("objective", ["scl", "acl"])
@pytest.mark.parametrize("sizes", [[4], [3, 2]], ids=["one pass", "chunks"])
def test_losses_are_those_called_with_the_last_samples(objective: str, sizes: list[int]) -> None:
    """Contrastive batches of one or two chunks; a stand-in text enters nothing."""
    options = ObjectiveOptions(objective=objective, temperature=0.3, denominator="others")
    memory, weights = MemoryBank(10, WIDTH), torch.randn(1, NUM_LABELS, WIDTH)
    seen: list[tuple[Tensor, Tensor]] = []
    for step in range(4):
        chunks = []
        for size in sizes:
            rows, labels = samples(size)
            output = MultiExitOutput(
                exit_logits=torch.randn(1, size, NUM_LABELS, requires_grad=True),
                exit_embeddings=rows[None].requires_grad_(),
            )
            chunks.append(Chunk(output, labels, None))
        forwards = [partial(lambda chunk: chunk, chunk) for chunk in chunks]
        losses = cached_losses(
            forwards, lambda: weights, options, shares=[1.0] * len(sizes), weight=1.0,
            loss_scale=1.0, device=torch.device("cpu"), memory=memory, reads_memory=step != 1,
        )  # fmt: skip
        auxiliary = [found.auxiliary for found in losses]
        x, y = (
            torch.cat([chunk.output.exit_embeddings[0].detach() for chunk in chunks]),
            torch.cat([chunk.labels for chunk in chunks]),
        )
        rows: dict[str, Tensor] = {}
        if seen and step != 1:
            rows["memory_embeddings"] = torch.cat([before for before, _ in seen])[-10:]
            rows["memory_labels"] = torch.cat([before for _, before in seen])[-10:]
        settings = {"temperature": 0.3, "denominator": "others", **rows}
        expected = (
            supcon_loss(x, y, **settings)
            if objective == "scl"
            else acl_loss(x, y, weights[0], **settings)
        )
        torch.testing.assert_close(sum(auxiliary), expected[None])
        seen.append((x, y))
    stand_in = Chunk(output, torch.full_like(labels, -100), None, is_stand_in=True)
    before = memory.embeddings
    list(
        cached_losses(
            [lambda: stand_in], lambda: weights, options, shares=[0.0], weight=0.0,
            loss_scale=1.0, device=torch.device("cpu"), memory=memory,
        )
    )  # fmt: skip
    assert memory.embeddings is before
