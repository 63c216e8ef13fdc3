"""Labels and probabilities for a file of texts."""

from __future__ import annotations

import csv
import json
import logging
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..config.commands import PredictionConfig
from ..data.batching import EncodedSplit
from ..data.dataset import read_unlabelled
from ..model.answers import (
    LABEL_THRESHOLD,
    answers_of,
    has_several_labels,
    probabilities_of,
)
from ..model.early_exit import EarlyExit
from ..model.exit_policies import parse_policy
from ..model.multi_exit import MultiExitForSequenceClassification, label_names
from ..model.saved import TrainedModel
from ..runtime import collectives, processes
from ..runtime.files import check_writable, replacing
from .evaluation import layer_scores
from .logits import BROKEN_MODEL, check_finite, predict_logits, predict_logits_together

logger = logging.getLogger("fusedacl")
OUTPUT_EXTENSIONS = (".csv", ".jsonl")
# Between the labels of a text in csv.
JOINT = "|"
# The last four are the wide forms that spreadsheets in East Asia take for =, +, - and @.
_FORMULA_STARTS = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")
_NUMBER = r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?"


def predict(config: PredictionConfig) -> Path:
    """Write a row for each text, in the order of the input; returns the file.

    Columns: `label` (`labels`, where a text may have several); `probability_<class>` for each
    class; with early exit `exit_layer`, the layer where the text left.

    Raises:
        ValueError: a mistake in the configuration, the texts or the model directory.
        FloatingPointError: a probability is NaN; nothing is written.
    """
    options = config.prediction
    if options.input_file is None or options.output_file is None:
        missing = "input_file" if options.input_file is None else "output_file"
        raise ValueError(f"{missing} is missing: predict reads input_file, writes output_file.")
    output_file = Path(options.output_file)
    if output_file.suffix not in OUTPUT_EXTENSIONS:
        raise ValueError(
            f"output_file={str(output_file)!r} must end in one of {', '.join(OUTPUT_EXTENSIONS)}."
        )
    if not output_file.parent.is_dir():
        raise ValueError(f"output_file: the directory {str(output_file.parent)!r} does not exist.")
    if output_file.is_dir():
        raise ValueError(f"output_file={str(output_file)!r} is a directory: name a file.")
    if output_file.resolve() == Path(options.input_file).resolve():
        raise ValueError(f"output_file={str(output_file)!r} is the input_file: name another file.")
    check_writable(output_file, "output_file")
    trained = TrainedModel(config.model, options.max_seq_length)
    threshold = trained.label_threshold(options.label_threshold)
    if options.label_threshold is not None and options.policy is not None:
        raise ValueError(
            f"label_threshold={threshold:g} beside policy={options.policy!r}: a policy applies the "
            f"labels above a probability of {LABEL_THRESHOLD}. Leave one of them out."
        )
    several = has_several_labels(trained.model.config)
    if several and output_file.suffix == ".csv":
        _check_joinable(trained.label_names)
    texts = read_unlabelled(
        options.input_file, (options.text_column, options.text_pair_column), trained.record
    )
    engine = None
    if options.policy is not None:
        stored = options.policy == "stored"
        policy = None if stored else parse_policy(options.policy)
        engine = EarlyExit(trained.model, policy, dtype=trained.dtype)
        if stored:
            mismatch = trained.calibration_mismatch()
            if mismatch is not None:
                logger.warning(mismatch)
    elif options.repack:
        raise ValueError("repack belongs to early exit: name a policy, or leave it out.")
    encoded = trained.encode(texts, Path(options.input_file).name)
    inference: dict[str, Any] = {
        "pad_token_id": trained.tokenizer.pad_token_id,
        "progress": not config.model.disable_tqdm,
    }
    batch_size = config.model.per_device_eval_batch_size
    exit_layers = None
    if engine is None:
        logits = predict_logits(
            trained.model, encoded, batch_size, dtype=trained.dtype, **inference
        )
        probabilities = probabilities_of(logits[-1], several)  # [n, K]
        answers = answers_of(logits[-1], several, threshold)
    else:
        left = engine.predict(encoded, batch_size, repack=options.repack, **inference)
        logger.info(
            f"early exit, {engine.policy}: {left.mean_layer:.2f} of "
            f"{trained.model.exit_layers[-1]} layers per text, {left.flops_share:.0%} of the FLOPs"
        )
        probabilities, exit_layers = left.probabilities, left.exit_layers.tolist()
        answers = left.predictions
    write_answers(output_file, trained.label_names, answers, probabilities, exit_layers)
    return output_file


