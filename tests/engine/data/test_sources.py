import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from fusedacl.engine.data import quickstart
from fusedacl.engine.data.sources import open_directory, open_files, open_hub, open_task

CSV = "text,label\na,0\nb,1\n"


def write_task(folder: Path, *names: str, labels: Any = None) -> None:
    """A task folder with these csv files and, where given, labels.json."""
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_text(CSV, encoding="utf-8")
    if labels is not None:
        (folder / "labels.json").write_text(json.dumps(labels), encoding="utf-8")


def hub_set(num_rows: int = 4) -> datasets.DatasetDict:
    """The hub's answer for a pair task with named classes."""
    features = datasets.Features(
        {
            "sentence1": datasets.Value("string"),
            "sentence2": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["different", "same"]),
        }
    )
    texts = [f"text {row}" for row in range(num_rows)]
    rows = {"sentence1": texts, "sentence2": texts, "label": [row % 2 for row in range(num_rows)]}
    labelled = datasets.Dataset.from_dict(rows, features=features)
    unlabelled = datasets.Dataset.from_dict({**rows, "label": [-1] * num_rows}, features=features)
    return datasets.DatasetDict(train=labelled, validation=labelled, test=unlabelled)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[tuple[Any, ...]]]:
    """Makes load_dataset return or raise what it is given; returns the calls it received."""

    def install(answer: Any) -> list[tuple[Any, ...]]:
        calls = []

        def load_dataset(*arguments: Any) -> Any:
            calls.append(arguments)
            if isinstance(answer, BaseException):
                raise answer
            return answer

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    return install


def test_a_directory_gives_its_splits_and_labels(tmp_path: Path) -> None:
    write_task(tmp_path / "mine", "train.csv", "test.csv", "notes.csv", labels=["no", "yes"])
    source = open_directory(str(tmp_path), "mine")
    assert sorted(source.splits) == ["test", "train"]
    assert source.splits["train"].read()["text"].to_pylist() == ["a", "b"]
    assert source.splits["train"].where == str(tmp_path / "mine" / "train.csv")
    assert source.classes is not None
    assert (source.classes.names, source.classes.by_index) == (["no", "yes"], None)
    assert source.metrics == ("accuracy", "macro_f1")


@pytest.mark.parametrize(
    ("folder", "task_name"), [("qqp", "QQP"), ("QQP", "QQP"), ("QQP", "qqp"), ("Q-QP", "qqp")]
)
def test_a_glue_folder_has_glue_names_columns_and_metrics(
    tmp_path: Path, folder: str, task_name: str
) -> None:
    write_task(tmp_path / folder, "train.csv")
    source = open_directory(str(tmp_path), task_name)
    assert source.name == folder
    assert source.classes is not None
    assert source.classes.names == ["not_duplicate", "duplicate"]
    assert source.text_columns == ("question1", "question2")
    assert source.metrics == ("f1", "accuracy")


def test_a_glue_folder_with_another_number_of_classes_is_refused(tmp_path: Path) -> None:
    write_task(tmp_path / "mrpc", "train.csv", labels=["a", "b", "c"])
    with pytest.raises(ValueError, match=r"labels.json lists 3 classes, GLUE's mrpc has 2"):
        open_directory(str(tmp_path), "mrpc")


@pytest.mark.parametrize("task", ["stsb", "wnli"])
def test_excluded_tasks_are_refused_from_every_source(tmp_path: Path, task: str) -> None:
    write_task(tmp_path / task, "train.csv")
    with pytest.raises(ValueError, match="is excluded"):
        open_directory(str(tmp_path), task)
    with pytest.raises(ValueError, match="is excluded"):
        open_task(task)


def test_unknown_directories_and_tasks_offer_the_nearest(tmp_path: Path) -> None:
    write_task(tmp_path / "data" / "trec6", "train.csv")
    with pytest.raises(ValueError, match=r"data_dir=.*no such directory.*Did you mean 'data'"):
        open_directory(str(tmp_path / "dta"), "trec6")
    with pytest.raises(ValueError, match=r"task_name='trec'.*Did you mean 'trec6'"):
        open_directory(str(tmp_path / "data"), "trec")
    with pytest.raises(ValueError, match=r"task_name='mrcp'.*Did you mean 'mrpc'.*--data_dir"):
        open_task("mrcp")


BAD_FOLDERS = {
    "packed twice": (["train.csv", "train.tsv.gz"], "two files for the split 'train'.*keep one"),
    "packed dev": (["train.csv", "dev.csv.gz"], r"Rename the file to validation\.csv\.gz"),
    "two files": (["train.csv", "train.tsv"], "two files for the split 'train'.*keep one"),
    "misspelt": (["train.csv", "validaton.csv"], "'validaton' is not a split.*'validation'"),
    "dev": (["train.csv", "dev.csv"], r"Rename the file to validation\.csv"),
    "training": (["training.tsv", "test.csv"], "Did you mean 'train'"),
    "nothing": (["rows.csv"], r"holds no split.*train\|validation\|test.*rows\.csv"),
}


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_bad_folders(tmp_path: Path, name: str) -> None:
    files, message = BAD_FOLDERS[name]
    write_task(tmp_path / "mine", *files)
    with pytest.raises(ValueError, match=message):
        open_directory(str(tmp_path), "mine")


