"""Runs on texts with several labels: from the command line to files, early exit, and refusals."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fusedacl.engine import (
    EarlyExit,
    EvaluationConfig,
    ExitsConfig,
    ExportConfig,
    PredictionConfig,
    TrainingConfig,
    evaluate,
    export_model,
    predict,
    study_exits,
)
from fusedacl.engine.cli.main import main
from fusedacl.engine.config.fields import build
from fusedacl.engine.data.dataset import load_splits
from fusedacl.engine.inference.evaluation import score
from fusedacl.engine.model.exit_policies import ExitReading, MaximumProbability
from fusedacl.engine.model.saved import load_tokenizer, load_trained
from fusedacl.engine.runtime.signals import Interrupted
from fusedacl.engine.training.trainer import Trainer
from sklearn.metrics import average_precision_score, f1_score
from text_sets.emotions import NAMES, as_columns, emotion_rows, write_table
from tiny_runs import at_step, flags, records, run, weights

TRAIN, DEV = emotion_rows(160, seed=1), emotion_rows(80, seed=2)
# Micro F1 of the answer "all labels", the best without a look at the text.
CHANCE = 2 / (1 + len(NAMES) * len(DEV) / sum(len(row["labels"]) for row in DEV))


@pytest.fixture(scope="session")
def emotion_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("emotions")
    return {
        "train_file": write_table(directory / "train.jsonl", TRAIN),
        "validation_file": write_table(directory / "dev.jsonl", DEV),
    }


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


@pytest.fixture(scope="module")
def exits_model(
    tiny_bert: Path, emotion_files: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A model of two exits, half trained, so that its exits disagree."""
    directory = tmp_path_factory.mktemp("exits") / "run"
    run(
        {
            **emotion_files,
            "model_name_or_path": str(tiny_bert),
            "output_dir": str(directory),
            "strategy": "joint",
            "max_seq_length": 16,
            "per_device_train_batch_size": 16,
            "learning_rate": 2e-3,
            "max_steps": 40,
            "save_steps": 0,
            "disable_tqdm": True,
        }
    )
    return directory


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
    exits_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_table(tmp_path / "dev.jsonl", [*DEV[:3], {"text": "a", "labels": ["joyy"]}])
    given = {"model_name_or_path": exits_model, "validation_file": path}
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


def test_metrics_are_those_of_scikit_learn() -> None:
    draw = np.random.default_rng(0)
    labels, logits = draw.random((50, 5)) < 0.3, draw.normal(size=(50, 5))
    predictions = logits > 0
    # A label that never occurs counts in no mean.
    labels[:, 4], predictions[:, 4] = False, False
    names = ["micro_f1", "macro_f1", "average_precision", "exact_match"]
    found = score(names, predictions, labels, logits=logits)
    assert found["micro_f1"] == f1_score(labels, predictions, average="micro")
    assert found["macro_f1"] == f1_score(labels[:, :4], predictions[:, :4], average="macro")
    expected = average_precision_score(labels[:, :4], logits[:, :4], average="macro")
    assert found["average_precision"] == expected
    assert found["exact_match"] == (labels == predictions).all(axis=1).mean()
    # The first texts of a split may all be without labels, or have one alone.
    nothing = np.zeros((4, 5), dtype=bool)
    assert score(names, nothing, nothing, logits=logits[:4]) == {
        "micro_f1": 0, "macro_f1": 0, "average_precision": 0, "exact_match": 1
    }  # fmt: skip
    alone = nothing.copy()
    alone[:, 2] = [True, False, True, False]
    order = np.zeros((4, 5))
    order[:, 2] = [3, 2, 1, 0]
    assert score(["average_precision"], nothing, alone, logits=order) == {
        "average_precision": pytest.approx((1 + 2 / 3) / 2)
    }
    with pytest.raises(ValueError, match="metric='accuracy' is unknown"):
        score(["accuracy"], predictions, labels, logits=logits)


