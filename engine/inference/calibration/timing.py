"""Measured times of early exit beside the full model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ...data.batching import EncodedSplit, evaluation_batches
from ...model.early_exit import EarlyExit
from ...model.exit_policies import FixedLayer, Policy
from ...runtime.device import autocast

if TYPE_CHECKING:
    from ...model.multi_exit import MultiExitForSequenceClassification


MEASURED_BATCH_SIZES = (1, 32)


@dataclass(frozen=True)
class MeasuredSpeed:
    """Wall-clock times of a policy and of the full model on the same texts.

    early_ms, full_ms: milliseconds per text, medians over `repeats` passes; speedup: median of
    full / early over the passes. In a pass, all that is timed takes turns batch by batch.
    """

    batch_size: int
    num_texts: int
    repeats: int
    early_ms: float
    full_ms: float
    speedup: float


def spread_texts(encoded: EncodedSplit, max_texts: int) -> EncodedSplit:
    """At most so many texts of a split, evenly spaced."""
    places = np.linspace(0, len(encoded) - 1, min(max_texts, len(encoded)))
    return encoded.take(np.unique(places.astype(int)))


@torch.inference_mode()
def measure_speed(
    model: MultiExitForSequenceClassification,
    encoded: EncodedSplit,
    policies: Sequence[Policy],
    batch_size: int,
    *,
    pad_token_id: int,
    dtype: torch.dtype = torch.float32,
    max_texts: int = 200,
    repeats: int = 3,
    progress: bool = False,
) -> list[MeasuredSpeed]:
    """Time policies and the full model (the layers up to the last exit, and that exit) in turns.

    At most `max_texts` texts are used, evenly spaced in the split; their batches are on the model's
    device before the clock starts. The model is left in evaluation mode.
    """
    texts = spread_texts(encoded, max_texts)
    batches = evaluation_batches(texts, batch_size, pad_token_id, device=model.device)
    inputs = [batch for _, batch in batches]
    engines = [EarlyExit(model, policy, dtype=dtype) for policy in policies]
    runs: list[Callable[..., Any]] = [_full_model(model, dtype), *engines]
    for run in runs:
        run(**inputs[0])
    seconds = np.zeros((repeats, len(runs)))
    names = ", ".join(dict.fromkeys(policy.name for policy in policies))
    rounds = tqdm(
        total=repeats * len(inputs),
        desc=f"time {names}, batch {batch_size}",
        leave=False,
        disable=None if progress else True,
    )
    with rounds:
        for repeat in range(repeats):
            for number, batch in enumerate(inputs, start=repeat):
                # The order rotates, so that none always runs with the warmest cache.
                for turn in range(number, number + len(runs)):
                    run = runs[turn % len(runs)]
                    start = time.perf_counter()
                    run(**batch)
                    seconds[repeat, turn % len(runs)] += time.perf_counter() - start
                rounds.update()
    milliseconds = 1000 * np.median(seconds, axis=0) / len(texts)
    speedups = np.median(seconds[:, :1] / seconds, axis=0)
    return [
        MeasuredSpeed(
            batch_size=batch_size,
            num_texts=len(texts),
            repeats=repeats,
            early_ms=float(milliseconds[place]),
            full_ms=float(milliseconds[0]),
            speedup=float(speedups[place]),
        )
        for place in range(1, len(runs))
    ]


def _full_model(
    model: MultiExitForSequenceClassification, dtype: torch.dtype
) -> Callable[..., Any]:
    """The call that answers a batch with the last exit, without the other exits."""
    last = model.exit_layers[-1]
    if last < model.config.backbone_config.num_hidden_layers:
        # A plain forward pass would run the layers above the last exit as well.
        return EarlyExit(model, FixedLayer(last), dtype=dtype)

    def full(**batch: Tensor) -> None:
        with autocast(model.device, dtype):
            states = model.exit_states(**batch, positions=[-1])
            logits = model.classify(states, batch["attention_mask"], positions=[-1]).logits
        torch.softmax(logits.float(), dim=-1).cpu()

    return full
