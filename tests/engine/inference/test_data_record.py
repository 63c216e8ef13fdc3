"""Commands read later data as the model's record says, or refuse it."""

from __future__ import annotations

import csv
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from fusedacl.engine import (
    EvaluationConfig,
    ExitsConfig,
    PredictionConfig,
    TrainingConfig,
    evaluate,
    predict,
    study_exits,
    train,
)
from fusedacl.engine.config.fields import build

ROWS = [(f"good dog {'the ' * (row % 3)}", "bad cat", ("1", "other")[row % 2]) for row in range(24)]
TRAINING = {"max_steps": 2, "objective": "ce", "max_seq_length": 16, "disable_tqdm": True}


def write(path: Path, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return str(path)


@pytest.fixture(scope="module")
def run(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of pairs in columns of unusual names, with classes of which one is a number."""
    directory = tmp_path_factory.mktemp("record")
    train_file = write(
        directory / "train.csv", ("second", "first", "kind"), [(b, a, c) for a, b, c in ROWS]
    )
    columns = {"text_column": "first", "text_pair_column": "second", "label_column": "kind"}
    options = {"model_name_or_path": str(tiny_bert), "output_dir": str(directory / "run")}
    options |= {"train_file": train_file, "strategy": "joint", **columns}
    train(TrainingConfig.create(**options, **TRAINING))
    return directory / "run"


def configure(kind: type, **options: Any) -> Any:
    return build(kind, options)


def scores(run: Path, **options: Any) -> dict[int, dict[str, float]]:
    config = configure(EvaluationConfig, model_name_or_path=str(run), disable_tqdm=True, **options)
    (found,) = evaluate(config).values()
    return found


def test_the_record_travels_with_model_and_checkpoints(run: Path) -> None:
    for directory in (run, run / "checkpoint-2"):
        record = json.loads((directory / "config.json").read_text())["data_record"]
        assert record["text_columns"] == ["first", "second"]
        assert (record["label_column"], record["labels_as"]) == ("kind", "names")
        assert record["splits"]["train"]["rows"] == 24
        assert record["token_types"] is True


def test_a_file_is_read_in_the_columns_and_labels_of_training(run: Path, tmp_path: Path) -> None:
    header, moved = ("kind", "second", "title", "first"), ("labels", "b", "title", "a")
    rows = [(c, b, "title", a) for a, b, c in ROWS]
    whole = scores(run, validation_file=write(tmp_path / "dev.csv", header, rows))
    other = write(tmp_path / "moved.csv", moved, rows)
    assert scores(run, validation_file=other, text_column="a", text_pair_column="b") == whole
    # A file with the class "1" alone is not read as indices.
    ones = write(tmp_path / "ones.csv", header, [row for row in rows if row[0] == "1"])
    accuracy = [found["accuracy"] for found in scores(run, validation_file=ones).values()]
    assert all(share in (0.0, 1.0) or 0 < share < 1 for share in accuracy)
    others = write(tmp_path / "others.csv", header, [row for row in rows if row[0] != "1"])
    elsewhere = [found["accuracy"] for found in scores(run, validation_file=others).values()]
    together = [(one + two) / 2 for one, two in zip(accuracy, elsewhere, strict=True)]
    assert together == pytest.approx([found["accuracy"] for found in whole.values()])


@pytest.mark.parametrize("verb", ["evaluate", "exits", "predict"])
def test_a_file_without_the_columns_of_training_is_refused(
    run: Path, tmp_path: Path, verb: str
) -> None:
    path = write(tmp_path / "dev.csv", ("first", "sentence", "kind"), ROWS)
    words = r"no column 'second': the model reads 'first', 'second', the columns are 'first', 'sen"
    model = {"model_name_or_path": str(run), "disable_tqdm": True}
    with pytest.raises(ValueError, match=words):
        if verb == "evaluate":
            evaluate(configure(EvaluationConfig, **model, validation_file=path))
        elif verb == "exits":
            study_exits(configure(ExitsConfig, **model, validation_file=path))
        else:
            output = str(tmp_path / "out.csv")
            predict(configure(PredictionConfig, **model, input_file=path, output_file=output))
    assert not (tmp_path / "out.csv").exists()


def test_labels_of_no_class_are_refused_in_words(run: Path, tmp_path: Path) -> None:
    path = write(
        tmp_path / "dev.csv", ("first", "second", "kind"), [(a, b, "0") for a, b, _ in ROWS]
    )
    with pytest.raises(
        ValueError, match=r"the label '0', which the model does not have \(labels are read as names"
    ):
        scores(run, validation_file=path)


def test_a_named_split_is_scored(run: Path, tmp_path: Path) -> None:
    for name, number in (("validation", 4), ("test", 8)):
        write(tmp_path / "kinds" / f"{name}.csv", ("first", "second", "kind"), ROWS[:number])
    data = {"data_dir": str(tmp_path), "task_name": "kinds"}
    config = configure(EvaluationConfig, model_name_or_path=str(run), split="test", **data)
    assert list(evaluate(config)) == ["test"]
    with pytest.raises(
        ValueError, match="split='tset': kinds has no such split. Did you mean 'test'"
    ):
        scores(run, split="tset", **data)
    write(tmp_path / "kinds" / "test.csv", ("first", "second", "kind"), [(*ROWS[0][:2], "-1")])
    with pytest.raises(ValueError, match=r"split='test': every label is -1"):
        scores(run, split="test", **data)


@pytest.mark.parametrize("verb", ["evaluate", "predict"])
def test_truncated_texts_are_counted(run: Path, tmp_path: Path, verb: str, caplog) -> None:
    rows = [("good dog " * 20, "bad cat", "1"), *ROWS[:3]]
    path = write(tmp_path / "long.csv", ("first", "second", "kind"), rows)
    caplog.set_level(logging.INFO)
    if verb == "evaluate":
        scores(run, validation_file=path)
    else:
        options = {"model_name_or_path": str(run), "output_file": str(tmp_path / "out.csv")}
        predict(configure(PredictionConfig, input_file=path, **options))
    assert "1 of 4 texts are longer than max_seq_length=16 and lose their ends" in caplog.text


def test_a_model_of_an_earlier_version_says_what_its_record_lacks(
    run: Path, tmp_path: Path, caplog
) -> None:
    old = tmp_path / "old"
    shutil.copytree(run, old)
    config = json.loads((old / "config.json").read_text())
    del config["data_record"]
    (old / "config.json").write_text(json.dumps(config))
    path = write(tmp_path / "dev.csv", ("first", "second", "label"), ROWS)
    caplog.set_level(logging.INFO)
    scores(old, validation_file=path)
    assert "was saved without a record of its data (columns, how labels are written)" in caplog.text


def test_f1_is_of_the_class_that_the_task_means(tiny_bert: Path, tmp_path: Path) -> None:
    rows = [(a, b, ("equivalent", "not_equivalent")[row % 2]) for row, (a, b, _) in enumerate(ROWS)]
    folder = tmp_path / "data" / "mrpc"
    for split in ("train", "validation"):
        write(folder / f"{split}.csv", ("sentence1", "sentence2", "label"), rows)
    (folder / "labels.json").write_text('["equivalent", "not_equivalent"]')
    data = {"data_dir": str(tmp_path / "data"), "task_name": "mrpc"}
    run = tmp_path / "run"
    options = {"model_name_or_path": str(tiny_bert), "output_dir": str(run), **data, **TRAINING}
    results = train(TrainingConfig.create(**options))
    input_file, output_file = str(folder / "validation.csv"), str(tmp_path / "out.csv")
    model = {"model_name_or_path": str(run), "disable_tqdm": True}
    predict(configure(PredictionConfig, **model, input_file=input_file, output_file=output_file))
    with Path(output_file).open() as file:
        predicted = [row["label"] == "equivalent" for row in csv.DictReader(file)]
    true = [name == "equivalent" for _, _, name in rows]
    found = sum(p and t for p, t in zip(predicted, true, strict=True))
    f1 = 2 * found / (sum(predicted) + sum(true))
    (found,) = results["metrics"]["validation"].values()
    assert found["f1"] == pytest.approx(f1)
    assert scores(run, **data)[2]["f1"] == pytest.approx(f1)
    # A model that was trained on the same texts under another name has no such class.
    config = json.loads((run / "config.json").read_text())
    config["data_record"]["f1_class"] = None
    (run / "config.json").write_text(json.dumps(config))
    assert scores(run, **data)[2]["f1"] == pytest.approx(f1)
