"""Finished runs of `fusedacl train`: their results, options, model and data."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config.commands import InferenceOptions
from ..config.fields import build, flatten
from ..config.sections import TrainingDataOptions
from ..config.training import TrainingConfig
from ..data.dataset import TextData, load_splits
from ..data.record import DataRecord
from ..model.saved import TrainedModel
from ..runtime.files import read_file
from ..runtime.text import nearest_directory
from ..training.logs.metrics_log import METRICS_FILE, read_records
from ..training.storage.checkpoint import CONFIG_FILE, RESULTS_FILE

OBJECTIVE_NAMES = {"ce": "CE", "scl": "CE+SCL", "acl": "ACL"}
_STRATEGY_NAMES = {"joint": "JT", "two_stage": "2ST", "alternating": "ALT", "single": "single"}


def read_results(run: Path) -> dict[str, Any]:
    """The results of a run, given its directory or the file itself.

    `metrics`: split -> layer -> name -> value; `options`: those of the run; `gate`: a row per epoch
    and group of parameters.

    Raises:
        ValueError: there are no results, or the file is damaged.
    """
    file = run / RESULTS_FILE if run.is_dir() else run
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        for by_layer in results["metrics"].values():
            for layer, metrics in by_layer.items():
                int(layer), metrics.items()
        results["options"].items()
    except FileNotFoundError:
        raise ValueError(
            f"{str(run)!r} holds no {RESULTS_FILE}: it is not a finished run of fusedacl train."
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{str(file)!r} is not the {RESULTS_FILE} of a run.") from None
    return dict(results)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The records that a run logged while training.

    Raises:
        ValueError: the directory holds none.
    """
    path = run / METRICS_FILE
    if not path.is_file():
        raise ValueError(f"{str(run)!r} holds no {METRICS_FILE}: it is not a run of fusedacl.")
    return read_records(path)


def run_config(run: Path) -> TrainingConfig:
    """The options that a run, or the run of a checkpoint, was started with.

    They are read from config.yaml, or from results.json if that is all that was kept.

    Raises:
        ValueError: there is no such directory, it is not a run, or its files are damaged.
    """
    if not run.is_dir():
        raise ValueError(
            f"run {str(run)!r}: there is no such directory.{nearest_directory(str(run))}"
        )
    is_checkpoint = run.name.startswith("checkpoint-") and not (run / CONFIG_FILE).is_file()
    home = run.resolve().parent if is_checkpoint else run
    files = [file for name in (CONFIG_FILE, RESULTS_FILE) if (file := home / name).is_file()]
    if not files:
        raise ValueError(
            f"run {str(run)!r} holds neither {CONFIG_FILE} nor {RESULTS_FILE}: it is not a run of "
            "fusedacl train."
        )
    where, values = files[0], read_file(files[0])
    try:
        is_config = where.name == CONFIG_FILE
        return build(TrainingConfig, values if is_config else values.get("options", {}))
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{str(where)!r} is not the configuration of a run: {error}") from None


def method_of(config: TrainingConfig) -> str:
    """The paper's name for a run's method: "single-MHA CE+SCL"."""
    implied = {"gate": "angle" if config.gated else "none", "cross_layer": config.contrasts_layers}
    return run_label({**flatten(config), **implied})


def load_model(run: Path, device: str) -> TrainedModel:
    """The run's model in evaluation mode, in float32, with its tokenizer and sequence length.

    Raises:
        ValueError: as `TrainedModel`.
    """
    return TrainedModel(InferenceOptions(model_name_or_path=str(run), device=device), None)


def load_data(
    run: Path,
    config: TrainingConfig,
    model: DataRecord,
    moved: Mapping[str, Any],
    *,
    needs_train: bool,
) -> TextData:
    """The data of a run, with the columns and classes of its model.

    moved: options of `TrainingDataOptions` that replace those of the run, unless they are None.

    Raises:
        ValueError: the data are missing, or have other classes than the model.
        ConnectionError: the hub cannot be reached and the data set is not in the local cache.
    """
    replaced = {name: value for name, value in moved.items() if value is not None}
    if "validation_file" in replaced and config.data.validation_split_percentage is not None:
        raise ValueError(
            f"run {str(run)!r} held its validation texts out of the training split: leave "
            "validation_file out."
        )
    # Test splits serve training alone, and may have moved.
    data: TrainingDataOptions = dataclasses.replace(
        config.data_with_seed(), do_predict=False, test_file=None, **replaced
    )
    try:
        return load_splits(data, needs_train=needs_train, model=model)
    except ValueError as error:
        raise ValueError(
            f"run {str(run)!r}: its data cannot be read again: {error} If they have moved, "
            "--data_dir (or --train_file, --validation_file) says where they are now."
        ) from None


def distinct_labels(
    runs: Sequence[Path], methods: Sequence[str], data: Sequence[str], given: str | None
) -> list[str]:
    """Distinct names of runs for tables and legends.

    given: names separated by commas, used instead of the methods. Runs of the same method are
    distinguished by their data, then by their directories.

    Raises:
        ValueError: the number of names is not that of the runs, or a name occurs twice.
    """
    if given is not None:
        names = [name.strip() for name in given.split(",")]
        if len(names) != len(runs) or len(set(names)) != len(names) or not all(names):
            raise ValueError(
                f"labels={given!r}: {len(runs)} run(s) need as many different names, separated by "
                "commas."
            )
        return names
    labels = list(methods)
    if len(set(data)) > 1:
        labels = [f"{label}, {name}" for label, name in zip(labels, data, strict=True)]
    named = []
    for run, label in zip(runs, labels, strict=True):
        alike = [other for other, same in zip(runs, labels, strict=True) if same == label]
        named.append(f"{label} ({_tail(run, alike)})" if len(alike) > 1 else label)
    return named


def named_runs(runs: Sequence[Path], labels: str | None) -> list[tuple[str, TrainingConfig]]:
    """The name of each run (see `distinct_labels`) and the options that it was started with.

    Raises:
        ValueError: no run is named, or one twice; as `run_config` and `distinct_labels`.
    """
    if not runs:
        raise ValueError("runs is empty: name the output directory of at least one run.")
    found = [run.resolve() for run in runs]
    for run in runs:
        if found.count(run.resolve()) > 1:
            raise ValueError(f"run {str(run)!r} is named twice: name it once.")
    configs = [run_config(run) for run in runs]
    data = [str(config.data.task_name or config.data.dataset_name) for config in configs]
    names = distinct_labels(runs, [method_of(config) for config in configs], data, labels)
    return list(zip(names, configs, strict=True))


def _tail(run: Path, runs: Sequence[Path]) -> str:
    """The shortest suffix of a run's path that no other run shares."""
    parts, *others = (path.resolve().parts for path in (run, *runs))
    for length in range(1, len(parts)):
        if all(other == parts or other[-length:] != parts[-length:] for other in others):
            return "/".join(parts[-length:])
    return str(run)


def run_label(options: Mapping[str, Any]) -> str:
    """A method in the paper's abbreviations: "2ST-MHA ACL-CL + KD"."""
    head = {"mha": "MHA", "linear": "linear"}[options["exit_head"]]
    # Absent in the results of earlier versions.
    head += "-mean" if options.get("exit_pooling") == "mean" else ""
    label = f"{_STRATEGY_NAMES[options['strategy']]}-{head} {OBJECTIVE_NAMES[options['objective']]}"
    label += "-CL" if options.get("cross_layer") else ""
    if options["objective"] == "acl" and options["gate"] == "none":
        label += " without gate"
    return label + (" + KD" if options.get("distill_weight") else "")
