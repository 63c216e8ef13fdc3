"""predict: csv or jsonl in, labels and probabilities out, in the order of the input."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from fusedacl.engine import MultiExitForSequenceClassification, PredictionConfig, predict
from fusedacl.engine.config.fields import build, parser
from fusedacl.engine.inference.prediction import _write
from fusedacl.engine.model.saved import load_tokenizer

TEXTS = ["a good dog", "the bad bird sings near the river", "a house"]


@pytest.fixture(scope="module")
def model_dir(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    model = MultiExitForSequenceClassification.from_encoder(
        str(tiny_bert), label_names=["no", "yes", "perhaps"]
    )
    model.save_pretrained(directory)
    load_tokenizer(str(tiny_bert)).save_pretrained(directory)
    return directory


def run(model: Path, source: Path, target: Path, **options: Any) -> Path:
    values = {
        "model_name_or_path": str(model),
        "input_file": str(source),
        "output_file": str(target),
        "disable_tqdm": True,
        **options,
    }
    return predict(build(PredictionConfig, values))


@pytest.fixture
def csv_file(tmp_path: Path) -> Path:
    path = tmp_path / "texts.csv"
    path.write_text("".join(f"{text}\n" for text in ["sentence", *TEXTS]), encoding="utf-8")
    return path


def test_labels_that_a_spreadsheet_would_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fusedacl")
    labels = ["=1+1", "-2", "+3.5e1", "@a", "-b", "plain", "\tc", "a=b"]
    probabilities = [[1 / 8] * 8] * 8
    for name in ("out.csv", "out.jsonl"):
        _write(tmp_path / name, labels, labels, probabilities, None)
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    guarded = ["'=1+1", "-2", "+3.5e1", "'@a", "'-b", "plain", "'\tc", "a=b"]
    assert [row["label"] for row in rows] == guarded
    assert rows[0]["probability_-2"] == "0.125"
    assert "a ' stands before the labels '=1+1', '@a', '-b', '\\tc'" in caplog.text
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert [json.loads(line)["label"] for line in lines] == labels
    assert "spreadsheet" in parser(PredictionConfig, "predict", "").format_help()


def expected_probabilities(model_dir: Path) -> torch.Tensor:
    model = MultiExitForSequenceClassification.from_pretrained(model_dir).eval()
    inputs = load_tokenizer(str(model_dir))(TEXTS, padding=True, return_tensors="pt")
    return model(**inputs).logits.softmax(dim=-1)


def test_csv_in_and_out(model_dir: Path, csv_file: Path, tmp_path: Path) -> None:
    with run(model_dir, csv_file, tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    expected = expected_probabilities(model_dir)
    names = ["no", "yes", "perhaps"]
    assert [row["label"] for row in rows] == [names[i] for i in expected.argmax(dim=-1)]
    for row, probabilities in zip(rows, expected.tolist(), strict=True):
        written = [float(row[f"probability_{name}"]) for name in names]
        assert written == pytest.approx(probabilities, abs=2e-6)


def test_jsonl_out_says_the_same(model_dir: Path, csv_file: Path, tmp_path: Path) -> None:
    jsonl = tmp_path / "texts.jsonl"
    jsonl.write_text("".join(json.dumps({"sentence": text}) + "\n" for text in TEXTS))
    lines = run(model_dir, jsonl, tmp_path / "out.jsonl").read_text().splitlines()
    with run(model_dir, csv_file, tmp_path / "out.csv").open(newline="") as file:
        for line, row in zip(lines, csv.DictReader(file), strict=True):
            values = json.loads(line)
            assert {name: str(value) for name, value in values.items()} == row


def test_named_columns(model_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "texts.csv"
    path.write_text("review,reply\na good dog,the bad bird\n", encoding="utf-8")
    columns = {"text_column": "review", "text_pair_column": "reply"}
    assert run(model_dir, path, tmp_path / "pair.csv", **columns).exists()
    with pytest.raises(ValueError, match="no column 'revue'.*Did you mean 'review'"):
        run(model_dir, path, tmp_path / "out.csv", text_column="revue")


def test_the_input_is_not_overwritten(model_dir: Path, csv_file: Path) -> None:
    before = csv_file.read_text()
    with pytest.raises(ValueError, match="is the input_file: name another file"):
        run(model_dir, csv_file, csv_file)
    assert csv_file.read_text() == before


@pytest.fixture(scope="module")
def exits_dir(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with two exits that stores a policy, calibrated in float32 with 64 tokens."""
    directory = tmp_path_factory.mktemp("exits")
    model = MultiExitForSequenceClassification.from_encoder(
        str(tiny_bert), label_names=["no", "yes"], exit_layers=[1, 2]
    )
    model.config.exit_policy = {
        "name": "entropy",
        "parameters": {"threshold": 1.0},
        "calibration": {"dtype": "float32", "max_seq_length": 64},
    }
    model.save_pretrained(directory)
    load_tokenizer(str(tiny_bert)).save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"policy": "stored"}, None),
        ({"policy": "stored", "bf16": True}, "calibrated with dtype float32, this run has dtype"),
        ({"policy": "stored", "max_seq_length": 16}, "max_seq_length 64, this run has max_seq_le"),
        # A threshold given by the user was not calibrated.
        ({"policy": "entropy:threshold=1", "bf16": True}, None),
        ({"bf16": True}, None),
    ],
)
def test_a_warning_where_inference_is_not_as_calibrated(
    exits_dir: Path,
    csv_file: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    options: dict[str, Any],
    words: str | None,
) -> None:
    assert run(exits_dir, csv_file, tmp_path / "out.csv", **options).exists()
    warnings = [
        record.getMessage()
        for record in caplog.records
        if record.name == "fusedacl"
        and record.levelname == "WARNING"
        and "calibrated" in record.getMessage()
    ]
    if words is None:
        assert warnings == []
    else:
        assert len(warnings) == 1 and words in warnings[0]


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("entropy", "needs a value for threshold"),
        ("entropy:threshold=1.5", "threshold=1.5 is out of range"),
        ("max_probability:threshold=nan", "threshold=nan is out of range"),
        ("patience:patience=2", "patience=2 can never be reached with 2 exits"),
        ("voting:votes=0", "votes=0 is out of range"),
        ("fixed_layer:layer=7", "layer=7 carries no exit"),
        ("learned:threshold=0.5", "needs the model's learned exit, which has not been trained"),
        ("sotred", "is not a policy"),
    ],
)
def test_policies_that_cannot_serve(
    exits_dir: Path, csv_file: Path, tmp_path: Path, policy: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(exits_dir, csv_file, tmp_path / "out.csv", policy=policy)
    assert not (tmp_path / "out.csv").exists()


def test_nothing_stored_and_one_exit(
    exits_dir: Path, model_dir: Path, csv_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="has one exit, on layer 2: nothing can leave early"):
        run(model_dir, csv_file, tmp_path / "out.csv", policy="stored")
    model = MultiExitForSequenceClassification.from_pretrained(exits_dir)
    model.config.exit_policy = None
    model.save_pretrained(tmp_path / "bare")
    load_tokenizer(str(exits_dir)).save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="stores no early-exit policy: run `fusedacl exits`"):
        run(tmp_path / "bare", csv_file, tmp_path / "out.csv", policy="stored")


