"""The step at which a stage ends early, against transformers' callback, and what is recorded."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from fusedacl.engine import TrainingConfig
from fusedacl.engine.config.run_options import RunOptions
from fusedacl.engine.model.saved import record_of
from fusedacl.engine.training.builder import build_run
from fusedacl.engine.training.storage.best_model import EarlyStopping
from tiny_runs import run
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments


def write_rows(path: Path, labels: list[Any]) -> str:
    rows = [{"sentence": f"text {i}", "label": label} for i, label in enumerate(labels)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def watching(patience: int, threshold: float = 0.0, metric: str = "accuracy") -> EarlyStopping:
    options = RunOptions(
        early_stopping_patience=patience,
        early_stopping_threshold=threshold,
        metric_for_best_model=metric,
    )
    return EarlyStopping(options, ["accuracy"], [1, 2], [0, 1])


@pytest.mark.parametrize("threshold", [0.0, 0.05])
@pytest.mark.parametrize("metric", ["accuracy", "loss"])
@pytest.mark.parametrize(
    "scores", [[0.5, 0.52, 0.54, 0.56, 0.58, 0.6], [0.5, 0.7, 0.6, 0.7, 0.71, 0.72], [0.3] * 4]
)
def test_it_ends_where_transformers_ends(
    scores: list[float], metric: str, threshold: float, tmp_path
) -> None:
    callback = EarlyStoppingCallback(2, threshold)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        metric_for_best_model=metric,
        greater_is_better=metric == "accuracy",
        load_best_model_at_end=True,
        eval_strategy="steps",
        save_strategy="steps",
        use_cpu=True,
    )
    state, control = TrainerState(), TrainerControl()
    ours = watching(2, threshold, metric)
    for score in scores if metric == "accuracy" else [1 - score for score in scores]:
        callback.on_evaluate(arguments, state, control, {f"eval_{metric}": score})
        # Trainer keeps the best score after its callbacks.
        if state.best_metric is None or ours.gain(score) > 0:
            state.best_metric = score
        ours.consider({2: {"accuracy": score, "loss": score}})
        assert ours.is_over == control.should_training_stop
        assert ours.value == state.best_metric
        if ours.is_over:
            break


def test_nan_counts_as_no_gain_and_the_state_is_kept() -> None:
    stopping = watching(2)
    for score in (0.5, math.nan):
        stopping.consider({2: {"accuracy": score}})
    assert (stopping.value, stopping.num_without, stopping.is_over) == (0.5, 1, False)
    again = watching(2)
    again.load_state_dict(stopping.state_dict())
    again.consider({2: {"accuracy": 0.5}})
    assert again.is_over
    other = watching(2, metric="loss")
    other.load_state_dict(stopping.state_dict())
    assert (other.value, other.num_without) == (None, 0)


@pytest.mark.parametrize(
    ("changes", "split"),
    [
        ({}, None),
        ({"load_best_model_at_end": True, "save_steps": None}, "validation"),
        ({"early_stopping_patience": 1, "eval_steps": 12}, "validation"),
    ],
    ids=str,
)
def test_the_split_that_chooses_a_checkpoint_is_recorded(options, changes, split) -> None:
    parts = build_run(TrainingConfig.create(**{**options, **changes}))
    assert parts.model.config.data_record["chosen_on"] == split


@pytest.mark.parametrize(
    "changes",
    [{"load_best_model_at_end": True, "save_steps": None}, {"early_stopping_patience": 1}],
)
def test_a_choice_needs_a_labelled_split(options, changes: dict[str, Any], tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", [0, 1] * 12)
    files = {"train_file": file, "task_name": None, "data_dir": None}
    with pytest.raises(ValueError, match="has no labelled split to choose by"):
        build_run(TrainingConfig.create(**{**options, **changes, **files}))


def test_the_record_of_a_second_stage_has_what_the_first_has_seen(options, tmp_path: Path) -> None:
    first = tmp_path / "first"
    choosing = {"load_best_model_at_end": True, "save_steps": None}
    run({**options, **choosing, "output_dir": str(first), "save_total_limit": 1})
    second = {"stage1_model": str(first), "strategy": "two_stage", "model_name_or_path": None}
    parts = build_run(TrainingConfig.create(**{**options, **second}))
    record = record_of(parts.model)
    assert record.chosen_on is None
    (chosen,) = record.selected_on
    assert chosen == record.splits["validation"] and len(record.trained_on) == 1
    # A second stage on other texts.
    other = write_rows(tmp_path / "other.jsonl", ["negative", "positive"] * 12)
    files = {"train_file": other, "task_name": None, "data_dir": None}
    parts = build_run(TrainingConfig.create(**{**options, **second, **files}))
    assert [content["rows"] for content in record_of(parts.model).trained_on] == [24, 64]
