"""Logits of a whole split, on one process or on all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..data.batching import EncodedSplit, collate, epoch_batches
from ..model.multi_exit import MultiExitForSequenceClassification
from ..runtime import collectives, processes
from ..runtime.device import autocast

# What to do about a model whose answers are not finite.
BROKEN_MODEL = (
    "its weights are damaged or its training diverged. Take another checkpoint, or train again "
    "with a lower learning_rate."
)


# Not in inference mode: a sharded weight that was gathered there could not be trained afterwards.
@torch.no_grad()
def predict_logits(
    model: MultiExitForSequenceClassification,
    encoded: EncodedSplit,
    batch_size: int,
    *,
    pad_token_id: int,
    dtype: torch.dtype = torch.float32,
    positions: Sequence[int] | None = None,
    progress: bool = False,
    context: Callable[[], AbstractContextManager[Any]] | None = None,
) -> Tensor:
    """Logits of every exit for every text, in the split's order: float32 [E, n, K] on the CPU.

    `positions`: of the exits in `exit_layers` that are wanted; None: all. `context`: where the
    model is called; None: autocast to `dtype`. The model is in evaluation mode during the call, and
    every module is left in the mode it had.
    """
    device = model.device
    num_exits = len(model.exit_layers if positions is None else positions)
    logits = torch.empty(num_exits, len(encoded), model.num_labels)
    trained = [module for module in model.modules() if module.training]
    model.eval()
    try:
        # Similar lengths together: little padding; the longest first: what fails, fails early.
        batches = epoch_batches(
            encoded.lengths, batch_size, seed=0, epoch=0, shuffle=False, group_by_length=True
        )
        for indices in tqdm(
            batches, desc="evaluate", leave=False, disable=None if progress else True
        ):
            batch = collate(encoded, indices, pad_token_id)
            batch.pop("labels", None)
            with autocast(device, dtype) if context is None else context():
                batch = {name: value.to(device) for name, value in batch.items()}
                states = model.exit_states(**batch, positions=positions)
                output = model.classify(states, batch.get("attention_mask"), positions=positions)
            logits[:, torch.from_numpy(indices)] = output.exit_logits.float().cpu()
    finally:
        for module in trained:
            module.training = True
    return logits


def predict_logits_together(
    model: MultiExitForSequenceClassification,
    encoded: EncodedSplit,
    batch_size: int,
    **options: Any,
) -> Tensor:
    """`predict_logits`, the texts shared among the processes of the run; all get all logits."""
    world_size = processes.world_size()
    if world_size == 1:
        return predict_logits(model, encoded, batch_size, **options)
    # As many texts for each process, so that all call the model as often: its weights may be
    # sharded. The first texts fill up the last turn.
    turns = -(-len(encoded) // world_size)
    rows = np.arange(turns * world_size).reshape(turns, world_size) % len(encoded)
    own = predict_logits(model, encoded.take(rows[:, processes.rank()]), batch_size, **options)
    parts = collectives.gathered(own)
    logits = torch.empty(own.shape[0], len(encoded), own.shape[2])
    for rank, part in enumerate(parts):
        logits[:, torch.from_numpy(rows[:, rank])] = part
    return logits


def check_finite(logits: Tensor, exit_layers: Sequence[int]) -> None:
    """Refuse logits [E, n, K] of which no metric and no threshold can be taken.

    Raises:
        FloatingPointError: naming the first exit whose logits are NaN or infinite.
    """
    for layer, exit_logits in zip(exit_layers, logits, strict=True):
        broken = int((~torch.isfinite(exit_logits).all(dim=-1)).sum())
        if broken:
            raise FloatingPointError(
                f"The exit on layer {layer} answers {broken} of {len(exit_logits)} texts with NaN "
                f"or infinite logits: {BROKEN_MODEL}"
            )
