"""Metrics compared with their definitions, and the evaluation of a finished run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fusedacl.engine import EvaluationConfig, evaluate
from fusedacl.engine.cli.main import main
from fusedacl.engine.config.fields import build
from fusedacl.engine.data.batching import encode
from fusedacl.engine.data.columns import TextSplit
from fusedacl.engine.inference.evaluation import evaluate_split, score
from fusedacl.engine.inference.logits import predict_logits
from fusedacl.engine.model.saved import TrainedModel
from tiny_runs import options_of, run, save_model


@pytest.fixture(scope="module")
def finished(tiny_bert: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory):
    """Output directory and results of a finished run."""
    output_dir = tmp_path_factory.mktemp("evaluation") / "run"
    options = options_of(tiny_bert, tiny_data, output_dir)
    return output_dir, run(options, num_train_epochs=1, save_steps=0)


def config_of(finished, tiny_data: Path, **options: Any) -> EvaluationConfig:
    chosen = {"model_name_or_path": str(finished[0]), "task_name": "opinions"}
    chosen |= {"data_dir": str(tiny_data), "disable_tqdm": True}
    return build(EvaluationConfig, {**chosen, **options})


def test_metrics_by_their_definitions() -> None:
    labels = np.array([0, 0, 0, 1, 1, 1, 1, 1])
    predictions = np.array([0, 0, 1, 1, 1, 1, 0, 0])
    tp, fp, fn, tn = 3, 1, 2, 2
    f1 = 2 * tp / (2 * tp + fp + fn)
    other_f1 = 2 * tn / (2 * tn + fn + fp)
    matthews = (tp * tn - fp * fn) / np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    names = ("accuracy", "f1", "macro_f1", "matthews_correlation")
    scores = score(names, predictions, labels)
    assert [scores[name] for name in names] == pytest.approx(
        [5 / 8, f1, (f1 + other_f1) / 2, matthews]
    )
    assert score(["f1"], np.zeros(4), np.ones(4)) == {"f1": 0.0}
    with pytest.raises(ValueError, match="metric='f2' is unknown. Did you mean 'f1'"):
        score(["f2"], predictions, labels)


@pytest.mark.parametrize("size", [1, 7, 256])
def test_a_finished_run_scores_what_its_training_said_at_any_batch_size(
    finished, tiny_data: Path, size: int
) -> None:
    again = evaluate(config_of(finished, tiny_data, per_device_eval_batch_size=size))
    expected = finished[1]["metrics"]["validation"][2]
    assert again["validation"][2] == pytest.approx(expected, rel=1e-5)


def test_metrics_file_and_bf16(finished, tiny_data: Path, tmp_path: Path) -> None:
    file = tmp_path / "metrics.json"
    results = evaluate(config_of(finished, tiny_data, output_file=str(file), bf16=True))
    written = json.loads(file.read_text())
    assert written["validation"]["2"] == results["validation"][2]


def test_output_file_is_checked_before_the_work(finished, tiny_data: Path) -> None:
    with pytest.raises(ValueError, match="output_file: the directory 'absent' does not exist"):
        evaluate(config_of(finished, tiny_data, output_file="absent/metrics.json"))


def test_a_directory_that_permits_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda place, mode: place != tmp_path)
    named = {"model_name_or_path": "absent", "output_file": str(tmp_path / "metrics.json")}
    with pytest.raises(ValueError, match=r"output_file='.*metrics.json' cannot be written.*does n"):
        evaluate(build(EvaluationConfig, named))


def test_nothing_to_evaluate_on(finished, tmp_path: Path) -> None:
    (tmp_path / "opinions").mkdir()
    rows = '{"sentence": "a dog", "label": -1}\n'
    (tmp_path / "opinions" / "train.jsonl").write_text(rows)
    (tmp_path / "opinions" / "validation.jsonl").write_text(rows)
    with pytest.raises(ValueError, match="has no labelled split to evaluate on"):
        evaluate(config_of(finished, tmp_path))


def test_logits_are_in_the_order_of_the_texts(finished) -> None:
    trained = TrainedModel(config_of(finished, Path()).model, None)
    texts = ["dog", "a red dog sleeps near the old house", "cat sings", "the bird"]

    def logits_of(chosen: list[str]) -> torch.Tensor:
        encoded = encode(TextSplit(chosen), trained.tokenizer, trained.max_length)
        return predict_logits(trained.model, encoded, batch_size=2, pad_token_id=0)

    together = logits_of(texts)
    assert together.shape == (1, 4, 2)
    for index, text in enumerate(texts):
        torch.testing.assert_close(together[:, index], logits_of([text])[:, 0])


def test_the_model_keeps_its_mode(finished) -> None:
    trained = TrainedModel(config_of(finished, Path()).model, None)
    encoded = encode(TextSplit(["dog"]), trained.tokenizer, trained.max_length)
    trained.model.train()
    predict_logits(trained.model, encoded, 1, pad_token_id=0)
    assert trained.model.training


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_answers_that_are_none_are_not_scored(
    finished, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], value: float
) -> None:
    trained = TrainedModel(config_of(finished, Path()).model, None)
    with torch.no_grad():
        trained.model.exits[0].classifier.weight[0, 0] = value
    save_model(trained.model, finished[0], tmp_path)
    file = tmp_path / "metrics.json"
    command = ["evaluate", "--model_name_or_path", str(tmp_path), "--output_file", str(file)]
    source = ["--task_name", "opinions", "--data_dir", str(tiny_data), "--disable_tqdm"]
    assert main([*command, *source]) == 1
    told = capsys.readouterr()
    assert "The exit on layer 2 has NaN or infinite logits for 24 of 24 texts" in told.err
    assert "Take another checkpoint" in told.err
    assert told.out == "" and not file.exists()


def test_more_classes_than_the_model_has(finished) -> None:
    trained = TrainedModel(config_of(finished, Path()).model, None)
    split = TextSplit(["dog", "cat"], None, [0, 2])
    encoded = encode(split, trained.tokenizer, trained.max_length)
    with pytest.raises(ValueError, match="label 2, but the model was trained with 2 classes"):
        evaluate_split(trained.model, encoded, ["accuracy"], 2, pad_token_id=0)
