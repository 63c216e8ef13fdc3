"""predict: csv or jsonl in, labels and probabilities out, in the order of the input."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fusedacl.engine import MultiExitForSequenceClassification, PredictionConfig, predict
from fusedacl.engine.config.fields import build, parser
from fusedacl.engine.inference.prediction import _write
from fusedacl.engine.model.saved import load_tokenizer
from tiny_runs import save_model

TEXTS = ["a good dog", "the bad bird sings near the river", "a house"]
NAMES = ["no", "yes", "perhaps"]
Run = Callable[..., Path]


@pytest.fixture(scope="module")
def model_dir(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = MultiExitForSequenceClassification.from_encoder(str(tiny_bert), label_names=NAMES)
    return save_model(model, tiny_bert, tmp_path_factory.mktemp("model"))


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


@pytest.fixture
def run(csv_file: Path, tmp_path: Path) -> Run:
    """Predict with a model: `TEXTS` unless the options name another file."""
    files = {"input_file": str(csv_file), "output_file": str(tmp_path / "out.csv")}

    def run(model: Path, **options: Any) -> Path:
        values = {"model_name_or_path": str(model), "disable_tqdm": True, **files, **options}
        return predict(build(PredictionConfig, values))

    return run


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def test_csv_in_and_out(run: Run, model_dir: Path) -> None:
    rows = rows_of(run(model_dir))
    model = MultiExitForSequenceClassification.from_pretrained(model_dir).eval()
    inputs = load_tokenizer(str(model_dir))(TEXTS, padding=True, return_tensors="pt")
    expected = model(**inputs).logits.softmax(dim=-1)
    assert [row["label"] for row in rows] == [NAMES[i] for i in expected.argmax(dim=-1)]
    for row, probabilities in zip(rows, expected.tolist(), strict=True):
        written = [float(row[f"probability_{name}"]) for name in NAMES]
        assert written == pytest.approx(probabilities, abs=2e-6)


def test_jsonl_out_says_the_same(run: Run, model_dir: Path, tmp_path: Path) -> None:
    jsonl = tmp_path / "texts.jsonl"
    jsonl.write_text("".join(json.dumps({"sentence": text}) + "\n" for text in TEXTS))
    files = {"input_file": str(jsonl), "output_file": str(tmp_path / "out.jsonl")}
    lines = run(model_dir, **files).read_text().splitlines()
    for line, row in zip(lines, rows_of(run(model_dir)), strict=True):
        assert {name: str(value) for name, value in json.loads(line).items()} == row


def test_named_columns(run: Run, model_dir: Path, csv_file: Path) -> None:
    csv_file.write_text("review,reply\na good dog,the bad bird\n", encoding="utf-8")
    assert run(model_dir, text_column="review", text_pair_column="reply").exists()
    with pytest.raises(ValueError, match="no column 'revue'.*Did you mean 'review'"):
        run(model_dir, text_column="revue")


def test_the_input_is_not_overwritten(run: Run, model_dir: Path, csv_file: Path) -> None:
    before = csv_file.read_text()
    with pytest.raises(ValueError, match="is the input_file: name another file"):
        run(model_dir, output_file=str(csv_file))
    assert csv_file.read_text() == before


@pytest.fixture(scope="module")
def exits_dir(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with two exits that stores a policy, calibrated in float32 with 64 tokens."""
    model = MultiExitForSequenceClassification.from_encoder(
        str(tiny_bert), label_names=["no", "yes"], exit_layers=[1, 2]
    )
    model.config.exit_policy = {
        "name": "entropy",
        "parameters": {"threshold": 1.0},
        "calibration": {"dtype": "float32", "max_seq_length": 64},
    }
    return save_model(model, tiny_bert, tmp_path_factory.mktemp("exits"))


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
    run: Run,
    exits_dir: Path,
    caplog: pytest.LogCaptureFixture,
    options: dict[str, Any],
    words: str | None,
) -> None:
    assert run(exits_dir, **options).exists()
    found = [record for record in caplog.record_tuples if "calibrated" in record[2]]
    assert [record[:2] for record in found] == [("fusedacl", logging.WARNING)] * (words is not None)
    assert all(words in text for _, _, text in found)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("entropy:threshold=1.5", "threshold=1.5 is out of range"),
        ("patience:patience=2", "patience=2 can never be reached with 2 exits"),
        ("learned:threshold=0.5", "needs the model's learned exit, which has not been trained"),
        ("sotred", "is not a policy"),
    ],
)
def test_policies_that_cannot_serve(run: Run, exits_dir: Path, policy: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(exits_dir, policy=policy)


def test_the_output_is_replaced_when_it_is_whole(
    run: Run, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, link = tmp_path / "kept.csv", tmp_path / "link.csv"
    link.symlink_to(kept)
    run(model_dir, output_file=str(link))
    assert link.is_symlink() and len(rows_of(kept)) == len(TEXTS)
    before = kept.read_bytes()

    def full_disk(*_: Any) -> Any:
        raise OSError("No space left on device")

    monkeypatch.setattr(csv, "writer", full_disk)
    with pytest.raises(OSError, match="No space left"):
        run(model_dir, output_file=str(kept))
    assert kept.read_bytes() == before
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(ValueError, match="folder.csv' is a directory: name a file"):
        run(model_dir, output_file=str(tmp_path / "folder.csv"))


def test_a_directory_that_permits_no_file_is_refused_before_the_work(
    run: Run, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda place, mode: place != tmp_path)
    monkeypatch.setattr("fusedacl.engine.inference.prediction.TrainedModel", None)
    with pytest.raises(ValueError, match=r"output_file='.*out.csv' cannot be written.*permissions"):
        run(model_dir)


@pytest.mark.parametrize("policy", [None, "entropy:threshold=0.5"])
def test_answers_that_are_none_are_not_written(
    run: Run, exits_dir: Path, tmp_path: Path, policy: str | None
) -> None:
    model = MultiExitForSequenceClassification.from_pretrained(exits_dir)
    with torch.no_grad():
        model.backbone.get_input_embeddings().weight.fill_(float("nan"))
    broken = save_model(model, exits_dir, tmp_path / "broken")
    with pytest.raises(FloatingPointError, match=r"3 of 3 texts \(the first in row 1\) are NaN"):
        run(broken, policy=policy)
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
def test_mistakes(run: Run, model_dir: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(model_dir, **options)
