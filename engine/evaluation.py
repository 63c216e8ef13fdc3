"""Scores of every exit on a labelled split."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from . import collectives, distributed
from .batching import EncodedSplit, collate, encode, epoch_batches
from .checkpoint import write_json
from .config import EvaluationConfig
from .data import load_splits
from .loading import TrainedModel
from .modeling import MultiExitForSequenceClassification
from .precision import autocast

logger = logging.getLogger("fusedacl")
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
    world_size = distributed.world_size()
    if world_size == 1:
        return predict_logits(model, encoded, batch_size, **options)
    # As many texts for each process, so that all call the model as often: its weights may be
    # sharded. The first texts fill up the last turn.
    turns = -(-len(encoded) // world_size)
    rows = np.arange(turns * world_size).reshape(turns, world_size) % len(encoded)
    own = predict_logits(model, encoded.take(rows[:, distributed.rank()]), batch_size, **options)
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


def score(metrics: Sequence[str], predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The named metrics of predicted classes [n] against true ones [n], as fractions.

    accuracy; f1 (of class 1, as GLUE has it); macro_f1 (mean over the classes that occur);
    matthews_correlation.
    """
    from sklearn import metrics as sklearn_metrics

    scores: dict[str, float] = {}
    for metric in metrics:
        if metric == "accuracy":
            scores[metric] = sklearn_metrics.accuracy_score(labels, predictions)
        elif metric == "f1":
            scores[metric] = sklearn_metrics.f1_score(labels, predictions, zero_division=0.0)
        elif metric == "macro_f1":
            scores[metric] = sklearn_metrics.f1_score(
                labels, predictions, average="macro", zero_division=0.0
            )
        elif metric == "matthews_correlation":
            scores[metric] = sklearn_metrics.matthews_corrcoef(labels, predictions)
        else:
            raise ValueError(f"metric={metric!r} is not one that score knows.")
    return {metric: float(value) for metric, value in scores.items()}


def evaluate_split(
    model: MultiExitForSequenceClassification,
    encoded: EncodedSplit,
    metrics: Sequence[str],
    batch_size: int,
    *,
    positions: Sequence[int] | None = None,
    **options: Any,
) -> dict[int, dict[str, float]]:
    """Layer of each exit -> its metrics and mean cross-entropy `loss` on a labelled split.

    `positions` and `options` are those of `predict_logits`.

    Raises:
        ValueError: the model has other classes than the labels need.
        FloatingPointError: an exit's logits are NaN or infinite.
    """
    labels = encoded.labels
    if labels is None:
        raise ValueError("The split has no labels: there is nothing to evaluate against.")
    if int(labels.max()) >= model.num_labels:
        raise ValueError(
            f"The split has label {int(labels.max())}, but the model was trained with "
            f"{model.num_labels} classes: 0 to {model.num_labels - 1}."
        )
    logits = predict_logits_together(model, encoded, batch_size, positions=positions, **options)
    layers = model.exit_layers
    if positions is not None:
        layers = [model.exit_layers[position] for position in positions]
    # The argmax of NaN is a class: it would be scored as an answer.
    check_finite(logits, layers)
    results = {}
    for layer, exit_logits in zip(layers, logits, strict=True):
        scores = score(metrics, exit_logits.argmax(dim=-1).numpy(), labels.numpy())
        loss = torch.nn.functional.cross_entropy(exit_logits, labels)
        results[layer] = {**scores, "loss": float(loss)}
    return results


def evaluate(config: EvaluationConfig) -> dict[str, dict[int, dict[str, float]]]:
    """Evaluation split -> layer -> metrics of a trained model on a labelled data set.

    Raises:
        ValueError: a mistake in the configuration, the data or the model directory.
        FloatingPointError: as `evaluate_split`; nothing is written.
    """
    output_file = None if config.output.output_file is None else Path(config.output.output_file)
    if output_file is not None and not output_file.parent.is_dir():
        raise ValueError(f"output_file: the directory {str(output_file.parent)!r} does not exist.")
    trained = TrainedModel(config.model, config.data.max_seq_length)
    data = load_splits(
        task_name=config.data.task_name,
        data_dir=config.data.data_dir,
        dataset_name=config.data.dataset_name,
        dataset_config_name=config.data.dataset_config_name,
        validation_file=config.data.validation_file,
        max_eval_samples=config.data.max_eval_samples,
        needs_train=False,
        label_names=trained.label_names,
    )
    for note in data.notes:
        logger.info(note)
    if not data.evaluation_splits:
        raise ValueError(f"{data.name} has no labelled split to evaluate on.")
    results = {
        name: evaluate_split(
            trained.model,
            encode(
                data.splits[name], trained.tokenizer, trained.max_length, model_limit=trained.limit
            ),
            data.metrics,
            config.model.per_device_eval_batch_size,
            pad_token_id=trained.tokenizer.pad_token_id,
            dtype=trained.dtype,
            progress=not config.model.disable_tqdm,
        )
        for name in data.evaluation_splits
    }
    if output_file is not None:
        write_json(output_file, results)
    return results
