"""`fusedacl export`: a trained model with its early-exit policy as a directory of ONNX graphs."""

from __future__ import annotations

import copy
import logging
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...config.commands import ExportConfig, InferenceOptions
from ...config.sections import DataOptions
from ...data.batching import EncodedSplit, check_max_length, evaluation_batches
from ...data.dataset import TextData
from ...model.answers import has_several_labels
from ...model.early_exit import EarlyExit
from ...model.exit_policies import parse_policy
from ...model.saved import TrainedModel
from ...runtime.files import write_json
from ...runtime.machine import versions
from ...runtime.manifest import sealed, write_manifest
from ..calibration.timing import MEASURED_BATCH_SIZES, measure_speed, spread_texts
from ..evaluation import load_labelled, score
from .decisions import unexplained
from .onnx_early_exit import EXPORT_FILE, FORMAT, TOKENIZER_FILE, OnnxEarlyExit
from .onnx_files import MAX_ERROR, differences, quantise, require_onnx, write_segments
from .segments import Segment, split

logger = logging.getLogger("fusedacl")
# With `measure`.
MEASURED_TEXTS = 200
TIMED_PASSES = 3
PAUSE_SECONDS = 0.3


def export_model(config: ExportConfig) -> dict[str, Any]:
    """Write a model for `OnnxEarlyExit`; returns what early_exit.json holds and `output_dir`.

    The graphs are compared with PyTorch before the function returns; with a data set, so are the
    answers to all of its texts, where nothing is quantised.

    Raises:
        ValueError: a mistake in the options, an encoder that cannot be split or recorded, a package
            that is missing, or graphs that answer otherwise than PyTorch.
        FloatingPointError: graphs answer NaN.

    Nothing is left behind by an error.
    """
    options = config.export
    require_onnx()
    output_dir = _new_directory(options.output_dir)
    has_data = any((config.data.task_name, config.data.dataset_name, config.data.validation_file))
    for name, value in vars(config.data).items():
        # Read without data too: it becomes the length limit of the export.
        if not has_data and name != "max_seq_length" and value != getattr(DataOptions(), name):
            raise ValueError(
                f"{name}={value!r} belongs to a data set: name one with task_name, dataset_name or "
                f"validation_file, or leave {name} out."
            )
    if options.quantize == "int8" and not has_data:
        raise ValueError(
            "quantize=int8 changes answers, and its score has to be measured: name a labelled data "
            "set as for `fusedacl evaluate`, such as --validation_file dev.csv."
        )
    if options.measure and not has_data:
        raise ValueError(
            "measure times the answers to texts: name a labelled data set as for `fusedacl "
            "evaluate`, such as --validation_file dev.csv."
        )
    model_options = InferenceOptions(**vars(config.model), device="cpu")
    data: TextData | None = None
    if has_data:
        trained, data = load_labelled(model_options, config.data, "measure")
    else:
        trained = TrainedModel(model_options, config.data.max_seq_length)
    if has_several_labels(trained.model.config):
        raise ValueError(
            "The model gives a text any number of labels, and the ONNX runtime answers with one "
            "class per text: such models are not exported. Use `fusedacl predict --policy`."
        )
    is_stored = options.policy == "stored"
    engine = EarlyExit(trained.model, None if is_stored else parse_policy(options.policy))
    columns = trained.record.text_columns
    is_pair = columns is not None and len(columns) == 2
    check_max_length(trained.tokenizer, trained.max_length, trained.limit, is_pair)
    segments = split(engine)
    record = _record(trained, engine, is_stored, options.quantize)
    # Renamed when it is whole.
    partial = output_dir.with_name(output_dir.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        files = [partial / f"segment_{segment.layer}.onnx" for segment in segments]
        write_segments(engine, segments, files)
        _check(engine, segments, files)
        if options.quantize == "int8":
            for file in files:
                quantise(file)
        record["segments"] = list(map(described, segments, files))
        trained.tokenizer.save_pretrained(partial)
        has_tokenizer = (partial / TOKENIZER_FILE).is_file()
        _write(partial, record)
        if data is not None:
            name = data.evaluation_splits[0]
            encoded = trained.encode(data.splits[name], name)
            measured = _compare(
                engine, segments, partial, encoded, trained, data.metrics[0], model_options
            )
            record["measured"] = {"data": f"{data.name}, {name}", **measured}
            if options.measure:
                record["measured"]["speed"] = _time(engine, partial, encoded, trained)
            _write(partial, record)
        partial.replace(output_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return {**record, "output_dir": str(options.output_dir), "has_tokenizer": has_tokenizer}


def lines_of(results: dict[str, Any]) -> list[str]:
    """The output of the command."""
    layers = ", ".join(str(segment["layer"]) for segment in results["segments"])
    own = results["has_tokenizer"]
    lines = [
        f"exits on layers {layers}: {len(results['segments'])} graphs"
        f"{', early_exit.json and the tokenizer' if own else ' and early_exit.json'} are in "
        f"{results['output_dir']}"
    ]
    measured = results.get("measured")
    if measured is not None:
        lines.append(
            f"{measured['data']}: {measured['metric']} {measured['onnx_score']:.4f}, in PyTorch "
            f"{measured['pytorch_score']:.4f}; {measured['num_other_answers']} of "
            f"{measured['num_texts']} answers and {measured['num_other_layers']} exit layers differ"
        )
        lines += [
            f"batch {speed['batch_size']}: {speed['onnx_ms']:.2f} ms a text; PyTorch takes "
            f"{speed['pytorch_ms'] / speed['onnx_ms']:.2f} times as long with early exit, "
            f"{speed['full_ms'] / speed['onnx_ms']:.2f} times with the full model"
            for speed in measured.get("speed", ())
        ]
    runtime = f"fusedacl.engine.OnnxEarlyExit({results['output_dir']!r})"
    if own:
        return [*lines, f"use: {runtime}.predict(texts)"]
    return [
        *lines,
        f"The model's tokenizer runs in transformers only and has no {TOKENIZER_FILE}: tokenise "
        "the texts there, and pass the token ids.",
        f"use: {runtime}(input_ids, attention_mask)",
    ]


def _check(engine: EarlyExit, segments: Sequence[Segment], files: Sequence[Path]) -> None:
    """Refuse graphs that compute otherwise than PyTorch.

    Raises:
        ValueError: with the error, or the number of decisions.
    """
    error, num_wrong = differences(engine, segments, files)
    if not error <= MAX_ERROR:
        raise _refusal(engine, f"error {error:.1e}, at most {MAX_ERROR:g} is accepted")
    if num_wrong:
        raise _refusal(engine, f"{num_wrong} decisions of the policy {engine.policy} differ")


def _refusal(engine: EarlyExit, difference: str) -> ValueError:
    return ValueError(
        f"The graphs of this {engine.model.backbone.config.model_type} encoder do not compute what "
        f"PyTorch does ({difference}): it cannot be exported with these versions of PyTorch and "
        "transformers."
    )


def described(segment: Segment, file: Path) -> dict[str, Any]:
    """The entry of a graph in the manifest that the runtime reads."""
    ports = segment.ports
    names = {"inputs": list(ports.inputs), "outputs": list(ports.outputs)}
    return {"file": file.name, "layer": segment.layer, **names}


def _new_directory(name: str | None) -> Path:
    if not name:
        raise ValueError("output_dir is missing: name a directory for the export.")
    # A link cannot be replaced by a directory; the directory that it names can.
    path = Path(name).resolve()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"output_dir={name!r} exists and is not empty: name another directory.")
    if path.is_mount():
        raise ValueError(
            f"output_dir={name!r} is where a file system is mounted, and cannot be replaced: name "
            "a directory inside it."
        )
    return path


def _record(
    trained: TrainedModel, engine: EarlyExit, is_stored: bool, quantize: str
) -> dict[str, Any]:
    """The manifest that the runtime reads, with the calibration of the policy."""
    policy: dict[str, Any] = {"name": engine.policy.name, "parameters": engine.policy.parameters}
    if is_stored:
        policy = copy.deepcopy(trained.model.config.exit_policy)
        mismatch = trained.calibration_mismatch()
        if mismatch is not None:
            logger.warning(mismatch)
        as_tested = mismatch is None and quantize == "none"
        if not as_tested and (policy.get("calibration") or {}).pop("guarantee", None):
            logger.warning(
                "The stored guarantee is of the model as it was calibrated: it is not exported "
                "with int8 weights, other weights, another dtype or another length."
            )
    tokenizer, columns = trained.tokenizer, trained.record.text_columns
    return {
        "format": FORMAT,
        "policy": policy,
        "quantize": quantize,
        "label_names": trained.label_names,
        "max_seq_length": trained.max_length,
        "pad_token_id": tokenizer.pad_token_id,
        "truncation_side": tokenizer.truncation_side,
        "gives_token_types": "token_type_ids" in tokenizer.model_input_names,
        "reads_pairs": None if columns is None else len(columns) == 2,
        "data_record": trained.record.to_dict(),
        "versions": versions(),
    }


def _write(output_dir: Path, record: dict[str, Any]) -> None:
    """Write early_exit.json and, last, the manifest."""
    write_json(output_dir / EXPORT_FILE, record)
    names = [EXPORT_FILE, TOKENIZER_FILE, *(segment["file"] for segment in record["segments"])]
    files = [output_dir / name for name in names if (output_dir / name).is_file()]
    write_manifest(output_dir, {file.name: sealed(file) for file in files})


def _compare(
    engine: EarlyExit,
    segments: Sequence[Segment],
    output_dir: Path,
    encoded: EncodedSplit,
    trained: TrainedModel,
    metric: str,
    options: InferenceOptions,
) -> dict[str, Any]:
    """Scores of the export and of PyTorch on the same tokens, and how often they differ.

    Raises:
        ValueError: they differ by more than rounding, although nothing was quantised.
    """
    batch_size, padding = options.per_device_eval_batch_size, trained.tokenizer.pad_token_id
    progress = not options.disable_tqdm
    left = engine.predict(encoded, batch_size, pad_token_id=padding, progress=progress)
    exported = OnnxEarlyExit(output_dir)
    probabilities = torch.empty_like(left.probabilities)
    layers = torch.empty_like(left.exit_layers)
    title = "onnxruntime" if progress else None
    for rows, batch in evaluation_batches(encoded, batch_size, padding, progress=title):
        try:
            answers = exported(**batch)
        except FloatingPointError:
            # Its index is that in a batch, and its remedy for those who serve an export.
            quantised = exported.record["quantize"] != "none"
            remedy = "Leave quantize out." if quantised else "Export another checkpoint."
            raise FloatingPointError(
                f"The export's answers to some texts are NaN or infinite. {remedy}"
            ) from None
        probabilities[rows] = torch.from_numpy(answers.probabilities)
        layers[rows] = torch.from_numpy(answers.exit_layers)
    predictions = probabilities.argmax(dim=-1)
    other_answers, other_layers = predictions != left.predictions, layers != left.exit_layers
    differing = np.flatnonzero(other_answers | other_layers)
    if len(differing) and exported.record["quantize"] == "none":
        num_wrong = 0
        for places, batch in evaluation_batches(encoded.take(differing), batch_size, padding):
            no_types = torch.zeros_like(batch["input_ids"])
            inputs = tuple(batch.get(name, no_types) for name in segments[0].ports.inputs)
            rows = differing[places]
            ways = left.exit_layers[rows], layers[rows]
            num_wrong += int(unexplained(segments, inputs, *ways).sum())
        if num_wrong:
            raise _refusal(engine, f"{num_wrong} of {len(encoded)} texts are answered otherwise")
    assert encoded.labels is not None  # load_labelled refuses a split without
    labels, f1_index = encoded.labels.numpy(), trained.record.f1_index
    scores = [
        score([metric], answer.numpy(), labels, f1_index)[metric]
        for answer in (predictions, left.predictions)
    ]
    return {
        "metric": metric,
        "num_texts": len(encoded),
        "onnx_score": scores[0],
        "pytorch_score": scores[1],
        "mean_layer": float(layers.double().mean()),
        "pytorch_mean_layer": left.mean_layer,
        "num_other_answers": int(other_answers.sum()),
        "num_other_layers": int(other_layers.sum()),
        "largest_probability_error": float((probabilities - left.probabilities).abs().max()),
    }


def _time(
    engine: EarlyExit, output_dir: Path, encoded: EncodedSplit, trained: TrainedModel
) -> list[dict[str, Any]]:
    """Milliseconds per text of the export, of PyTorch's early exit and of its full model.

    They take turns by passes over the texts, with pauses: the threads of either library keep the
    cores busy for a while after a call, which would slow down the other one.
    """
    padding, texts = trained.tokenizer.pad_token_id, spread_texts(encoded, MEASURED_TEXTS)
    exported, found = OnnxEarlyExit(output_dir), []
    for batch_size in MEASURED_BATCH_SIZES:
        batches = [batch for _, batch in evaluation_batches(texts, batch_size, padding)]
        passes = []
        for _ in range(TIMED_PASSES):
            (speed,) = measure_speed(
                trained.model, texts, [engine.policy], batch_size, pad_token_id=padding, repeats=1
            )
            time.sleep(PAUSE_SECONDS)
            exported(**batches[0])
            start = time.perf_counter()
            for batch in batches:
                exported(**batch)
            taken = 1000 * (time.perf_counter() - start) / len(texts)
            passes.append((taken, speed.early_ms, speed.full_ms))
            time.sleep(PAUSE_SECONDS)
        medians = map(statistics.median, zip(*passes, strict=True))
        names = ("onnx_ms", "pytorch_ms", "full_ms")
        sizes = {"batch_size": batch_size, "num_texts": len(texts)}
        found.append(sizes | dict(zip(names, medians, strict=True)))
    return found