def test_thresholds_of_evaluate_and_predict(
    exits_model: Path, emotion_files: dict[str, str], tmp_path: Path
) -> None:
    named = {"model_name_or_path": str(exits_model), "disable_tqdm": True}
    data = {**named, "validation_file": emotion_files["validation_file"]}
    usual, low = (
        evaluate(build(EvaluationConfig, {**data, "label_threshold": threshold}))["validation"][2]
        for threshold in (None, 0.1)
    )
    assert usual["average_precision"] == low["average_precision"]
    assert usual["micro_f1"] != low["micro_f1"]
    files = {"input_file": data["validation_file"], "output_file": str(tmp_path / "out.csv")}
    predict(build(PredictionConfig, {**named, **files, "label_threshold": 0.1}))
    with (tmp_path / "out.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            expected = [name for name in NAMES if float(row[f"probability_{name}"]) > 0.1]
            assert row["labels"] == "|".join(expected)
    with pytest.raises(ValueError, match="label_threshold=0.1 beside policy='entropy"):
        policy = {"policy": "entropy:threshold=0.5", "label_threshold": 0.1}
        predict(build(PredictionConfig, {**named, **files, **policy}))


def test_early_exit_gives_each_text_the_labels_of_its_exit(
    exits_model: Path, emotion_files: dict[str, str]
) -> None:
    model = load_trained(str(exits_model)).eval()
    texts = [row["text"] for row in DEV]
    batch = load_tokenizer(str(exits_model))(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = model(**batch).exit_logits
    signal = MaximumProbability.signal(ExitReading(1, logits[0], several=True))
    threshold = float(signal.median())
    output = EarlyExit(model, "max_probability", threshold=threshold)(**batch)
    left_first = output.exit_layers == 1
    assert 0 < left_first.sum() < len(texts)
    expected = torch.where(left_first[:, None], logits[0], logits[1])
    assert torch.equal(output.predictions, expected > 0)
    torch.testing.assert_close(output.probabilities, torch.sigmoid(expected))


def test_a_policy_is_calibrated_stored_and_served(
    exits_model: Path, emotion_files: dict[str, str], tmp_path: Path, caplog: Any
) -> None:
    caplog.set_level(logging.INFO, "fusedacl")
    data = {
        "model_name_or_path": str(exits_model),
        "validation_file": emotion_files["validation_file"],
        "disable_tqdm": True,
    }
    study = {"max_quality_loss": 0.5, "policy": "patience"}
    results = study_exits(build(ExitsConfig, {**data, **study}))
    assert results["metric"] == "micro_f1"
    assert set(results["policies"]) == {
        "max_probability", "entropy", "patience", "patience_confidence", "fixed_layer",
    }  # fmt: skip
    assert "voting: left out, as a text may have several labels" in caplog.text
    full = evaluate(build(EvaluationConfig, data))["validation"]
    assert results["full_score"] == full[2]["micro_f1"]
    files = {"input_file": data["validation_file"], "output_file": str(tmp_path / "out.jsonl")}
    predict(
        build(
            PredictionConfig,
            {"model_name_or_path": str(exits_model), **files, "policy": "stored"},
        )
    )
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert {row["exit_layer"] for row in rows} <= {1, 2}
    found = results["policies"]["patience"]["calibration"]["score"]
    answers, wanted = (
        np.array([[name in row["labels"] for name in NAMES] for row in given])
        for given in (rows, DEV)
    )
    assert f1_score(wanted, answers, average="micro") == pytest.approx(found)

    learned = {"policies": "learned", "max_quality_loss": 0.5, "metric": "exact_match"}
    assert "learned" in study_exits(build(ExitsConfig, {**data, **learned}))["policies"]
    promised = {"policies": "fixed_layer,entropy", "confidence": 0.9, "max_quality_loss": 0.5}
    exact = study_exits(build(ExitsConfig, {**data, **promised, "metric": "exact_match"}))
    guarantee = exact["policies"]["fixed_layer"]["calibration"]["guarantee"]
    assert guarantee["num_texts"] == round(full[2]["exact_match"] * len(DEV))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"policy": "voting"}, "The policy voting counts votes for one class"),
        ({"policies": "entropy,voting"}, "The policy voting counts votes for one class"),
        ({"metric": "average_precision"}, "metric=average_precision ranks texts"),
        ({"metric": "accuracy"}, "metric='accuracy'"),
        ({"confidence": 0.9, "max_quality_loss": 0.3}, "bounds the loss of exact_match"),
    ],
)
def test_what_exits_refuses(
    exits_model: Path, emotion_files: dict[str, str], changes: dict[str, Any], words: str
) -> None:
    data = {
        "model_name_or_path": str(exits_model),
        "validation_file": emotion_files["validation_file"],
    }
    with pytest.raises(ValueError, match=words):
        study_exits(build(ExitsConfig, {**data, **changes}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sampler": "balanced"}, "sampler=balanced fills batches class by class"),
        ({"class_weights": "balanced"}, "class_weights='balanced' weighs texts by their class"),
        ({"impl": "triton"}, "triton"),
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


def test_export_is_refused(exits_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    options = {"model_name_or_path": str(exits_model), "output_dir": str(tmp_path / "onnx")}
    with pytest.raises(ValueError, match="any number of labels.*not exported"):
        export_model(build(ExportConfig, {**options, "policy": "entropy:threshold=0.5"}))
    assert not (tmp_path / "onnx").exists()


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
            "save_steps": 0,
            "disable_tqdm": True,
        }
    )
    metrics = results["metrics"]["validation"][6]
    assert metrics["micro_f1"] > 0.7
    assert metrics["average_precision"] > 0.8
    assert len(results["gate"]) == 1
