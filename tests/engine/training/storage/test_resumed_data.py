"""A run resumes with the data that it was started with, or is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import run

Rows = list[dict[str, str]]


def rename(rows: Rows) -> None:
    for row in rows:
        row["label"] = row["label"].replace("negative", "unhappy")


def swap(rows: Rows) -> None:
    rows[0]["label"], rows[1]["label"] = rows[1]["label"], rows[0]["label"]


def rewrite(rows: Rows) -> None:
    rows[5]["sentence"] += " dog"


def drop(rows: Rows) -> None:
    rows.pop()


def move(rows: Rows) -> None:
    for row in rows:
        row["text"] = row.pop("sentence")


CHANGES: dict[str, tuple[str, Callable[[Rows], None], str]] = {
    "class renamed": ("both", rename, "the classes are .*'unhappy'.*, not .*'negative'"),
    "labels changed": ("train", swap, "the labels of train are others"),
    "text changed": ("train", rewrite, "the texts of train are others"),
    "row dropped": ("train", drop, "train has 63 rows, not 64"),
    "column renamed": ("both", move, "the text columns are .*'text'.*, not .*'sentence'"),
    "validation changed": ("validation", rewrite, "the texts of validation are others"),
}


@pytest.fixture(scope="module")
def started(
    tiny_bert: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A run whose last checkpoint is lost, and its options."""
    from tiny_runs import options_of

    directory = tmp_path_factory.mktemp("resumed")
    shutil.copytree(tiny_data, directory / "data")
    options = options_of(tiny_bert, directory / "data", directory / "run", objective="ce")
    options |= {"num_train_epochs": 2, "save_total_limit": None}
    run(options)
    shutil.rmtree(directory / "run" / "checkpoint-4")
    return directory, options


@pytest.mark.parametrize("name", CHANGES)
def test_changed_data_are_refused(
    started: tuple[Path, dict[str, Any]], tiny_data: Path, name: str
) -> None:
    directory, options = started
    split, change, words = CHANGES[name]
    for file in (tiny_data / "opinions").iterdir():
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        if split in (file.stem, "both"):
            change(rows)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / "data" / "opinions" / file.name).write_text(lines)
    with pytest.raises(ValueError, match=rf"checkpoint-2' was trained on other data: now {words}"):
        run(options, resume_from_checkpoint="latest")


def test_the_same_data_in_another_format_resume(
    started: tuple[Path, dict[str, Any]], tiny_data: Path
) -> None:
    directory, options = started
    folder = directory / "data" / "opinions"
    shutil.copytree(tiny_data / "opinions", folder, dirs_exist_ok=True)
    train = folder / "train.jsonl"
    rows = [json.loads(line) for line in train.read_text().splitlines()]
    (folder / "train.csv").write_text(
        "".join(
            f"{line}\n"
            for line in ["sentence,label", *(f"{row['sentence']},{row['label']}" for row in rows)]
        )
    )
    train.unlink()
    assert run(options, resume_from_checkpoint="latest")["metrics"]["validation"]
