"""Scores of every exit on a labelled split."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config.commands import EvaluationConfig, InferenceOptions
from ..config.sections import DataOptions
from ..data.batching import EncodedSplit
from ..data.dataset import TextData, load_splits
from ..model.multi_exit import MultiExitForSequenceClassification
from ..model.saved import TrainedModel, record_of
from ..runtime.files import write_json
from ..runtime.text import did_you_mean
from .logits import check_finite, predict_logits_together

logger = logging.getLogger("fusedacl")


def score(
    metrics: Sequence[str], predictions: np.ndarray, labels: np.ndarray, f1_class: int = 1
) -> dict[str, float]:
    """Metrics of predicted classes [n] against true classes [n], as fractions.

    accuracy; f1 (of the class `f1_class`); macro_f1 (mean over the classes that occur);
    matthews_correlation.
    """
    from sklearn import metrics as sklearn_metrics

    f1 = partial(sklearn_metrics.f1_score, zero_division=0.0)
    known: dict[str, Callable[..., float]] = {
        "accuracy": sklearn_metrics.accuracy_score,
        # Not pos_label: it is for two classes only.
        "f1": partial(f1, labels=[f1_class], average="macro"),
        "macro_f1": partial(f1, average="macro"),
        "matthews_correlation": sklearn_metrics.matthews_corrcoef,
    }
    for metric in metrics:
        if metric not in known:
            raise ValueError(f"metric={metric!r} is unknown.{did_you_mean(metric, known)}")
    return {metric: float(known[metric](labels, predictions)) for metric in metrics}


def evaluate_split(
    model: MultiExitForSequenceClassification,
    encoded: EncodedSplit,
    metrics: Sequence[str],
    batch_size: int,
    *,
    positions: Sequence[int] | None = None,
    **options: Any,
) -> dict[int, dict[str, float]]:
    """Metrics and mean cross-entropy (`loss`) of each exit, by layer, on a labelled split.

    `positions` and `options` are those of `predict_logits`.

    Raises:
        ValueError: the split has no labels, or the model has fewer classes.
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
    # The argmax of NaN is a class, which would be scored as an answer.
    check_finite(logits, layers)
    return layer_scores(model, layers, logits, labels, metrics)


def layer_scores(
    model: MultiExitForSequenceClassification,
    layers: Sequence[int],
    logits: torch.Tensor,
    labels: torch.Tensor,
    metrics: Sequence[str],
) -> dict[int, dict[str, float]]:
    """Metrics and mean cross-entropy (`loss`) by layer, from the exits' logits [E, n, K]."""
    results = {}
    for layer, exit_logits in zip(layers, logits, strict=True):
        predictions = exit_logits.argmax(dim=-1).numpy()
        scores = score(metrics, predictions, labels.numpy(), record_of(model).f1_index)
        loss = torch.nn.functional.cross_entropy(exit_logits, labels)
        results[layer] = {**scores, "loss": float(loss)}
    return results


def load_labelled(
    model: InferenceOptions, data: DataOptions, purpose: str
) -> tuple[TrainedModel, TextData]:
    """A trained model, and data with its classes and at least one labelled evaluation split.

    `purpose`: verb for the message about missing labels.

    Raises:
        ValueError: a mistake in the options, the data or the model directory.
    """
    trained = TrainedModel(model, data.max_seq_length)
    found = load_splits(data, needs_train=False, model=trained.record)
    for note in found.notes:
        logger.info(note)
    if not found.evaluation_splits:
        raise ValueError(f"{found.name} has no labelled split to {purpose} on.")
    return trained, found


def evaluate(config: EvaluationConfig) -> dict[str, dict[int, dict[str, float]]]:
    """Metrics of a trained model on a labelled data set: split -> layer -> name -> value.

    Raises:
        ValueError: a mistake in the configuration, the data or the model directory.
        FloatingPointError: as `evaluate_split`; nothing is written.
    """
    output_file = None if config.output.output_file is None else Path(config.output.output_file)
    if output_file is not None and not output_file.parent.is_dir():
        raise ValueError(f"output_file: the directory {str(output_file.parent)!r} does not exist.")
    trained, data = load_labelled(config.model, config.data, "evaluate")
    results = {
        name: evaluate_split(
            trained.model,
            trained.encode(data.splits[name], name),
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