def test_packed_files_of_a_directory(tmp_path: Path) -> None:
    write_task(tmp_path / "mine")
    for name in ("train.csv.gz", "validation.CSV.GZ"):
        (tmp_path / "mine" / name).write_bytes(gzip.compress(CSV.encode()))
    source = open_directory(str(tmp_path), "mine")
    assert sorted(source.splits) == ["train", "validation"]
    assert source.splits["validation"].read()["text"].to_pylist() == ["a", "b"]
    assert open_files(str(tmp_path / "mine" / "train.csv.gz"), None).name == "train"


@pytest.mark.parametrize("name", ["train.csv", "test.jsonl.gz", "labels.json"])
def test_links_that_lead_nowhere_are_named(tmp_path: Path, name: str) -> None:
    write_task(tmp_path / "mine", "validation.csv")
    (tmp_path / "mine" / name).symlink_to(name)
    with pytest.raises(ValueError, match=rf"{name}' is a symbolic link that leads in a circle"):
        open_directory(str(tmp_path), "mine")
    (tmp_path / "mine" / name).unlink()
    (tmp_path / "mine" / name).symlink_to("elsewhere")
    with pytest.raises(ValueError, match=rf"{name}' is a symbolic link to 'elsewhere'"):
        open_directory(str(tmp_path), "mine")


def test_a_directory_that_is_a_link_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to("data")
    with pytest.raises(ValueError, match="data_dir=.* leads in a circle; name a directory"):
        open_directory(str(tmp_path / "data"), "mine")


def test_files_beside_a_complete_set_are_left_alone(tmp_path: Path) -> None:
    names = ["train.csv", "validation.csv", "train2.csv", "oos_validation.csv", "dev.csv"]
    write_task(tmp_path / "mine", *names)
    assert sorted(open_directory(str(tmp_path), "mine").splits) == ["train", "validation"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'["a", ', "not JSON"),
        (b'{"0": "a"}', "expected a list of class names"),
        (b"[0, 1]", "expected a list of class names"),
        (b'["a", "a"]', "'a' is listed twice"),
        (b'["a"]', "at least two classes"),
        (b'["caf\xe9", "b"]', "not UTF-8"),
    ],
)
def test_bad_labels_json(tmp_path: Path, content: bytes, message: str) -> None:
    write_task(tmp_path / "mine", "train.csv")
    (tmp_path / "mine" / "labels.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"labels\.json.*{message}"):
        open_directory(str(tmp_path), "mine")


def test_files_are_checked_at_once_and_read_later(tmp_path: Path) -> None:
    train = tmp_path / "train.csv"
    train.write_text(CSV, encoding="utf-8")
    with pytest.raises(ValueError, match=r"validation_file=.*Did you mean 'train.csv'"):
        open_files(str(train), str(tmp_path / "trian.csv"))
    source = open_files(str(train), None)
    assert list(source.splits) == ["train"]
    assert source.splits["train"].read().num_rows == 2


def test_a_glue_task_comes_from_the_hub(hub: Callable[[Any], list[tuple[Any, ...]]]) -> None:
    calls = hub(hub_set())
    source = open_task("MR-PC")
    assert calls == [("nyu-mll/glue", "mrpc")]
    assert source.name == "mrpc"
    assert source.classes is not None and source.classes.names == ["different", "same"]
    assert source.splits["test"].read()["label"].to_pylist() == [-1] * 4
    assert source.text_columns == ("sentence1", "sentence2")
    assert source.metrics == ("f1", "accuracy")


def test_an_unreachable_glue_task_is_named_as_the_user_wrote_it(
    hub: Callable[[Any], list[tuple[Any, ...]]],
) -> None:
    hub(ConnectionError("Couldn't reach"))
    with pytest.raises(ConnectionError, match=r"^task_name='rte' .*out of reach.*--data_dir"):
        open_task("rte")


def test_names_are_those_of_the_column_that_is_read(
    hub: Callable[[Any], list[tuple[Any, ...]]],
) -> None:
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.Value("int64"),
            "labels": datasets.ClassLabel(names=["joy", "anger"]),
        }
    )
    rows = {"text": ["a", "b"], "label": [1, 0], "labels": [0, 1]}
    hub(datasets.DatasetDict(train=datasets.Dataset.from_dict(rows, features=features)))
    assert open_hub("someone/feelings", None).classes is None
    named = open_hub("someone/feelings", None, label_column="labels").classes
    assert named is not None and named.names == ["joy", "anger"]
    assert open_hub("someone/feelings", None, recorded="labels").classes == named
    assert open_hub("someone/feelings", None, recorded="kind").classes is None


