"""The data of a run: texts and class indices from any source, ready to be tokenised."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from ..config.sections import DataOptions, TrainingDataOptions
from ..runtime.text import did_you_mean
from .columns import (
    Classes,
    TextSplit,
    choose_text_columns,
    class_indices,
    label_column,
    learn_classes,
    read_texts,
    required_label_column,
    unlabelled,
)
from .sources import DataSource, open_directory, open_files, open_hub, open_task
from .tables import read_table
from .tasks import QUICKSTART

logger = logging.getLogger("fusedacl")


@dataclass(frozen=True)
class TextData:
    """A labelled data set in memory.

    columns: the one or two text columns; label_names: class names in index order;
    evaluation_splits: the names in `splits` to evaluate on; metrics: those of the task, the main
    one first; notes: sentences about every choice that the options left open.
    """

    name: str
    columns: list[str]
    label_names: list[str]
    splits: dict[str, TextSplit]
    evaluation_splits: list[str]
    metrics: list[str]
    notes: list[str] = field(default_factory=list)


def load_splits(
    options: DataOptions, *, needs_train: bool = True, label_names: Sequence[str] | None = None
) -> TextData:
    """Read the training and evaluation splits of the source that `options` name.

    The source is one of: `task_name` (GLUE from the hub, or the quickstart set), `data_dir` with
    `task_name` (local files), `dataset_name` (hub or local directory in hub layout), `train_file`
    and `validation_file`. Class names are those of the source (labels.json, the hub's features,
    GLUE), else the sorted distinct labels of the train split. Without a validation split the test
    split is evaluated, and a note says so; a split whose labels are all -1 is not evaluated.

    needs_train: if False, no training texts are read. label_names: the classes of a trained model;
    they must equal the source's own if it has any, and replace those of the train split otherwise.

    Raises:
        ValueError: anything is missing, contradictory or damaged; the message names the option or
            file, the row and the remedy.
        ConnectionError: the hub is out of reach and the data set is not in the local cache.
    """
    if not isinstance(options, TrainingDataOptions):
        options = TrainingDataOptions(**vars(options))
    source = _open_source(options)
    if needs_train and "train" not in source.splits:
        if options.validation_file is not None:
            raise ValueError(
                "train_file is missing: validation_file alone gives nothing to train on."
            )
        raise ValueError(
            f"{source.name} has no train split."
            f"{did_you_mean('train', source.splits) if source.splits else ''}"
        )
    reader = _Reader(source, label_names)
    splits = {}
    if needs_train:
        train = reader.read("train").head(options.max_train_samples)
        _check_two_classes(train, source.splits["train"].where, options.max_train_samples)
        splits["train"] = train
    evaluated = reader.read_evaluation_splits()
    splits |= {name: split.head(options.max_eval_samples) for name, split in evaluated.items()}
    return TextData(
        name=source.name,
        columns=reader.columns,
        label_names=reader.classes.names,
        splits=splits,
        evaluation_splits=list(evaluated),
        metrics=list(source.metrics),
        notes=reader.notes,
    )


def read_unlabelled(path: str | Path, columns: Sequence[str] | None = None) -> TextSplit:
    """Read the texts of one file, to be labelled by a model.

    columns: its one or two text columns; None: found as in training.

    Raises:
        ValueError: as `load_splits`.
    """
    table = read_table(path, "input_file")
    where = f"input_file={str(path)!r}"
    if columns is None:
        columns, note = choose_text_columns(table, where)
        if note is not None:
            logger.info(note)
    elif not 1 <= len(columns) <= 2:
        raise ValueError(f"columns={list(columns)}: name one text column, or two for pairs.")
    return read_texts(table, columns, where)


def _open_source(options: TrainingDataOptions) -> DataSource:
    ways = ("task_name", "dataset_name", "train_file", "validation_file")
    given = [way for way in ways if getattr(options, way) is not None]
    task_name, data_dir = options.task_name, options.data_dir
    if len(given) > 1 and given != ["train_file", "validation_file"]:
        raise ValueError(
            f"{' and '.join(given)} are given together: each names a data set; keep one."
        )
    if options.dataset_config_name is not None and options.dataset_name is None:
        raise ValueError(
            f"dataset_config_name={options.dataset_config_name!r} needs a dataset_name to belong "
            "to."
        )
    if data_dir is not None and task_name is None:
        raise ValueError(f"data_dir={data_dir!r} needs task_name: the folder in it to read.")
    if data_dir is not None and task_name == QUICKSTART:
        raise ValueError(f"task_name={QUICKSTART!r} is generated: leave data_dir out.")
    if task_name is not None:
        return open_task(task_name) if data_dir is None else open_directory(data_dir, task_name)
    if options.dataset_name is not None:
        return open_hub(options.dataset_name, options.dataset_config_name)
    if not given:
        raise ValueError(
            "No data: give task_name (with data_dir for local files), dataset_name, or train_file."
        )
    return open_files(options.train_file, options.validation_file)


class _Reader:
    """Reader of the splits of one source, with the same text columns and classes for all."""

    def __init__(self, source: DataSource, label_names: Sequence[str] | None) -> None:
        self.source = source
        self.notes: list[str] = []
        self.columns: list[str] = []
        classes = source.classes
        if label_names is not None:
            given = _classes_of_model(label_names)
            if classes is not None and classes.names != given.names:
                raise ValueError(
                    f"label_names={given.names} of the model are not the classes of "
                    f"{classes.origin}: {classes.names}; evaluate it on the task it was trained on."
                )
            classes = classes or given
        self._classes = classes

    @property
    def classes(self) -> Classes:
        if self._classes is None:
            train = self.source.splits.get("train")
            if train is None:
                raise ValueError(
                    f"{self.source.name} has neither a list of class names nor a train split: "
                    "label_names must say which classes the model has."
                )
            self._classes = self._learn(train.read(), train.where)
        return self._classes

    def _learn(self, table: pa.Table, where: str) -> Classes:
        classes, note = learn_classes(table[required_label_column(table, where)], where)
        self._note(note)
        return classes

    def _note(self, note: str | None) -> None:
        if note is not None:
            self.notes.append(note)

    def read(self, name: str, labels_required: bool = True) -> TextSplit:
        """Read the texts and labels of one split; labels are None where all are missing or -1."""
        split = self.source.splits[name]
        table = split.read()
        if name == "train" and self._classes is None:
            self._classes = self._learn(table, split.where)
        if not self.columns:
            self.columns, note = choose_text_columns(table, split.where, self.source.text_columns)
            self._note(note)
        label = label_column(table)
        if labels_required:
            label = required_label_column(table, split.where)
        texts = read_texts(table, self.columns, split.where)
        labels = None if label is None else class_indices(table[label], self.classes, split.where)
        if name == "train" and labels is None:
            raise unlabelled(split.where)
        return TextSplit(texts.first, texts.second, labels)

    def read_evaluation_splits(self) -> dict[str, TextSplit]:
        """Read the labelled validation splits, or the labelled test split if there are none."""
        name = self.source.name
        available = self.source.splits
        # MNLI has two validation splits and none called validation.
        validation = (
            ["validation"]
            if "validation" in available
            else sorted(split for split in available if split.startswith("validation_"))
        )
        evaluated = {}
        for split in validation:
            texts = self.read(split)
            if texts.labels is None:
                self.notes.append(f"{name}: every label of {split} is -1: not evaluated on")
            else:
                evaluated[split] = texts
        if evaluated:
            return evaluated
        if "test" in available:
            texts = self.read("test", labels_required=False)
            if texts.labels is not None:
                missing = "no labelled" if validation else "no"
                self.notes.append(f"{name} has {missing} validation split: evaluating on test")
                return {"test": texts}
            self.notes.append(f"{name}: test is unlabelled: not evaluated on")
        self.notes.append(f"{name} comes without a labelled validation split: no evaluation")
        return {}


def _classes_of_model(label_names: Sequence[str]) -> Classes:
    # The classes "1".."5" of a model trained on the integer labels 1..5 are values, not indices.
    values = all(name.lstrip("-").isdigit() for name in label_names)
    return Classes(list(label_names), "label_names", by_index=not values)


def _check_two_classes(train: TextSplit, where: str, max_train_samples: int | None) -> None:
    labels = set(train.labels or ())
    if len(labels) < 2:
        limited = (
            ""
            if max_train_samples is None
            else f" in its first {max_train_samples} rows "
            "(max_train_samples; shuffle the file or raise the limit)"
        )
        raise ValueError(
            f"{where}: every label is {labels}{limited}; training needs at least two classes."
        )
