"""Few texts per class, and a validation split that is held out of the training split."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from fusedacl.engine import TrainingConfig
from fusedacl.engine.data import load_splits
from fusedacl.engine.data.columns import TextSplit
from fusedacl.engine.data.dataset import TextData


@pytest.fixture
def train_file(tmp_path: Path) -> str:
    """30 texts of class a, 20 of b, 6 of c."""
    path = tmp_path / "train.csv"
    labels = "a" * 30 + "b" * 20 + "c" * 6
    lines = [f"text {row},{label}" for row, label in enumerate(labels)]
    path.write_text("\n".join(["text,label", *lines]), encoding="utf-8")
    return str(path)


def load(train_file: str, **options: Any) -> TextData:
    return load_splits(train_file=train_file, **options)


def counts(split: TextSplit) -> dict[int, int]:
    assert split.labels is not None
    return dict(Counter(split.labels))


def test_texts_per_class(train_file: str) -> None:
    data = load(train_file, max_train_samples_per_class=10, subset_seed=1)
    train = data.splits["train"]
    assert counts(train) == {0: 10, 1: 10, 2: 6}
    assert data.label_names == ["a", "b", "c"]
    numbers = [int(text.split()[1]) for text in train.first]
    assert numbers == sorted(numbers)
    assert train == load(train_file, max_train_samples_per_class=10, subset_seed=1).splits["train"]
    assert train != load(train_file, max_train_samples_per_class=10, subset_seed=2).splits["train"]
    fewer = load(train_file, max_train_samples_per_class=3, subset_seed=1).splits["train"]
    assert counts(fewer) == {0: 3, 1: 3, 2: 3} and set(fewer.first) < set(train.first)
    assert f"{train_file}" in data.notes[0]
    assert "26 of 56 texts to train on, drawn with subset_seed=1" in data.notes[0]


def test_a_validation_split(train_file: str) -> None:
    data = load(train_file, validation_split_percentage=20, subset_seed=3)
    train, held_out = data.splits["train"], data.splits["validation"]
    assert data.evaluation_splits == ["validation"]
    assert counts(held_out) == {0: 6, 1: 4, 2: 1} and counts(train) == {0: 24, 1: 16, 2: 5}
    assert not set(train.first) & set(held_out.first)
    alone = load(train_file, needs_train=False, validation_split_percentage=20, subset_seed=3)
    assert alone.splits == {"validation": held_out}
    both = load(
        train_file, validation_split_percentage=20, max_train_samples_per_class=5, subset_seed=3
    )
    assert both.splits["validation"] == held_out
    # The same texts are trained on with and without a validation split.
    plain = load(train_file, max_train_samples_per_class=5, subset_seed=3)
    assert both.splits["train"] == plain.splits["train"]


def test_the_data_own_validation_split_is_not_read(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    rows = "\n".join(f"text {row},{row % 2}" for row in range(10))
    (folder / "train.csv").write_text(f"text,label\n{rows}", encoding="utf-8")
    (folder / "validation.csv").write_text("text,label\ndamaged", encoding="utf-8")
    data = load_splits(
        data_dir=str(tmp_path), task_name="mine", validation_split_percentage=40, subset_seed=0
    )
    assert {name: len(split) for name, split in data.splits.items()} == {
        "train": 6,
        "validation": 4,
    }


def test_the_seed_of_the_run_draws(train_file: str) -> None:
    def resolved(**options: Any) -> int | None:
        config = TrainingConfig.create(
            train_file=train_file, model_name_or_path="m", output_dir="runs", **options
        )
        return config.resolved().data.subset_seed

    assert resolved(max_train_samples_per_class=5, seed=7) == 7
    assert resolved(max_train_samples_per_class=5, seed=7, subset_seed=8) == 8
    assert resolved(seed=7) is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"subset_seed": 1}, "subset_seed=1 draws nothing: set max_train_samples_per_class"),
        ({"max_train_samples_per_class": 0}, "max_train_samples_per_class=0"),
        ({"validation_split_percentage": 100}, "validation_split_percentage=100"),
        (
            {"validation_split_percentage": 10, "validation_file": "dev.csv"},
            "and validation_file are both given",
        ),
        ({"max_train_samples_per_class": 5, "max_train_samples": 9}, "are both given: keep one"),
    ],
)
def test_options_that_contradict(train_file: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TrainingConfig.create(
            train_file=train_file, model_name_or_path="m", output_dir="runs", **options
        ).resolved()


def test_a_class_too_small_to_split(train_file: str) -> None:
    with pytest.raises(ValueError, match="has 30 texts of class 'a': too few for training and"):
        load(train_file, validation_split_percentage=99)
