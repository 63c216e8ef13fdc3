"""MiniLM on real text: the built-in sentence pairs, and GLUE and intents from $FUSEDACL_DATA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fusedacl.engine import EvaluationConfig, TrainingConfig, evaluate, train
from fusedacl.engine.cli.demo import demo_options
from fusedacl.engine.config.fields import build


@pytest.mark.real_data
def test_the_demonstration_learns_what_a_bag_of_words_cannot(minilm: Path, tmp_path: Path) -> None:
    """40 steps in place of 158, with a higher learning rate: accuracy 0.51 to 0.57 with five seeds.

    A bag of words stays below 0.45 on these pairs (test_quickstart.py); chance is 0.33.
    """
    changes = {"max_steps": 40, "learning_rate": 3e-4, "disable_tqdm": True}
    results = train(TrainingConfig.create(**demo_options("acl", tmp_path / "run") | changes))
    assert results["metrics"]["validation"][6]["accuracy"] > 0.45
    assert len(results["gate"]) == 1


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("task", "num_classes", "split", "metric"),
    [
        ("mrpc", 2, "validation", "f1"),
        ("rte", 2, "validation", "accuracy"),
        ("cola", 2, "validation", "matthews_correlation"),
        ("trec6", 6, "test", "macro_f1"),
        ("banking77", 77, "test", "macro_f1"),
    ],
)
def test_a_few_steps_on_real_sets(
    real_data: Path,
    minilm: Path,
    tmp_path: Path,
    task: str,
    num_classes: int,
    split: str,
    metric: str,
) -> None:
    options: dict[str, Any] = {
        "task_name": task,
        "data_dir": str(real_data),
        "model_name_or_path": str(minilm),
        "output_dir": str(tmp_path / task),
        "max_steps": 3,
        "max_seq_length": 32,
        "max_eval_samples": 40,
        "per_device_train_batch_size": 16,
        "learning_rate": 1e-4,
        "save_steps": 0,
        "disable_tqdm": True,
    }
    results = train(TrainingConfig.create(**options))
    assert list(results["metrics"]) == [split]
    expected = results["metrics"][split][6]
    assert metric in expected
    evaluation = build(
        EvaluationConfig,
        {
            "model_name_or_path": options["output_dir"],
            "task_name": task,
            "data_dir": str(real_data),
            "max_eval_samples": 40,
            "disable_tqdm": True,
        },
    )
    assert evaluate(evaluation)[split][6] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    config = json.loads((Path(options["output_dir"]) / "config.json").read_text())
    assert len(config["id2label"]) == num_classes
    assert not any(name.startswith("LABEL_") for name in config["id2label"].values())
