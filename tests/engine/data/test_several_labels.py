from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from fusedacl.engine import TrainingConfig
from fusedacl.engine.data.batching import encode
from fusedacl.engine.data.dataset import TextData, load_splits
from fusedacl.engine.data.record import DataRecord
from fusedacl.engine.model.saved import load_tokenizer
from text_sets.emotions import NAMES, as_columns, emotion_rows, write_table

ROWS = emotion_rows(40, seed=1)
INDICES = [[NAMES.index(name) for name in row["labels"]] for row in ROWS]
RECORD = DataRecord(NAMES, "names", ["text"], "labels", several_labels=True, label_separator=None)


def load(model: DataRecord | None = None, **options: Any) -> TextData:
    data = TrainingConfig.create(**options).data
    return load_splits(data, needs_train=model is None, model=model)


def lists(*labels: Any) -> list[dict[str, Any]]:
    return [{"text": f"text {row}", "labels": value} for row, value in enumerate(labels)]


COLUMNS = {"label_column": "anger, joy, love,surprise"}
FORMS: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any]]] = {
    "lists, jsonl": ("train.jsonl", ROWS, {}),
    "lists, parquet": ("train.parquet", ROWS, {}),
    "joined, csv": ("train.csv", ROWS, {"label_separator": "|"}),
    "columns, csv": ("train.csv", as_columns(ROWS), COLUMNS),
    "columns, jsonl": ("train.jsonl", as_columns(ROWS), COLUMNS),
    "truth values": (
        "train.jsonl",
        [{k: v if k == "text" else bool(v) for k, v in row.items()} for row in as_columns(ROWS)],
        COLUMNS,
    ),
    "floats": (
        "train.parquet",
        [{k: v if k == "text" else float(v) for k, v in row.items()} for row in as_columns(ROWS)],
        COLUMNS,
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_alike(tmp_path: Path, form: str) -> None:
    name, rows, options = FORMS[form]
    data = load(train_file=write_table(tmp_path / name, rows), **options)
    assert data.label_names == NAMES
    assert data.several_labels
    assert data.metrics == ["micro_f1", "macro_f1", "average_precision", "exact_match"]
    assert data.columns == ["text"]
    split = data.splits["train"]
    assert split.labels == INDICES
    assert split.num_labels == len(NAMES)
    number = sum(not labels for labels in INDICES)
    assert number > 0
    assert f"{number} of 40 texts have no label" in data.notes[0]


def test_indices_into_a_list_of_names(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "labels.json").write_text('["joy", "anger", "fear"]')
    write_table(folder / "train.jsonl", lists([0, 2], [1], [2]))
    data = load(data_dir=str(tmp_path), task_name="mine")
    assert data.label_names == ["joy", "anger", "fear"]
    assert data.splits["train"].labels == [[0, 2], [1], [2]]
    assert data.record.labels_as == "indices"
    write_table(folder / "train.jsonl", lists([0, 2], [3]))
    with pytest.raises(ValueError, match=r"data row 2 = 3: the label is out of range"):
        load(data_dir=str(tmp_path), task_name="mine")


def test_features_of_the_hub_name_the_labels(tmp_path: Path) -> None:
    feature = datasets.Sequence(datasets.ClassLabel(names=["joy", "anger", "fear"]))
    features = datasets.Features({"text": datasets.Value("string"), "labels": feature})
    rows = {"text": ["a", "b"], "labels": [[2, 0], [1]]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    data = load(dataset_name=str(tmp_path))
    assert data.label_names == ["joy", "anger", "fear"]
    assert data.splits["train"].labels == [[0, 2], [1]]


def test_the_tensor_of_labels(tmp_path: Path, tiny_bert: Path) -> None:
    split = load(train_file=write_table(tmp_path / "train.jsonl", ROWS)).splits["train"]
    encoded = encode(split.head(5), load_tokenizer(str(tiny_bert)), 16)
    expected = torch.tensor([[name in row["labels"] for name in NAMES] for row in ROWS[:5]])
    assert encoded.labels is not None
    assert torch.equal(encoded.labels, expected)


ONE = [{"text": "a", "label": "joy"}, {"text": "b", "label": "anger"}]
MULTI = "multi_label_classification"
REFUSED: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {
    "lists of one": (lists(["joy"], ["anger"]), {}, "every list in .*'labels' holds one label"),
    "one label wanted": (
        lists(["joy", "anger"], []),
        {"problem_type": "single_label_classification"},
        "is one label per text, but column 'labels' holds lists",
    ),
    "several wanted, one there": (
        ONE, {"problem_type": MULTI}, "holds one label per cell: write lists.*label_separator",
    ),
    "separator nowhere": (ONE, {"label_separator": "|"}, "occurs in no label"),
    "separator beside lists": (ROWS, {"label_separator": "|"}, "no effect: the labels are lists"),
    "empty separator": (ONE, {"label_separator": ""}, "label_separator is empty"),
    "empty part": (
        [{"text": "a", "label": "joy|"}, {"text": "b", "label": "joy|anger"}],
        {"label_separator": "|"},
        "data row 1 = 'joy.': the label is empty: the label_separator '.' stands first, last",
    ),
    "printed lists": (
        [{"text": "a", "label": "['joy', 'anger']"}, {"text": "b", "label": "[]"}],
        {"label_separator": ","},
        "holds lists that were printed as text, such as .*jsonl or parquet",
    ),
    "missing list": (lists(["joy", "anger"], None), {}, "row 2: the list of labels is missing"),
    "missing label": (lists(["joy"], ["joy", None]), {}, r"data row 2: the label is missing"),
    "fractions": (lists([0.5], [1.0, 2.0]), {}, r"data row 1 = 0.5: the label is not an integer"),
    "negative": (lists([0, 1], [1, 2], [3, -1]), {}, r"data row 3 = -1: the label is negative"),
    "zeros and ones": (lists([0, 1, 1], [1, 0, 0]), {}, "are zeros and ones. Write the names"),
    "zeros and ones of two labels": (lists([0, 1], [1, 1], [0, 0]), {}, "are zeros and ones"),
    "floats": (lists([0.0, 1.0, 1.0], [1.0, 0.0, 0.0]), {}, "are zeros and ones"),
    "truth values": (lists([True, False], [False, True]), {}, "are zeros and ones"),
    "words for them": (lists(["1", "0", "0"], ["0", "1", "0"]), {}, "are zeros and ones"),
    "no label at all": (lists([], []), {}, "no text has a label"),
    "a separator twice": (
        [{"text": "a", "labels": "x||y"}, {"text": "b", "labels": "x"}],
        {"label_separator": "|"},
        "data row 1 = 'x..y': the label is empty",
    ),
    "all alike": (lists(["a", "b"], ["b", "a"]), {}, "all texts have the same labels"),
    "neither 0 nor 1": (
        [{"text": "a", "x": 1, "y": 0}, {"text": "b", "x": 2, "y": 0}],
        {"label_column": "x,y"},
        "data row 2 = 2: the value in column 'x' is neither 0 nor 1",
    ),
    "unknown column": (as_columns(ROWS), {"label_column": "anger,joi"}, "no column 'joi'.*'joy'"),
    "column twice": (as_columns(ROWS), {"label_column": "joy,joy"}, "names a column twice"),
    "one column of -1": (
        [{"text": "a", "x": 1, "y": -1}, {"text": "b", "x": 0, "y": -1}],
        {"label_column": "x,y"},
        "'y' of the 2 label columns hold -1",
    ),
    "per class": (ROWS, {"max_train_samples_per_class": 3}, "belongs to no single class"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(tmp_path: Path, case: str) -> None:
    rows, options, words = REFUSED[case]
    train = write_table(tmp_path / "train.jsonl", rows)
    with pytest.raises(ValueError, match=words):
        load(train_file=train, **options)


def test_lists_of_one_are_several_labels_if_the_options_say_so(tmp_path: Path) -> None:
    train = write_table(tmp_path / "train.jsonl", lists(["joy"], ["anger"]))
    data = load(train_file=train, problem_type=MULTI)
    assert data.splits["train"].labels == [[1], [0]]


def test_printed_lists_are_classes_if_the_options_say_so(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": "[x]"}, {"text": "b", "label": "[y]"}]
    train = write_table(tmp_path / "train.jsonl", rows)
    with pytest.raises(ValueError, match="printed as text"):
        load(train_file=train)
    data = load(train_file=train, problem_type="single_label_classification")
    assert data.label_names == ["[x]", "[y]"]


def test_a_repeated_label_counts_once_and_a_note_says_so(tmp_path: Path) -> None:
    train = write_table(tmp_path / "train.jsonl", lists(["joy", "joy"], ["anger"]))
    data = load(train_file=train)
    assert data.splits["train"].labels == [[1], [0]]
    assert "labels that are repeated in their cell count once (1)" in data.notes[0]


def test_a_model_reads_other_forms_of_its_labels(tmp_path: Path) -> None:
    for name, rows, options in FORMS.values():
        path = write_table(tmp_path / name.replace("train", "dev"), rows)
        data = load(RECORD, validation_file=path, **options)
        assert data.splits["validation"].labels == INDICES
        assert data.record.label_names == NAMES


def test_a_model_refuses_unknown_labels_and_other_columns(tmp_path: Path) -> None:
    path = write_table(tmp_path / "dev.jsonl", lists(["joy"], ["love", "lust"]))
    with pytest.raises(ValueError, match=r"data row 2 has the label 'lust'.*the model does not"):
        load(RECORD, validation_file=path)
    path = write_table(tmp_path / "dev.jsonl", as_columns(ROWS))
    with pytest.raises(ValueError, match=r"lacks 'love', 'surprise'"):
        load(RECORD, validation_file=path, label_column="anger,joy")
    path = write_table(tmp_path / "dev.jsonl", ONE)
    with pytest.raises(ValueError, match="several labels per text, but column 'label' holds one"):
        load(RECORD, validation_file=path)


def test_a_model_of_one_label_per_text_refuses_lists(tmp_path: Path) -> None:
    record = DataRecord(NAMES, "names", ["text"], "labels")
    path = write_table(tmp_path / "dev.jsonl", ROWS)
    with pytest.raises(ValueError, match="the model was trained with one"):
        load(record, validation_file=path)


def test_splits_without_labels_are_not_evaluated(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    rows = as_columns(ROWS)
    write_table(folder / "train.csv", rows)
    unlabelled = [{"text": row["text"], **dict.fromkeys(NAMES, -1)} for row in rows]
    write_table(folder / "validation.csv", unlabelled)
    data = load(data_dir=str(tmp_path), task_name="mine", **COLUMNS)
    assert data.evaluation_splits == []
    assert any("no text of validation has a label" in note for note in data.notes)


def test_a_share_is_held_out_and_the_record_tells_the_labels(tmp_path: Path) -> None:
    train = write_table(tmp_path / "train.jsonl", ROWS)
    data = load(train_file=train, validation_split_percentage=25, subset_seed=1)
    assert [len(data.splits[name]) for name in ("train", "validation")] == [30, 10]
    record = data.record
    assert DataRecord.from_dict(record.to_dict(), record.label_names, True) == record
    other = [{**row, "labels": row["labels"] or ["joy"]} for row in ROWS]
    write_table(tmp_path / "train.jsonl", other)
    again = load(train_file=train, validation_split_percentage=25, subset_seed=1).record
    assert "the labels of train are others" in again.differences(record)
    single = DataRecord(NAMES, "names", ["text"], "labels")
    assert single.differences(record)[0] == "several labels per text: True, not False"


def test_a_validation_file_of_lists_beside_joined_training_labels(tmp_path: Path) -> None:
    train = [{"text": "a", "labels": "x|y"}, {"text": "b", "labels": "y"}]
    dev = [{"text": "c", "labels": ["x"]}]
    data = load(
        train_file=write_table(tmp_path / "train.csv", train),
        validation_file=write_table(tmp_path / "dev.jsonl", dev),
        label_separator="|",
    )
    assert data.splits["validation"].labels == [[0]]


def test_a_label_that_no_text_has_is_noted(tmp_path: Path) -> None:
    rows = [{"text": "a", "x": 1, "y": 0, "z": 0}, {"text": "b", "x": 1, "y": 1, "z": 0}]
    data = load(train_file=write_table(tmp_path / "train.jsonl", rows), label_column="x,y,z")
    assert any("no text has the label 'z'" in note for note in data.notes)