@pytest.mark.parametrize("policy", [None, "entropy:threshold=0.5"])
def test_answers_that_are_none_are_not_written(
    exits_dir: Path, csv_file: Path, tmp_path: Path, policy: str | None
) -> None:
    model = MultiExitForSequenceClassification.from_pretrained(exits_dir)
    with torch.no_grad():
        model.backbone.get_input_embeddings().weight.fill_(float("nan"))
    model.save_pretrained(tmp_path / "broken")
    load_tokenizer(str(exits_dir)).save_pretrained(tmp_path / "broken")
    with pytest.raises(FloatingPointError, match=r"3 of 3 texts \(the first in row 1\) are NaN"):
        run(tmp_path / "broken", csv_file, tmp_path / "out.csv", policy=policy)
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_file": "out.txt"}, "must end in one of .csv, .jsonl"),
        ({"output_file": "absent/out.csv"}, "the directory 'absent' does not exist"),
        ({"output_file": None}, "output_file is missing"),
        ({"input_file": None}, "input_file is missing"),
        ({"text_pair_column": "b"}, "text_pair_column needs text_column"),
        ({"max_seq_length": 1000}, "max_seq_length=1000"),
    ],
)
def test_mistakes(model_dir: Path, csv_file: Path, tmp_path: Path, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        run(model_dir, csv_file, tmp_path / "out.csv", **options)
