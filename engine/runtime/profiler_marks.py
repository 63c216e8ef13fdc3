"""The parts of a training step, by name, and the marks that a profiler sees."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch.profiler import record_function

DATA = "data"
FORWARD = "forward"
CONTRASTIVE_LOSS = "contrastive_loss"
CONTRASTIVE_BACKWARD = "contrastive_backward"
CE_BACKWARD = "ce_backward"
GATE = "gate"
OPTIMIZER = "optimizer"
COMMUNICATION = "communication"
OTHER = "other"
WORDS = {
    DATA: "batch: padding, to the device",
    FORWARD: "forward pass and cross-entropy",
    CONTRASTIVE_LOSS: "contrastive loss",
    CONTRASTIVE_BACKWARD: "backward pass of the contrastive loss alone",
    CE_BACKWARD: "backward pass of cross-entropy, or of both losses at once",
    GATE: "angle check and combination",
    OPTIMIZER: "optimizer (and clipping, without the gate)",
    COMMUNICATION: "gradients and rows to and from other processes",
    OTHER: "other",
}
# Of the names that a profiler sees: parts, and the steps themselves.
PREFIX = "fusedacl."
STEP = "step"

_marks = False


def mark_parts(on: bool) -> None:
    """Whether `part` leaves marks from now on."""
    global _marks
    _marks = on


@contextlib.contextmanager
def part(name: str) -> Iterator[None]:
    """Marks a part of a step, as a block or as a function's decorator, while `mark_parts` is on."""
    if not _marks:
        yield
        return
    with record_function(PREFIX + name):
        yield
