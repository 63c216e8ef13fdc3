"""Labels and probabilities for a file of texts."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import torch

from .batching import encode
from .config import PredictionConfig
from .data import TextSplit, read_unlabelled
from .evaluation import predict_logits
from .loading import TrainedModel

OUTPUT_EXTENSIONS = (".csv", ".jsonl")


def predict(config: PredictionConfig) -> Path:
    """Write one row a text: its label and each class's probability; returns the file.

    The columns are `label` and `probability_<class>`, in the order of the input's rows.

    Raises:
        ValueError: a mistake in the configuration, the texts or the model directory.
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
    if output_file.resolve() == Path(options.input_file).resolve():
        raise ValueError(f"output_file={str(output_file)!r} is the input_file: name another file.")
    if options.text_pair_column is not None and options.text_column is None:
        raise ValueError("text_pair_column needs text_column: name both columns.")
    columns = [name for name in (options.text_column, options.text_pair_column) if name is not None]
    texts: TextSplit = read_unlabelled(options.input_file, columns=columns or None)
    trained = TrainedModel(config.model, options.max_seq_length)
    encoded = encode(texts, trained.tokenizer, trained.max_length, model_limit=trained.limit)
    logits = predict_logits(
        trained.model,
        encoded,
        config.model.per_device_eval_batch_size,
        pad_token_id=trained.tokenizer.pad_token_id,
        dtype=trained.dtype,
        progress=not config.model.disable_tqdm,
    )
    probabilities = torch.softmax(logits[-1], dim=-1)  # [n, K]
    names = trained.label_names
    labels = [names[index] for index in probabilities.argmax(dim=-1).tolist()]
    _write(output_file, names, labels, probabilities.tolist())
    return output_file


def _write(
    path: Path, names: list[str], labels: list[str], probabilities: list[list[float]]
) -> None:
    fields = ["label", *(f"probability_{name}" for name in names)]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        if path.suffix == ".csv":
            writer.writerow(fields)
        for label, row in zip(labels, probabilities, strict=True):
            values = [label, *(round(value, 6) for value in row)]
            if path.suffix == ".csv":
                writer.writerow(values)
            else:
                file.write(json.dumps(dict(zip(fields, values, strict=True))) + "\n")
