"""Logits of a whole split, on one process or on all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.batching import EncodedSplit, evaluation_batches
from ..model.multi_exit import MultiExitForSequenceClassification, MultiExitOutput
from ..runtime import collectives, processes
from ..runtime.device import autocast, evaluating

# Remedy for a model whose logits are not finite.
BROKEN_MODEL = (
    "its weights are damaged or its training diverged. Take another checkpoint, or train again "
    "with a lower learning_rate."
)


# Not in inference mode: a sharded weight that was gathered there could not be trained afterwards.
@torch.no_grad()
def exit_outputs(
    model: MultiExitForSequenceClassification,
    encoded: EncodedSplit,
    batch_size: int,
    *,
    pad_token_id: int,
    dtype: torch.dtype = torch.float32,
    positions: Sequence[int] | None = None,
    progress: str | None = None,
    context: Callable[[], AbstractContextManager[Any]] | None = None,
) -> Iterator[tuple[Tensor, MultiExitOutput]]:
    """Row indices [B] on the CPU and what every exit gives for them, batch by batch.

    `positions`: exits to run, by their positions in `exit_layers`; None: all. `progress`: title of
    a progress bar, or None. `context`: context manager around each call of the model; None:
    autocast to `dtype`. The model is in evaluation mode until the last batch; every module is left
    in the mode it had.
    """
    batches = evaluation_batches(
        encoded, batch_size, pad_token_id, device=model.device, progress=progress
    )
    with evaluating(model):
        for indices, batch in batches:
            with autocast(model.device, dtype) if context is None else context():
                states = model.exit_states(**batch, positions=positions)
                output = model.classify(states, batch["attention_mask"], positions=positions)
            yield torch.from_numpy(indices), output


def predict_logits(
    model: MultiExitForSequenceClassification,
    encoded: EncodedSplit,
    batch_size: int,
    *,
    positions: Sequence[int] | None = None,
    progress: bool = False,
    **options: Any,
) -> Tensor:
    """Logits of every exit for every text, in the split's order: float32 [E, n, K] on the CPU.

    `positions` and `options` are those of `exit_outputs`.
    """
    num_exits = len(model.exit_layers if positions is None else positions)
    logits = torch.empty(num_exits, len(encoded), model.num_labels)
    title = "evaluate" if progress else None
    for rows, output in exit_outputs(
        model, encoded, batch_size, positions=positions, progress=title, **options
    ):
        logits[:, rows] = output.exit_logits.float().cpu()
    return logits


def predict_logits_together(
    model: MultiExitForSequenceClassification,
    encoded: EncodedSplit,
    batch_size: int,
    **options: Any,
) -> Tensor:
    """`predict_logits` with the texts divided among the processes; each gets all logits."""
    world_size = processes.world_size()
    if world_size == 1:
        return predict_logits(model, encoded, batch_size, **options)
    # Processes call the model equally often, because its weights may be sharded: each gets the same
    # number of texts, the first texts filling up the last turn.
    turns = -(-len(encoded) // world_size)
    rows = np.arange(turns * world_size).reshape(turns, world_size) % len(encoded)
    own = predict_logits(model, encoded.take(rows[:, processes.rank()]), batch_size, **options)
    parts = collectives.gathered(own)
    logits = torch.empty(own.shape[0], len(encoded), own.shape[2])
    for rank, part in enumerate(parts):
        logits[:, torch.from_numpy(rows[:, rank])] = part
    return logits


def check_finite(logits: Tensor, exit_layers: Sequence[int]) -> None:
    """Raise an error if any of the logits [E, n, K] is NaN or infinite.

    Raises:
        FloatingPointError: names the first exit with such logits.
    """
    for layer, exit_logits in zip(exit_layers, logits, strict=True):
        broken = int((~torch.isfinite(exit_logits).all(dim=-1)).sum())
        if broken:
            raise FloatingPointError(
                f"The exit on layer {layer} has NaN or infinite logits for {broken} of "
                f"{len(exit_logits)} texts: {BROKEN_MODEL}"
            )
