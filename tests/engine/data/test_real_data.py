"""Real text through the whole engine: the embedded set here, GLUE and intents where they are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fusedacl.engine import EvaluationConfig, TrainingConfig, evaluate, train
from fusedacl.engine.cli.demo import demo_options
from fusedacl.engine.config.fields import build
from fusedacl.engine.data.quickstart import quickstart_splits
from fusedacl.engine.runtime.device import computes


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """MiniLM's tensors are large enough to share."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def bag_of_words_accuracy() -> float:
    """Validation accuracy on the quickstart set of logistic regression over the pair's words."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    splits = quickstart_splits()
    texts = {
        split: [f"{row['sentence1']} {row['sentence2']}" for row in rows]
        for split, rows in splits.items()
    }
    labels = {split: [row["label"] for row in rows] for split, rows in splits.items()}
    vectorizer = CountVectorizer(binary=True)
    classifier = LogisticRegression(max_iter=1000)
    classifier.fit(vectorizer.fit_transform(texts["train"]), labels["train"])
    features = vectorizer.transform(texts["validation"])
    return float(classifier.score(features, labels["validation"]))


@pytest.mark.real_data
def test_the_demonstration_learns_what_a_bag_of_words_cannot(minilm: Path, tmp_path: Path) -> None:
    options = {**demo_options("acl", tmp_path / "run"), "disable_tqdm": True}
    # Twice as fast where the CPU has it.
    options["bf16"] = computes(torch.bfloat16)
    results = train(TrainingConfig.create(**options))
    model = results["metrics"]["validation"][6]["accuracy"]
    words = bag_of_words_accuracy()
    assert words < 0.45
    assert model > 0.7
    assert model > words + 0.3
    assert len(results["gate"]) == options["num_train_epochs"]


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
