"""Runs of `fusedacl train` read back: their options, their model and the data they were made on."""

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
from ..model.saved import TrainedModel
from ..runtime.files import read_file
from ..runtime.text import nearest_directory
from ..training.storage.checkpoint import CONFIG_FILE

_STRATEGY_NAMES = {"joint": "JT", "two_stage": "2ST", "alternating": "ALT", "single": "single"}


OBJECTIVE_NAMES = {"ce": "CE", "scl": "CE+SCL", "acl": "ACL"}


RESULTS_FILE = "results.json"


def run_config(run: Path) -> TrainingConfig:
    """The options a run was started with; those of a checkpoint are its run's.

    From config.yaml, or, where only that was kept, from the options in results.json.

    Raises:
        ValueError: there is no such directory, it is not a run, or its files are damaged.
    """
    if not run.is_dir():
        raise ValueError(
            f"run {str(run)!r}: there is no such directory.{nearest_directory(str(run))}"
        )
    is_checkpoint = run.name.startswith("checkpoint-") and not (run / CONFIG_FILE).is_file()
    home = run.resolve().parent if is_checkpoint else run
    if (home / CONFIG_FILE).is_file():
        where, values = home / CONFIG_FILE, read_file(home / CONFIG_FILE)
    elif (home / RESULTS_FILE).is_file():
        where, values = home / RESULTS_FILE, read_file(home / RESULTS_FILE).get("options", {})
    else:
        raise ValueError(
            f"run {str(run)!r} holds neither {CONFIG_FILE} nor {RESULTS_FILE}: it is not a run of "
            "fusedacl train."
        )
    try:
        return build(TrainingConfig, values)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{str(where)!r} is not the configuration of a run: {error}") from None


def method_of(config: TrainingConfig) -> str:
    """What the paper would call a run's method: "single-MHA CE+SCL"."""
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
    label_names: Sequence[str],
    moved: Mapping[str, Any],
    *,
    needs_train: bool,
) -> TextData:
    """The data of a run, with the classes of its model.

    moved: options of `TrainingDataOptions` that replace the run's; None among them replace nothing.

    Raises:
        ValueError: the data are gone, or no longer those the model knows.
        ConnectionError: the hub is out of reach and the data set is not in the local cache.
    """
    replaced = {name: value for name, value in moved.items() if value is not None}
    data: TrainingDataOptions = dataclasses.replace(config.data, **replaced)
    try:
        return load_splits(data, needs_train=needs_train, label_names=label_names)
    except ValueError as error:
        raise ValueError(
            f"run {str(run)!r}: its data cannot be read again: {error} If they have moved, "
            "--data_dir (or --train_file, --validation_file) says where they are now."
        ) from None


def distinct_labels(
    runs: Sequence[Path], methods: Sequence[str], data: Sequence[str], given: str | None
) -> list[str]:
    """One name a run for tables and legends, no two alike.

    given: names separated by commas, in place of the methods'. Runs of one method are told apart
    by their data, where those differ, then by their directories.

    Raises:
        ValueError: not as many names as runs, or a name twice.
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


def check_distinct(runs: Sequence[Path]) -> None:
    """Refuse an empty list of runs, or one that names a run twice.

    Raises:
        ValueError: it is so.
    """
    if not runs:
        raise ValueError("runs is empty: name the output directory of one run at least.")
    found = [run.resolve() for run in runs]
    for run, path in zip(runs, found, strict=True):
        if found.count(path) > 1:
            raise ValueError(f"run {str(run)!r} is named twice: name it once.")


def _tail(run: Path, runs: Sequence[Path]) -> str:
    """The shortest end of a run's path that no other run shares."""
    parts = run.resolve().parts
    others = [other.resolve().parts for other in runs if other.resolve() != run.resolve()]
    for length in range(1, len(parts)):
        if all(other[-length:] != parts[-length:] for other in others):
            return "/".join(parts[-length:])
    return str(run)


def run_label(options: Mapping[str, Any]) -> str:
    """What distinguishes a method, as the paper abbreviates it: "2ST-MHA ACL-CL + KD"."""
    strategy = _STRATEGY_NAMES[options["strategy"]]
    head = {"mha": "MHA", "linear": "linear"}[options["exit_head"]]
    objective = OBJECTIVE_NAMES[options["objective"]]
    if options.get("cross_layer"):
        objective += "-CL"
    if options["objective"] == "acl" and options["gate"] == "none":
        objective += " without gate"
    distilled = " + KD" if options.get("distill_weight") else ""
    return f"{strategy}-{head} {objective}{distilled}"


def read_results(run: Path) -> dict[str, Any]:
    """The results of a run by its directory, or by the file itself.

    Raises:
        ValueError: there are none, or they are not a run's.
    """
    file = run / "results.json" if run.is_dir() else run
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        scored_layers(results), run_label(results["options"])
    except FileNotFoundError:
        raise ValueError(
            f"{str(run)!r} holds no results.json: it is not a finished run of fusedacl train."
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, StopIteration):
        raise ValueError(f"{str(file)!r} is not the results.json of a run.") from None
    return results


def main_split(results: Mapping[str, Any]) -> str:
    return str(next(iter(results["metrics"])))


def scored_layers(results: Mapping[str, Any]) -> dict[int, dict[str, float]]:
    by_layer = results["metrics"][main_split(results)]
    return {int(layer): metrics for layer, metrics in by_layer.items()}
