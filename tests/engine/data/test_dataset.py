import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
from fusedacl.engine import TrainingConfig
from fusedacl.engine.config.sections import DataOptions, EvaluationDataOptions
from fusedacl.engine.data.columns import TextSplit
from fusedacl.engine.data.dataset import TextData, load_splits, read_unlabelled
from fusedacl.engine.data.record import DataRecord


def load(
    needs_train: bool = True, label_names: list[str] | None = None, **options: Any
) -> TextData:
    data = TrainingConfig.create(**options).data
    model = None if label_names is None else DataRecord(label_names)
    return load_splits(data, needs_train=needs_train, model=model)


def write_csv(path: Path, *labels: Any) -> str:
    """A csv file with one text per label."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"text {row},{label}" for row, label in enumerate(labels)]
    path.write_text("\n".join(["text,label", *lines]), encoding="utf-8")
    return str(path)


def write_task(tmp_path: Path, **splits: list[Any]) -> dict[str, Any]:
    """A task folder in tmp_path; returns the arguments that name it."""
    for split, labels in splits.items():
        write_csv(tmp_path / "mine" / f"{split}.csv", *labels)
    return {"data_dir": str(tmp_path), "task_name": "mine"}


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("task", "columns", "num_classes", "sizes", "metrics"),
    [
        ("mrpc", 2, 2, {"train": 3668, "validation": 408}, ["f1", "accuracy"]),
        ("rte", 2, 2, {"train": 2490, "validation": 277}, ["accuracy"]),
        ("trec6", 1, 6, {"train": 5452, "test": 500}, ["accuracy", "macro_f1"]),
        ("banking77", 1, 77, {"train": 10003, "test": 3080}, ["accuracy", "macro_f1"]),
        ("sst2", 1, 2, {"train": 67349, "validation": 872}, ["accuracy"]),
    ],
)
def test_real_sets(
    real_data: Path,
    task: str,
    columns: int,
    num_classes: int,
    sizes: dict[str, int],
    metrics: list[str],
) -> None:
    data = load(task_name=task, data_dir=str(real_data))
    assert data.name == task
    assert {name: len(split) for name, split in data.splits.items()} == sizes
    assert data.evaluation_splits == [name for name in sizes if name != "train"]
    assert len(data.columns) == columns
    assert len(data.label_names) == num_classes
    assert data.metrics == metrics
    labels = data.splits["train"].labels
    assert labels is not None and set(labels) == set(range(num_classes))
    expected = [f"{task} has no validation split: evaluating on test"] if "test" in sizes else []
    assert data.notes == expected


@pytest.mark.real_data
def test_real_mnli_is_evaluated_matched_and_mismatched(real_data: Path) -> None:
    data = load(
        task_name="mnli", data_dir=str(real_data), max_train_samples=100, max_eval_samples=50
    )
    assert data.evaluation_splits == ["validation_matched", "validation_mismatched"]
    assert [len(data.splits[name]) for name in ("train", *data.evaluation_splits)] == [100, 50, 50]
    assert data.columns == ["premise", "hypothesis"]
    assert data.label_names == ["entailment", "neutral", "contradiction"]


def test_the_quickstart_set_is_a_pair_set_of_three_classes() -> None:
    data = load(task_name="quickstart", max_train_samples=60)
    assert data.columns == ["sentence1", "sentence2"]
    assert data.label_names == ["entailment", "neutral", "contradiction"]
    assert data.evaluation_splits == ["validation"]
    labels = data.splits["train"].labels
    assert labels is not None and set(labels) == {0, 1, 2}
    assert len(labels) == 60
    assert data.notes == []


def test_files_share_the_classes_of_the_train_file(tmp_path: Path) -> None:
    train = write_csv(tmp_path / "train.csv", "pos", "neg", "mixed")
    validation = write_csv(tmp_path / "dev.csv", "pos", "neg")
    data = load(train_file=train, validation_file=validation)
    assert data.label_names == ["mixed", "neg", "pos"]
    assert data.splits == {
        "train": TextSplit(["text 0", "text 1", "text 2"], None, [2, 1, 0]),
        "validation": TextSplit(["text 0", "text 1"], None, [2, 1]),
    }
    assert (data.columns, data.evaluation_splits, data.notes) == (["text"], ["validation"], [])


def test_a_validation_label_that_train_lacks_is_refused(tmp_path: Path) -> None:
    train = write_csv(tmp_path / "train.csv", "pos", "neg")
    validation = write_csv(tmp_path / "dev.csv", "neg", "poss")
    with pytest.raises(ValueError, match=r"dev.csv.*row 2 has .*'poss'.*Did you mean 'pos'"):
        load(train_file=train, validation_file=validation)


def test_train_file_alone_is_not_evaluated_and_says_so(tmp_path: Path) -> None:
    data = load(train_file=write_csv(tmp_path / "train.csv", 0, 1))
    assert data.evaluation_splits == []
    assert data.notes == ["train comes without a labelled validation split: no evaluation"]


def test_integer_labels_with_gaps_become_classes_and_a_note(tmp_path: Path) -> None:
    train = write_csv(tmp_path / "train.csv", 1, 5, 3, 5)
    data = load(train_file=train)
    assert data.label_names == ["1", "3", "5"]
    assert data.splits["train"].labels == [0, 2, 1, 2]
    assert "labels [1, 3, 5] become the classes 0..2" in data.notes[0]


def test_both_sides_use_the_same_columns(tmp_path: Path) -> None:
    train, validation = tmp_path / "train.jsonl", tmp_path / "dev.jsonl"
    train.write_text(
        "\n".join(json.dumps({"left": "a", "right": "b", "label": row}) for row in (0, 1))
    )
    validation.write_text(json.dumps({"left": "a", "rigth": "b", "label": 0}))
    with pytest.raises(ValueError, match=r"dev.jsonl.*no column 'right'.*Did you mean 'rigth'"):
        load(train_file=str(train), validation_file=str(validation))


def test_both_sides_use_the_same_label_column(tmp_path: Path) -> None:
    train, validation = tmp_path / "train.jsonl", tmp_path / "dev.jsonl"
    rows = [{"text": "a", "labels": 0}, {"text": "b", "labels": 1}]
    train.write_text("\n".join(map(json.dumps, rows)))
    validation.write_text("\n".join(json.dumps({**row, "label": 1}) for row in rows))
    files = {"train_file": str(train), "validation_file": str(validation)}
    data = load(**files)
    assert (data.splits["validation"].labels, data.record.label_column) == ([0, 1], "labels")
    assert data.notes == []
    assert load(**files, needs_train=False).splits["validation"].labels == [0, 1]
    validation.write_text(json.dumps({"text": "a", "label": 1}))
    (note,) = load(**files).notes
    assert note.endswith("dev.jsonl': takes 'label' for the labels: there is no 'labels'")
    model = replace(data.record, label_column="kind")
    (note,) = load_splits(TrainingConfig.create(**files).data, needs_train=False, model=model).notes
    assert note.endswith("dev.jsonl': takes 'label' for the labels: there is no 'kind'")


@pytest.mark.parametrize(
    ("splits", "evaluated", "note"),
    [
        ({"validation": [1, 0], "test": [0, 1]}, ["validation"], None),
        ({"test": [0, 1]}, ["test"], "mine has no validation split: evaluating on test"),
        ({"test": [-1, -1]}, [], "mine: test is unlabelled: not evaluated on"),
        (
            {"validation": [-1, -1], "test": [0, 1]},
            ["test"],
            "mine: every label of validation is -1: not evaluated on",
        ),
        ({}, [], "mine comes without a labelled validation split: no evaluation"),
    ],
)
def test_which_split_is_evaluated(
    tmp_path: Path, splits: dict[str, list[int]], evaluated: list[str], note: str | None
) -> None:
    data = load(**write_task(tmp_path, train=[0, 1, 1], **splits))
    assert data.evaluation_splits == evaluated
    assert set(data.splits) == {"train", *evaluated}
    assert note in data.notes if note else data.notes == []


def test_a_test_split_without_labels_column_is_not_evaluated(tmp_path: Path) -> None:
    arguments = write_task(tmp_path, train=[0, 1])
    (tmp_path / "mine" / "test.csv").write_text("text\na\n", encoding="utf-8")
    assert load(**arguments).evaluation_splits == []


def test_a_validation_split_without_label_column_is_refused(tmp_path: Path) -> None:
    arguments = write_task(tmp_path, train=[0, 1])
    (tmp_path / "mine" / "validation.csv").write_text("text,lable\na,0\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"validation.csv: no label column.*Did you mean 'lable'"):
        load(**arguments)


def test_sample_limits_take_the_first_rows(tmp_path: Path) -> None:
    arguments = write_task(tmp_path, train=[0, 1, 1, 2], validation=[1, 0])
    data = load(**arguments, max_train_samples=2, max_eval_samples=1)
    assert data.splits["train"].first == ["text 0", "text 1"]
    assert data.splits["validation"].labels == [1]
    # The classes are those of the whole split.
    assert data.label_names == ["0", "1", "2"]
    assert len(load(**arguments, max_train_samples=99).splits["train"]) == 4


def test_evaluation_alone_reads_no_training_texts(tmp_path: Path) -> None:
    arguments = write_task(tmp_path, train=["a", "b", "c"], validation=["c", "b"])
    data = load(**arguments, needs_train=False)
    assert set(data.splits) == {"validation"}
    assert data.splits["validation"].labels == [2, 1]
    # A model that knows its classes does without the train split.
    (tmp_path / "mine" / "train.csv").unlink()
    data = load(**arguments, needs_train=False, label_names=["c", "b", "a"])
    assert data.splits["validation"].labels == [0, 1]
    with pytest.raises(ValueError, match="label_names must say which classes"):
        load(**arguments, needs_train=False)


def test_the_classes_of_a_model_must_be_those_of_the_task(tmp_path: Path) -> None:
    arguments = write_task(tmp_path, train=[0, 1], validation=[0, 1])
    (tmp_path / "mine" / "labels.json").write_text('["no", "yes"]')
    data = load(**arguments, needs_train=False, label_names=["no", "yes"])
    assert data.label_names == ["no", "yes"]
    with pytest.raises(ValueError, match=r"label_names=\['yes', 'no'\].*labels.json"):
        load(**arguments, needs_train=False, label_names=["yes", "no"])


def test_listed_classes_that_are_numbers_stay_indices_for_a_model(tmp_path: Path) -> None:
    arguments = write_task(tmp_path, train=[0, 1, 2], validation=[0, 2])
    (tmp_path / "mine" / "labels.json").write_text('["1", "2", "3"]')
    data = load(**arguments, needs_train=False, label_names=["1", "2", "3"])
    assert data.splits["validation"].labels == [0, 2]


def test_integer_labels_for_a_model_are_indices_unless_its_classes_are_numbers(
    tmp_path: Path,
) -> None:
    validation = write_csv(tmp_path / "dev.csv", 2, 1)

    def read(names: list[str]) -> list[int] | None:
        options = DataOptions(validation_file=validation)  # as `fusedacl evaluate` has them
        data = load_splits(options, needs_train=False, model=DataRecord(names))
        return data.splits["validation"].labels

    assert read(["neg", "mixed", "pos"]) == [2, 1]
    assert read(["1", "2", "3"]) == [1, 0]


def test_a_hub_set_from_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["ham", "spam"])}
    )
    rows = {"text": ["a", "b"], "label": [1, 0]}
    splits = datasets.DatasetDict(
        train=datasets.Dataset.from_dict(rows, features=features),
        test=datasets.Dataset.from_dict({**rows, "label": [-1, -1]}, features=features),
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments: splits)
    data = load(dataset_name="someone/mail", dataset_config_name="plain")
    assert data.name == "plain"
    assert data.label_names == ["ham", "spam"]
    assert data.splits == {"train": TextSplit(["a", "b"], None, [1, 0])}
    assert "plain: test is unlabelled: not evaluated on" in data.notes


def test_a_hub_set_is_evaluated_in_the_label_column_of_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["de", "fr"]),
            "kind": datasets.ClassLabel(names=["ham", "spam"]),
        }
    )
    rows = {"text": ["a", "b"], "label": [1, 1], "kind": [1, 0]}
    rows = datasets.Dataset.from_dict(rows, features=features)
    splits = datasets.DatasetDict(train=rows, dev=rows, test=rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments: splits)
    trained = load(dataset_name="someone/mail", label_column="kind")
    for options, split in ({}, "validation"), ({"split": "dev"}, "dev"):
        options = EvaluationDataOptions(dataset_name="someone/mail", **options)
        data = load_splits(options, needs_train=False, model=trained.record)
        assert list(data.splits) == [split]
        assert (data.label_names, data.splits[split].labels) == (["ham", "spam"], [1, 0])
        assert data.notes == ["split 'dev' of someone/mail: read as the validation split"]


def test_a_hub_set_without_train_names_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    splits = {"tests": datasets.Dataset.from_dict({"text": ["a"], "label": [0]})}
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments: splits)
    with pytest.raises(ValueError, match=r"mail has no train split. Known: tests"):
        load(dataset_name="someone/mail")


CONTRADICTIONS = {
    "task and file": ({"task_name": "mrpc", "train_file": "a.csv"}, "task_name and train_file are"),
    "task and hub": ({"task_name": "mrpc", "dataset_name": "x"}, "task_name and dataset_name are"),
    "hub and file": (
        {"dataset_name": "x", "validation_file": "a.csv"},
        "dataset_name and validation_file are given together",
    ),
    "config alone": ({"task_name": "mrpc", "dataset_config_name": "x"}, "needs a dataset_name"),
    "directory alone": ({"data_dir": "x"}, "data_dir='x' needs task_name"),
    "directory and hub": ({"data_dir": "x", "dataset_name": "y"}, "data_dir='x' needs task_name"),
    "quickstart": ({"task_name": "quickstart", "data_dir": "x"}, "leave data_dir out"),
    "nothing": ({}, "No data: give task_name"),
    "no train samples": ({"task_name": "mrpc", "max_train_samples": 0}, "max_train_samples=0"),
    "no eval samples": ({"task_name": "mrpc", "max_eval_samples": -1}, "max_eval_samples=-1"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictory_arguments(name: str) -> None:
    arguments, message = CONTRADICTIONS[name]
    with pytest.raises(ValueError, match=message):
        load(**arguments)


def test_nothing_to_train_on(tmp_path: Path) -> None:
    validation = write_csv(tmp_path / "dev.csv", 0, 1)
    with pytest.raises(ValueError, match="train_file is missing"):
        load(validation_file=validation)
    with pytest.raises(ValueError, match="mine has no train split"):
        load(**write_task(tmp_path, validation=[0, 1]))


@pytest.mark.parametrize(
    ("labels", "limit", "message"),
    [
        ([0, 0], None, "every label is 0; training needs at least two classes"),
        ([0, 0, 1], 2, r"in its first 2 rows \(max_train_samples"),
        ([-1, -1], None, "unlabelled"),
    ],
)
def test_a_single_class_cannot_be_trained(
    tmp_path: Path, labels: list[int], limit: int | None, message: str
) -> None:
    train = write_csv(tmp_path / "train.csv", *labels)
    with pytest.raises(ValueError, match=message):
        load(train_file=train, max_train_samples=limit)


@pytest.mark.parametrize(("labels", "message"), [([1, 1], "same class"), ([-1, -1], "is -1")])
def test_a_single_class_of_a_listed_set_cannot_be_trained(
    tmp_path: Path, labels: list[int], message: str
) -> None:
    arguments = write_task(tmp_path, train=labels)
    (tmp_path / "mine" / "labels.json").write_text('["no", "yes"]')
    with pytest.raises(ValueError, match=rf"train.csv: .*{message}"):
        load(**arguments)


def test_out_of_range_label_names_file_row_and_list(tmp_path: Path) -> None:
    arguments = write_task(tmp_path, train=[0, 1, 2])
    (tmp_path / "mine" / "labels.json").write_text('["no", "yes"]')
    with pytest.raises(ValueError, match=r"train.csv: data row 3 = 2.*labels.json lists 2 classes"):
        load(**arguments)


def test_texts_to_be_labelled(tmp_path: Path) -> None:
    path = tmp_path / "new.csv"
    path.write_text("id,question,answer\n1,who,me\n2,what,\n", encoding="utf-8")
    assert read_unlabelled(path) == TextSplit(["who", "what"], ["me", ""])
    assert read_unlabelled(path, ["question"]) == TextSplit(["who", "what"])
    with pytest.raises(ValueError, match=r"input_file=.*no column 'anser'.*Did you mean 'answer'"):
        read_unlabelled(path, ["question", "anser"])
    with pytest.raises(ValueError, match=r"data row 2: the text is empty \('answer'\)"):
        read_unlabelled(path, ["answer"])
    with pytest.raises(ValueError, match="name one text column, or two"):
        read_unlabelled(path, ["id", "question", "answer"])
    with pytest.raises(ValueError, match=r"input_file=.*Did you mean 'new.csv'"):
        read_unlabelled(tmp_path / "mew.csv")


def test_labels_of_texts_to_be_labelled_are_not_read(tmp_path: Path) -> None:
    assert read_unlabelled(write_csv(tmp_path / "new.csv", "spam", "ham")).labels is None
