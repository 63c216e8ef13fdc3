"""Metrics, thresholds and early exit where texts may have several labels."""

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
    evaluate,
    export_model,
    predict,
    study_exits,
)
from fusedacl.engine.config.fields import build
from fusedacl.engine.inference.evaluation import score
from fusedacl.engine.model.exit_policies import ExitReading, MaximumProbability
from fusedacl.engine.model.saved import load_tokenizer, load_trained
from sklearn.metrics import average_precision_score, f1_score
from text_sets.emotions import DEV, NAMES


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
    assert found["average_precision"] == pytest.approx(expected)
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
    emotion_model: Path, emotion_files: dict[str, str], tmp_path: Path
) -> None:
    named = {"model_name_or_path": str(emotion_model), "disable_tqdm": True}
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
    emotion_model: Path, emotion_files: dict[str, str]
) -> None:
    model = load_trained(str(emotion_model)).eval()
    texts = [row["text"] for row in DEV]
    batch = load_tokenizer(str(emotion_model))(texts, return_tensors="pt", padding=True)
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
    emotion_model: Path, emotion_files: dict[str, str], tmp_path: Path, caplog: Any
) -> None:
    caplog.set_level(logging.INFO, "fusedacl")
    data = {
        "model_name_or_path": str(emotion_model),
        "validation_file": emotion_files["validation_file"],
        "disable_tqdm": True,
    }
    study = {"max_quality_loss": 0.5, "policy": "entropy"}
    results = study_exits(build(ExitsConfig, {**data, **study}))
    assert results["metric"] == "micro_f1"
    assert set(results["policies"]) == {
        "max_probability", "entropy", "fixed_layer",
    }  # fmt: skip
    assert "patience: left out, as with 2 exits no text leaves early" in caplog.text
    assert "voting: left out, as a text may have several labels" in caplog.text
    full = evaluate(build(EvaluationConfig, data))["validation"]
    assert results["full_score"] == full[2]["micro_f1"]
    files = {"input_file": data["validation_file"], "output_file": str(tmp_path / "out.jsonl")}
    predict(
        build(
            PredictionConfig,
            {"model_name_or_path": str(emotion_model), **files, "policy": "stored"},
        )
    )
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert {row["exit_layer"] for row in rows} <= {1, 2}
    found = results["policies"]["entropy"]["calibration"]["score"]
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
    emotion_model: Path, emotion_files: dict[str, str], changes: dict[str, Any], words: str
) -> None:
    data = {
        "model_name_or_path": str(emotion_model),
        "validation_file": emotion_files["validation_file"],
    }
    with pytest.raises(ValueError, match=words):
        study_exits(build(ExitsConfig, {**data, **changes}))


def test_export_is_refused(emotion_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    options = {"model_name_or_path": str(emotion_model), "output_dir": str(tmp_path / "onnx")}
    with pytest.raises(ValueError, match="any number of labels.*not exported"):
        export_model(build(ExportConfig, {**options, "policy": "entropy:threshold=0.5"}))
    assert not (tmp_path / "onnx").exists()
