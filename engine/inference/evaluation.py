"""Scores of every exit on a labelled split."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config.commands import EvaluationConfig, InferenceOptions
from ..config.sections import DataOptions
from ..data.batching import EncodedSplit
from ..data.dataset import TextData, load_splits
from ..model.answers import (
    LABEL_THRESHOLD,
    answers_of,
    has_several_labels,
    training_loss,
)
from ..model.multi_exit import MultiExitForSequenceClassification
from ..model.saved import TrainedModel, record_of
from ..runtime.files import check_writable, write_json
from ..runtime.text import did_you_mean
from .logits import check_finite, predict_logits_together

logger = logging.getLogger("fusedacl")


def score(
    metrics: Sequence[str],
    predictions: np.ndarray,
    labels: np.ndarray,
    f1_class: int = 1,
    logits: np.ndarray | None = None,
) -> dict[str, float]:
    """Metrics of predicted classes [n] against true classes [n], as fractions.

    accuracy; f1 (of the class `f1_class`); macro_f1 (mean over the classes that occur);
    matthews_correlation.

    Where a text may have several labels, of predicted labels bool [n, K] against true ones:
    micro_f1 (of all texts and labels together); macro_f1 (mean over the labels that occur among
    the true or the predicted ones); exact_match (share of texts with exactly the true labels);
    average_precision (of the texts in the order of the label's `logits` [n, K], mean over the
    labels that occur among the true ones).
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
    if labels.ndim == 2:
        known = {
            "micro_f1": partial(f1, average="micro"),
            "macro_f1": _macro_f1,
            "exact_match": sklearn_metrics.accuracy_score,
            "average_precision": partial(_average_precision, logits=logits),
        }
    for metric in metrics:
        if metric not in known:
            raise ValueError(f"metric={metric!r} is unknown.{did_you_mean(metric, known)}")
    return {metric: float(known[metric](labels, predictions)) for metric in metrics}


def _macro_f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Mean F1 of the labels that occur; 0 if none does."""
    from sklearn.metrics import f1_score

    occurring = (labels | predictions).any(axis=0)
    each = f1_score(labels, predictions, average=None, zero_division=0.0)[occurring]
    return float(each.mean()) if len(each) else 0.0


def _average_precision(
    labels: np.ndarray, predictions: np.ndarray, logits: np.ndarray | None
) -> float:
    """Mean average precision of the labels that occur; 0 if none does."""
    from sklearn.metrics import average_precision_score

    assert logits is not None  # its callers refuse this metric
    each = [
        average_precision_score(labels[:, label], logits[:, label])
        for label in np.flatnonzero(labels.any(axis=0))
    ]
    return float(np.mean(each)) if each else 0.0


def evaluate_split(
    model: MultiExitForSequenceClassification,
    encoded: EncodedSplit,
    metrics: Sequence[str],
    batch_size: int,
    *,
    positions: Sequence[int] | None = None,
    label_threshold: float = LABEL_THRESHOLD,
    **options: Any,
) -> dict[int, dict[str, float]]:
    """Metrics and mean cross-entropy (`loss`) of each exit, by layer, on a labelled split.

    `positions` and `options` are those of `predict_logits`. `label_threshold`: probability above
    which a label applies, where a text may have several.

    Raises:
        ValueError: the split has no labels, or the model has fewer classes.
        FloatingPointError: an exit's logits are NaN or infinite.
    """
    labels = encoded.labels
    if labels is None:
        raise ValueError("The split has no labels: there is nothing to evaluate against.")
    several = has_several_labels(model.config)
    if several != (labels.dim() == 2) or (several and labels.shape[1] != model.num_labels):
        raise ValueError(
            f"The split has labels of shape {list(labels.shape)}, but the model gives "
            f"{f'any number of {model.num_labels} labels' if several else 'one class'} per text. "
            "Evaluate on labels as in training."
        )
    if not several and int(labels.max()) >= model.num_labels:
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
    return layer_scores(model, layers, logits, labels, metrics, label_threshold)


def layer_scores(
    model: MultiExitForSequenceClassification,
    layers: Sequence[int],
    logits: torch.Tensor,
    labels: torch.Tensor,
    metrics: Sequence[str],
    label_threshold: float = LABEL_THRESHOLD,
) -> dict[int, dict[str, float]]:
    """Metrics and mean cross-entropy (`loss`) by layer, from the exits' logits [E, n, K]."""
    results = {}
    several, f1_index = has_several_labels(model.config), record_of(model).f1_index
    for layer, exit_logits in zip(layers, logits, strict=True):
        predictions = answers_of(exit_logits, several, label_threshold).numpy()
        scores = score(metrics, predictions, labels.numpy(), f1_index, exit_logits.numpy())
        loss = training_loss(exit_logits[None], labels, several)
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
    if trained.record.is_complete:
        # The task names the class of f1 where the training data named none.
        trained.record = replace(trained.record, f1_class=found.record.f1_class)
        trained.model.config.data_record = trained.record.to_dict()
    for note in found.notes:
        logger.info(note)
    if not found.evaluation_splits:
        raise ValueError(
            f"{found.name} has no labelled split to {purpose} on: name one, such as with "
            "validation_file."
        )
    return trained, found


def evaluate(config: EvaluationConfig) -> dict[str, dict[int, dict[str, float]]]:
    """Metrics of a trained model on a labelled data set: split -> layer -> name -> value.

    Raises:
        ValueError: a mistake in the configuration, the data or the model directory.
        FloatingPointError: as `evaluate_split`; nothing is written.
    """
    output_file = None if config.output.output_file is None else Path(config.output.output_file)
    if output_file is not None:
        if not output_file.parent.is_dir():
            raise ValueError(
                f"output_file: the directory {str(output_file.parent)!r} does not exist."
            )
        if output_file.is_dir():
            raise ValueError(f"output_file={str(output_file)!r} is a directory: name a file.")
        check_writable(output_file, "output_file")
    trained, data = load_labelled(config.model, config.data, "evaluate")
    threshold = trained.label_threshold(config.output.label_threshold)
    results = {
        name: evaluate_split(
            trained.model,
            trained.encode(data.splits[name], name),
            data.metrics,
            config.model.per_device_eval_batch_size,
            label_threshold=threshold,
            pad_token_id=trained.tokenizer.pad_token_id,
            dtype=trained.dtype,
            progress=not config.model.disable_tqdm,
        )
        for name in data.evaluation_splits
    }
    if output_file is not None:
        write_json(output_file.resolve(), results)
    return results