def write_answers(
    path: Path,
    label_names: list[str],
    answers: torch.Tensor,
    probabilities: torch.Tensor,
    exit_layers: list[int] | None = None,
) -> None:
    """Write a row for each of n texts: the label and the probabilities [n, K].

    answers: as `answers_of` gives them. exit_layers: where each text left, if early exit answered.

    Raises:
        FloatingPointError: a probability is NaN; nothing is written.
    """
    _check_finite(probabilities)
    labels: list[Any]
    if answers.dim() == 1:
        labels = [label_names[index] for index in answers.tolist()]
    else:
        labels = [
            [name for name, applies in zip(label_names, row, strict=True) if applies]
            for row in answers.tolist()
        ]
    _write(path, label_names, labels, probabilities.tolist(), exit_layers)


def answer_splits(
    directory: Path,
    model: MultiExitForSequenceClassification,
    splits: Mapping[str, EncodedSplit],
    metrics: Sequence[str],
    batch_size: int,
    **options: Any,
) -> dict[str, dict[str, Any]]:
    """Write the last exit's answers to `<split>_predictions.csv`, for each split. Collective.

    Where a text may have several labels, the file ends in .jsonl and holds lists.

    Returns: split -> "file", and "metrics": layer -> metrics of a labelled split, else None.

    `options` are those of `predict_logits`.
    """
    results: dict[str, dict[str, Any]] = {}
    for name, encoded in splits.items():
        logits = predict_logits_together(model, encoded, batch_size, **options)
        # On every process, so that none waits for one that has failed.
        check_finite(logits, model.exit_layers)
        several = has_several_labels(model.config)
        file = directory / f"{name}_predictions{'.jsonl' if several else '.csv'}"
        answers, probabilities = (
            answers_of(logits[-1], several),
            probabilities_of(logits[-1], several),
        )
        write = partial(write_answers, file, label_names(model.config), answers, probabilities)
        collectives.together(write if processes.rank() == 0 else lambda: None)
        scores = None
        if encoded.labels is not None:
            scores = layer_scores(model, model.exit_layers, logits, encoded.labels, metrics)
        results[name] = {"file": file.name, "metrics": scores}
    return results


def _check_finite(probabilities: torch.Tensor) -> None:
    """Raise an error if any of the probabilities [n, K] is NaN."""
    broken = (~torch.isfinite(probabilities).all(dim=-1)).nonzero().flatten()
    if len(broken):
        raise FloatingPointError(
            f"The model's answers to {len(broken)} of {len(probabilities)} texts (the first in row "
            f"{int(broken[0]) + 1}) are NaN: {BROKEN_MODEL}"
        )


def _check_joinable(label_names: Sequence[str]) -> None:
    """Refuse label names that could not be told apart once they are joined."""
    name = next((name for name in label_names if JOINT in name), None)
    if name is not None:
        raise ValueError(
            f"output_file: in csv several labels are joined by {JOINT!r}, which the label {name!r} "
            "holds itself. Name a .jsonl file."
        )


def _is_formula(label: str) -> bool:
    """True if a spreadsheet runs a cell of this content; a signed number is none."""
    return label[:1] in _FORMULA_STARTS and not re.fullmatch(_NUMBER, label)


def _cell(label: str | list[str], guarded: Mapping[str, str]) -> str:
    if isinstance(label, str):
        return guarded.get(label, label)
    # The first one decides whether a spreadsheet runs the cell.
    return JOINT.join(guarded.get(name, name) if not i else name for i, name in enumerate(label))


def _write(
    path: Path,
    names: list[str],
    labels: list[Any],
    probabilities: list[list[float]],
    exit_layers: list[int] | None,
) -> None:
    several = bool(labels) and isinstance(labels[0], list)
    fields = ["labels" if several else "label", *(f"probability_{name}" for name in names)]
    if exit_layers is not None:
        fields.append("exit_layer")
    rows: list[list[Any]] = [
        [label, *(round(value, 6) for value in row)]
        for label, row in zip(labels, probabilities, strict=True)
    ]
    if exit_layers is not None:
        rows = [[*row, layer] for row, layer in zip(rows, exit_layers, strict=True)]
    if path.suffix == ".csv":
        guarded = {label: f"'{label}" for label in names if _is_formula(label)}
        rows = [[_cell(label, guarded), *values] for label, *values in rows]
        if guarded:
            logger.info(
                f"{path.name}: a ' stands before the labels {', '.join(map(repr, guarded))}, which "
                "a spreadsheet would run as formulas; jsonl holds them as they are"
            )
    # A link keeps its place, and the file that it names is replaced.
    with replacing(path.resolve(), newline="") as file:
        if path.suffix == ".csv":
            csv.writer(file).writerows([fields, *rows])
        else:
            file.writelines(json.dumps(dict(zip(fields, row, strict=True))) + "\n" for row in rows)
