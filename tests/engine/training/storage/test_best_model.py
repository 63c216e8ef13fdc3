"""The step at which a stage ends early, against transformers' callback."""

from __future__ import annotations

import math

import pytest
from fusedacl.engine.config.run_options import RunOptions
from fusedacl.engine.training.storage.best_model import EarlyStopping
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments


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
