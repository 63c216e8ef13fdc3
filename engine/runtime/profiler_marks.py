"""Names of the parts of a training step, and the ranges by which a profiler sees them."""

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
# Prefix of all names in a profile, and the name of a whole step.
PREFIX = "fusedacl."
STEP = "step"

_marks = False


def mark_parts(on: bool) -> None:
    """Turn the ranges of `part` on or off."""
    global _marks
    _marks = on


@contextlib.contextmanager
def part(name: str) -> Iterator[None]:
    """Mark a part of a step, as a block or a decorator, while `mark_parts` is on."""
    with record_function(PREFIX + name) if _marks else contextlib.nullcontext():
        yield