@pytest.mark.parametrize("name", ["dev", "val", "valid"])
def test_usual_names_of_splits_are_understood(
    hub: Callable[[Any], list[tuple[Any, ...]]], name: str
) -> None:
    rows = hub_set()
    hub(datasets.DatasetDict({"train": rows["train"], name: rows["train"], "test": rows["test"]}))
    source = open_hub("someone/pairs", None)
    assert list(source.splits) == ["train", "validation", "test"]
    assert source.notes == (f"split {name!r} of someone/pairs: read as the validation split",)
    hub(datasets.DatasetDict({**rows, name: rows["train"]}))
    source = open_hub("someone/pairs", None)
    assert sorted(source.splits) == sorted([*rows, name]) and source.notes == ()


def test_a_shuffled_hub_set_is_read_in_its_order(
    hub: Callable[[Any], list[tuple[Any, ...]]],
) -> None:
    shuffled = hub_set()["train"].select([2, 0])
    hub(datasets.DatasetDict(train=shuffled))
    table = open_hub("someone/pairs", None).splits["train"].read()
    assert table["sentence1"].to_pylist() == ["text 2", "text 0"]


def test_an_empty_hub_split_is_refused(hub: Callable[[Any], list[tuple[Any, ...]]]) -> None:
    hub(hub_set(0))
    source = open_hub("someone/pairs", None)
    with pytest.raises(ValueError, match="split 'train' of someone/pairs holds no rows"):
        source.splits["train"].read()


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (ConnectionError("Couldn't reach"), ConnectionError, "hub is out of reach.*--data_dir"),
        (
            datasets.exceptions.DatasetNotFoundError("doesn't exist"),
            ValueError,
            "dataset_name='someone/pairs': no such data set",
        ),
        (
            RuntimeError("Dataset scripts are no longer supported, but found pairs.py"),
            ValueError,
            r"dataset_name='someone/pairs'.*found pairs.*a Parquet version.*--data_dir",
        ),
        (
            ValueError("BuilderConfig 'subest' not found. Available: ['subset', 'full']"),
            ValueError,
            "dataset_config_name='subest'.*Did you mean 'subset'",
        ),
        (
            ValueError("Config name is missing.\nPlease pick one among the available: ['a', 'b']"),
            ValueError,
            r"missing\. Known: a, b",
        ),
    ],
)
def test_errors_of_the_hub_name_the_remedy(
    hub: Callable[[Any], list[tuple[Any, ...]]],
    error: Exception,
    raised: type[Exception],
    message: str,
) -> None:
    hub(error)
    with pytest.raises(raised, match=message):
        open_hub("someone/pairs", "subest")


@pytest.fixture
def datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps what `datasets` prepares inside the test's own folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.usefixtures("datasets_cache")
def test_a_local_directory_in_hub_layout(tmp_path: Path) -> None:
    layout = tmp_path / "pairs"
    for split, rows in hub_set().items():
        (layout / "data").mkdir(parents=True, exist_ok=True)
        rows.to_parquet(layout / "data" / f"{split}-00000-of-00001.parquet")
    source = open_hub(str(layout), None)
    assert source.name == "pairs"
    assert sorted(source.splits) == ["test", "train", "validation"]
    assert source.classes is not None and source.classes.names == ["different", "same"]
    assert source.splits["validation"].read()["sentence2"].to_pylist()[0] == "text 0"


@pytest.mark.usefixtures("datasets_cache")
def test_damaged_and_missing_local_directories(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"dataset_name=.*no such directory"):
        open_hub(str(tmp_path / "absent"), None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no such data set"):
        open_hub(str(tmp_path / "empty"), None)
    (tmp_path / "truncated").mkdir()
    (tmp_path / "truncated" / "train.parquet").write_bytes(b"PAR1 and nothing else")
    (tmp_path / "twice").mkdir()
    (tmp_path / "twice" / "train.jsonl").write_text('{"text": "a", "text": "b"}')
    (tmp_path / "latin").mkdir()
    (tmp_path / "latin" / "train.csv").write_bytes(b"text,label\ncaf\xe9,0\n")
    for name in ("truncated", "latin", "twice"):
        with pytest.raises(ValueError, match=r"dataset_name=.*cannot be read.*copy it again"):
            open_hub(str(tmp_path / name), None)


def test_the_quickstart_set_keeps_its_rows_and_classes() -> None:
    source = open_task("quickstart")
    rows = quickstart.quickstart_splits()
    assert source.classes is not None
    assert source.classes.names == list(quickstart.LABEL_NAMES)
    for split in ("train", "validation"):
        assert source.splits[split].read().to_pylist() == rows[split]
