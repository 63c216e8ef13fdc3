"""Runs on texts with several labels: from the command line to files, early exit, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fusedacl.engine import (
    EvaluationConfig,
    PredictionConfig,
    TrainingConfig,
    evaluate,
    predict,
)
from fusedacl.engine.cli.main import main
from fusedacl.engine.config.fields import build
from fusedacl.engine.data.dataset import load_splits
from fusedacl.engine.runtime.signals import Interrupted
from fusedacl.engine.training.trainer import Trainer
from text_sets.emotions import DEV, NAMES, TRAIN, as_columns, write_table
from tiny_runs import at_step, flags, records, run, weights

# Micro F1 of the answer "all labels", the best without a look at the text.
CHANCE = 2 / (1 + len(NAMES) * len(DEV) / sum(len(row["labels"]) for row in DEV))


@pytest.fixture
def options(tiny_bert: Path, emotion_files: dict[str, str], tmp_path: Path) -> dict[str, Any]:
    return {
        **emotion_files,
        "model_name_or_path": str(tiny_bert),
        "output_dir": str(tmp_path / "run"),
        "max_seq_length": 16,
        "per_device_train_batch_size": 16,
        "learning_rate": 5e-3,
        "num_train_epochs": 3,
        "logging_steps": 1,
        "save_steps": 0,
        "disable_tqdm": True,
    }


@pytest.mark.parametrize("form", ["lists", "columns"])
def test_train_evaluate_predict_from_the_command_line(
    options: dict[str, Any], tmp_path: Path, form: str
) -> None:
    data: dict[str, Any] = {}
    if form == "columns":
        data["label_column"] = ",".join(NAMES)
        options["train_file"] = write_table(tmp_path / "train.csv", as_columns(TRAIN))
        options["validation_file"] = write_table(tmp_path / "dev.csv", as_columns(DEV))
    assert main(["train", *flags({**options, **data})]) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"
    assert list(config["id2label"].values()) == NAMES
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    trained = results["metrics"]["validation"]["2"]
    assert list(trained) == ["micro_f1", "macro_f1", "average_precision", "exact_match", "loss"]
    assert all(trained[name] > 0.8 for name in list(trained)[:4])
    assert results["gate"]
    card = (tmp_path / "run" / "README.md").read_text()
    assert "Objective: binary cross-entropy of each label" in card

    # The labels of another file, in another form, of the same names.
    labelled = write_table(tmp_path / "more.csv", DEV, separator=";")
    named = {"model_name_or_path": options["output_dir"], "validation_file": labelled}
    flat = {"label_column": "labels", "label_separator": ";"}
    measured = tmp_path / "metrics.json"
    assert main(["evaluate", *flags({**named, **flat, "output_file": measured})]) == 0
    assert json.loads(measured.read_text())["validation"]["2"] == trained

    files = {"input_file": labelled, "output_file": tmp_path / "out.jsonl"}
    assert main(["predict", *flags({"model_name_or_path": options["output_dir"], **files})]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    exact = np.mean(
        [row["labels"] == wanted["labels"] for row, wanted in zip(rows, DEV, strict=True)]
    )
    assert exact == trained["exact_match"]
    for row in rows:
        chances = {name: row[f"probability_{name}"] for name in NAMES}
        assert row["labels"] == [name for name in NAMES if chances[name] > 0.5]


def test_a_label_that_the_model_lacks_is_named_with_its_row(
    emotion_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_table(tmp_path / "dev.jsonl", [*DEV[:3], {"text": "a", "labels": ["joyy"]}])
    given = {"model_name_or_path": emotion_model, "validation_file": path}
    assert main(["evaluate", *flags(given)]) == 2
    assert "data row 4 has the label 'joyy'" in capsys.readouterr().err


@pytest.mark.parametrize("objective", ["ce", "scl", "acl"])
def test_a_resumed_run_is_the_uninterrupted_one(
    options: dict[str, Any], objective: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options |= {"objective": objective, "num_train_epochs": 2, "save_steps": 7}
    results = run(options)
    assert results["metrics"]["validation"][2]["micro_f1"] > CHANCE
    stopped = {**options, "output_dir": str(tmp_path / "stopped")}
    with monkeypatch.context() as patch:

        def stop(trainer: Trainer) -> None:
            trainer.signals.received = 15

        at_step(patch, 9, stop)
        with pytest.raises(Interrupted):
            run(stopped)
    resumed = run(stopped, resume_from_checkpoint="latest")
    assert resumed["metrics"] == results["metrics"]
    assert records(tmp_path / "stopped") == records(tmp_path / "run")
    for name, value in weights(tmp_path / "run").items():
        assert torch.equal(value, weights(tmp_path / "stopped")[name]), name


def test_a_run_does_not_resume_on_other_labels(options: dict[str, Any], tmp_path: Path) -> None:
    options |= {"save_steps": 5, "max_steps": 5}
    run(options)
    rows = [{**row, "labels": row["labels"] or ["joy"]} for row in TRAIN]
    options["train_file"] = write_table(Path(options["train_file"]).with_name("train.jsonl"), rows)
    try:
        with pytest.raises(ValueError, match="the labels of train are others"):
            run(options, resume_from_checkpoint="latest")
    finally:
        write_table(Path(options["train_file"]), TRAIN)


STRATEGIES: dict[str, dict[str, Any]] = {
    "joint": {"strategy": "joint"},
    "two_stage": {"strategy": "two_stage", "distill_weight": 0.3},
    "alternating": {"strategy": "alternating"},
    "cached features": {"strategy": "two_stage", "objective": "scl"},
    "large batches": {
        "contrastive_batch_size": 32,
        "gradient_accumulation_steps": 2,
        "label_smoothing_factor": 0.1,
    },
    "scope": {"gate_scope": "head"},
    "every label an anchor": {"positives": "each", "aux_weight": 0.2},
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_exit_learns(options: dict[str, Any], name: str, tmp_path: Path) -> None:
    options |= STRATEGIES[name]
    if name == "cached features":
        options["feature_cache"] = str(tmp_path / "cache")
    results = run(options, num_train_epochs=4)["metrics"]["validation"]
    assert len(results) == (2 if "strategy" in options else 1)
    for layer, metrics in results.items():
        assert metrics["micro_f1"] > CHANCE + 0.2, layer


def test_the_best_checkpoint_and_the_test_split(options: dict[str, Any], tmp_path: Path) -> None:
    options |= {
        "load_best_model_at_end": True,
        "metric_for_best_model": "micro_f1",
        "save_steps": None,
        "do_predict": True,
        "test_file": write_table(tmp_path / "test.jsonl", DEV[:30]),
    }
    results = run(options)
    scores = [r["metrics"]["micro_f1"] for r in records(options["output_dir"], "validation")]
    assert results["best"]["value"] == max(scores)
    of_test = results["predictions"]["test"]
    lines = (tmp_path / "run" / of_test["file"]).read_text().splitlines()
    answers = [json.loads(line)["labels"] for line in lines]
    wanted = [row["labels"] for row in DEV[:30]]
    exact = np.mean([a == b for a, b in zip(answers, wanted, strict=True)])
    assert of_test["metrics"][2]["exact_match"] == exact
    with pytest.raises(ValueError, match="metric_for_best_model='accuracy' is not reported"):
        run(options, metric_for_best_model="accuracy", overwrite_output_dir=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sampler": "balanced"}, "sampler=balanced fills batches class by class"),
        ({"class_weights": "balanced"}, "class_weights='balanced' weighs texts by their class"),
        ({"memory_size": 8}, "memory_size=8 keeps one label per text"),
        ({"max_train_samples_per_class": 5}, "belongs to no single class"),
        ({"problem_type": "single_label_classification"}, "is one label per text, but column"),
    ],
)
def test_what_a_run_refuses(options: dict[str, Any], changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        run(options, **changes)
    assert not Path(options["output_dir"]).exists()


def test_what_belongs_to_several_labels_is_refused_with_one(tiny_options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="positives=each is for texts with several labels"):
        run(tiny_options, positives="each")
    run(tiny_options, max_steps=1, save_steps=0)
    data = {name: tiny_options[name] for name in ("task_name", "data_dir", "output_dir")}
    given = {"model_name_or_path": data.pop("output_dir"), **data, "label_threshold": 0.3}
    with pytest.raises(ValueError, match="label_threshold=0.3: the model gives each text one"):
        evaluate(build(EvaluationConfig, given))


def test_a_first_stage_with_one_label_per_text_is_refused(
    options: dict[str, Any], tmp_path: Path
) -> None:
    single = [{"text": row["text"], "label": NAMES[i % 4]} for i, row in enumerate(TRAIN)]
    stage1 = {
        "train_file": write_table(tmp_path / "single.jsonl", single),
        "output_dir": str(tmp_path / "stage1"),
    }
    del options["validation_file"]
    run({**options, **stage1}, max_steps=1)
    second = {"stage1_model": stage1["output_dir"], "model_name_or_path": None}
    words = "has labels per text one, this run any number"
    with pytest.raises(ValueError, match=words):
        run(options, strategy="two_stage", **second)


def test_csv_answers_whose_names_hold_the_bar_are_refused(
    options: dict[str, Any], tmp_path: Path
) -> None:
    rows = [{**row, "labels": [f"{name}|x" for name in row["labels"]]} for row in TRAIN]
    options["train_file"] = write_table(tmp_path / "train.jsonl", rows)
    del options["validation_file"]
    run(options, max_steps=1)
    files = {"input_file": options["train_file"], "output_file": str(tmp_path / "out.csv")}
    with pytest.raises(ValueError, match=r"joined by '\|', which the label 'anger\|x' holds"):
        predict(build(PredictionConfig, {"model_name_or_path": options["output_dir"], **files}))


@pytest.mark.real_data
def test_real_intents_joined_two_by_two(real_data: Path, minilm: Path, tmp_path: Path) -> None:
    """Two sentences of six intents in one text; the answer "all six" has a micro F1 of 0.47."""
    source = {"task_name": "clinc150", "data_dir": str(real_data)}
    data = load_splits(TrainingConfig.create(**source).data)
    files = {}
    for split, name, number in (
        ("train", "train_file", 1200),
        ("validation", "validation_file", 80),
    ):
        texts = data.splits[split]
        assert texts.labels is not None
        chosen = [row for row, label in enumerate(texts.labels) if label < 6]
        draw = np.random.default_rng(len(split))
        rows = []
        for pair in draw.choice(chosen, (number, 2)):
            labels = {data.label_names[texts.labels[row]] for row in pair}
            words = " and ".join(texts.first[row] for row in pair)
            rows.append({"text": words, "labels": sorted(labels)})
        files[name] = write_table(tmp_path / f"{split}.jsonl", rows)
    results = run(
        {
            **files,
            "model_name_or_path": str(minilm),
            "output_dir": str(tmp_path / "run"),
            "max_seq_length": 32,
            "per_device_train_batch_size": 16,
            "learning_rate": 5e-4,
            "max_steps": 30,
            "num_hidden_layers": 3,
            "save_steps": 0,
            "disable_tqdm": True,
        }
    )
    metrics = results["metrics"]["validation"][3]
    assert metrics["micro_f1"] > 0.7
    assert metrics["average_precision"] > 0.8
    assert len(results["gate"]) == 1
