"""The data of a run: texts and class indices from any source, ready to be tokenised."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import pyarrow as pa

from ..config.sections import DataOptions, EvaluationDataOptions, TrainingDataOptions
from ..runtime.text import did_you_mean
from .columns import TextSplit, content, read_texts, unlabelled
from .files.tables import read_table
from .record import (
    Classes,
    DataRecord,
    choose_text_columns,
    label_columns,
    learn_classes,
    required_label_columns,
    written_as,
)
from .several_labels import (
    LabelCells,
    check_columns,
    check_divides,
    check_separator,
    may_be_several,
    notes_on,
    read_cells,
)
from .sources import DataSource, open_directory, open_files, open_hub, open_task, usual_split_name
from .subsets import draw_subsets
from .tasks import QUICKSTART, SEVERAL_LABELS_METRICS

logger = logging.getLogger("fusedacl")


@dataclass(frozen=True)
class TextData:
    """A labelled data set in memory.

    record: what a model trained on it has to remember; evaluation_splits: the names in `splits` to
    evaluate on; metrics: those of the task, the main one first; notes: sentences about every choice
    that the options left open; predicted: test splits, with or without labels, for `do_predict`.
    """

    name: str
    record: DataRecord
    splits: dict[str, TextSplit]
    evaluation_splits: list[str]
    metrics: list[str]
    notes: list[str] = field(default_factory=list)
    predicted: dict[str, TextSplit] = field(default_factory=dict)

    @property
    def several_labels(self) -> bool:
        """True if a text may have several labels."""
        return self.record.several_labels

    @property
    def columns(self) -> list[str]:
        """The one or two text columns."""
        return self.record.text_columns or []

    @property
    def label_names(self) -> list[str]:
        """Names of the classes, in the order of the logits."""
        return self.record.label_names


def load_splits(
    options: DataOptions, *, needs_train: bool = True, model: DataRecord | None = None
) -> TextData:
    """Read the training and evaluation splits of the source that `options` name.

    The source is one of: `task_name` (GLUE from the hub, or the quickstart set), `data_dir` with
    `task_name` (local files), `dataset_name` (hub or local directory in hub layout), `train_file`
    and `validation_file`. Class names are those of the source (labels.json, the hub's features,
    GLUE), else the sorted distinct labels of the train split. Without a validation split the test
    split is evaluated, and a note says so; a split whose labels are all -1 is not evaluated.

    needs_train: if False, no training texts are read. model: the record of a trained model; the
    data must have its columns and classes.

    Raises:
        ValueError: anything is missing, contradictory or damaged; the message names the option or
            file, the row and the remedy.
        ConnectionError: the hub is out of reach and the data set is not in the local cache.
    """
    only = options.split if isinstance(options, EvaluationDataOptions) else None
    if not isinstance(options, TrainingDataOptions):
        shared = {entry.name: getattr(options, entry.name) for entry in fields(DataOptions)}
        options = TrainingDataOptions(**shared)
    source = _open_source(options, None if model is None else model.label_column)
    holds_out = options.validation_split_percentage is not None
    if (needs_train or holds_out) and "train" not in source.splits:
        if options.validation_file is not None:
            raise ValueError(
                "train_file is missing: validation_file alone gives nothing to train on."
            )
        raise ValueError(
            f"{source.name} has no train split."
            f"{did_you_mean('train', source.splits) if source.splits else ''}"
        )
    reader = _Reader(source, options, model)
    splits = {}
    held_out = None
    if needs_train or holds_out:
        train, held_out = reader.read_train()
        if needs_train:
            splits["train"] = train
    if held_out is None:
        evaluated = reader.read_evaluation_splits(only)
    else:
        evaluated = {"validation": held_out}
    splits |= {name: split.head(options.max_eval_samples) for name, split in evaluated.items()}
    return TextData(
        name=source.name,
        record=reader.record(splits),
        splits=splits,
        evaluation_splits=list(evaluated),
        metrics=reader.metrics,
        notes=reader.notes,
        predicted=reader.read_tests(options.max_predict_samples) if options.do_predict else {},
    )


def read_unlabelled(
    path: str | Path,
    columns: Sequence[str | None] | None = None,
    model: DataRecord | None = None,
) -> TextSplit:
    """Read the texts of one file, to be labelled by a model.

    columns: its one or two text columns; None: those that the `model` was trained on, or, without
    a record of them, found as in training.

    Raises:
        ValueError: as `load_splits`.
    """
    table = read_table(path, "input_file")
    where = f"input_file={str(path)!r}"
    if columns is not None and not 1 <= len(columns) <= 2:
        raise ValueError(f"columns={list(columns)}: name one text column, or two for pairs.")
    chosen, note = choose_text_columns(
        table, where, options=columns or (), model=None if model is None else model.text_columns
    )
    if note is not None:
        logger.info(note)
    return read_texts(table, chosen, where)


def _open_source(options: TrainingDataOptions, recorded: str | None) -> DataSource:
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
        return open_hub(
            options.dataset_name,
            options.dataset_config_name,
            label_column=options.label_column,
            recorded=recorded,
        )
    if not given:
        raise ValueError(
            "No data: give task_name (with data_dir for local files), dataset_name, or train_file."
        )
    return open_files(options.train_file, options.validation_file, options.test_file)


class _Reader:
    """Reader of the splits of one source, with the same columns and classes for all."""

    def __init__(
        self, source: DataSource, options: TrainingDataOptions, model: DataRecord | None
    ) -> None:
        self.source, self.options, self.model = source, options, model
        self.notes = list(source.notes)
        self.columns: list[str] = []
        self.label_column = None if model is None else model.label_column
        self.several = None if model is None else model.several_labels
        self.separator = options.label_separator
        self._labels_as: str | None = None
        self._classes = source.classes
        if model is not None:
            self.separator = self.separator or model.label_separator
            self._classes = self._classes_of_model(model)

    def _classes_of_model(self, model: DataRecord) -> Classes:
        listed, known = self.source.classes, model.classes
        if listed is None:
            return known
        if listed.names != known.names:
            raise ValueError(
                f"label_names={known.names} of the model are not the classes of {listed.origin}: "
                f"{listed.names}; evaluate it on the task it was trained on."
            )
        if listed.by_index is None and model.labels_as is not None:
            return replace(listed, by_index=known.by_index)
        return listed

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics, the main one first."""
        return list(SEVERAL_LABELS_METRICS if self.several else self.source.metrics)

    def _label_columns(self, table: pa.Table, where: str, required: bool) -> list[str]:
        """The label columns of a table: those of the options, of training, or a usual name."""
        chosen, recorded = self.options.label_column, self.label_column
        if required:
            columns = required_label_columns(table, where, chosen, recorded)
        else:
            columns = label_columns(table.column_names, chosen, recorded)
        taken = ",".join(columns) or None
        if chosen is None and recorded is not None and taken not in (None, recorded):
            self._note(f"{where}: takes {taken!r} for the labels: there is no {recorded!r}")
        self.label_column = recorded or taken
        return columns

    def _cells(self, table: pa.Table, columns: list[str], where: str) -> LabelCells:
        """The labels of a table; the first one that is read decides whether there are several."""
        given, decides = self.options.label_separator, self.several is None
        if given is not None and (decides or self.model is not None):
            # Other files of a training run may hold lists where one joins its labels.
            check_separator(table, columns, given, where)
        if self.several is None:
            self.several = may_be_several(
                table,
                columns,
                where,
                problem_type=self.options.problem_type,
                separator=self.separator,
            )
        cells = read_cells(table, columns, where, several=self.several, separator=self.separator)
        if decides:
            check_divides(cells, self.separator, where)
            self.notes += notes_on(cells, where)
        return cells

    def _decided_classes(self, cells: LabelCells, where: str) -> Classes:
        """The classes; the first labels that are read, those of train, decide what they mean."""
        with cells.told_by_row(where):
            if self._classes is None and cells.columns:
                self._classes = Classes(cells.columns, where, by_index=False)
            if self._classes is None:
                self._classes, notes = learn_classes(cells.values, where)
                self.notes += notes
            self._classes = self._classes.decided(cells.values, where)
        check_columns(cells.columns, self._classes, where)
        return self._classes

    def _learn_from_train(self) -> None:
        train = self.source.splits.get("train")
        if train is None:
            raise ValueError(
                f"{self.source.name} has neither a list of class names nor a train split: "
                "label_names must say which classes the model has."
            )
        table = train.read()
        columns = self._label_columns(table, train.where, required=True)
        self._decided_classes(self._cells(table, columns, train.where), train.where)

    def _note(self, note: str | None) -> None:
        if note is not None and note not in self.notes:
            self.notes.append(note)

    def record(self, splits: Mapping[str, TextSplit]) -> DataRecord:
        """The record for a model that is trained on these splits."""
        if self._classes is None:
            self._learn_from_train()
        assert self._classes is not None
        names = self._classes.names
        f1_class, note = None if self.model is None else self.model.f1_class, None
        if f1_class is None:
            f1_class, note = self.source.f1_class(names)
        self._note(note)
        if self.model is not None and self.model.is_complete:
            return replace(self.model, splits={}, f1_class=f1_class)
        return DataRecord(
            names,
            labels_as=self._labels_as or "names",
            text_columns=self.columns,
            label_column=self.label_column,
            f1_class=f1_class,
            splits={name: content(split) for name, split in splits.items()},
            several_labels=bool(self.several),
            label_separator=self.separator,
        )

    def read(self, name: str, labels_required: bool = True) -> TextSplit:
        """Read the texts and labels of one split; labels are None where all are missing or -1."""
        split = self.source.splits[name]
        table = split.read()
        if name != "train" and self._classes is None:
            self._learn_from_train()
        columns = self._label_columns(table, split.where, labels_required)
        labels = None
        if columns:
            cells = self._cells(table, columns, split.where)
            classes = self._decided_classes(cells, split.where)
        if not self.columns:
            self.columns, note = choose_text_columns(
                table,
                split.where,
                self.source.text_columns,
                options=(self.options.text_column, self.options.text_pair_column),
                model=None if self.model is None else self.model.text_columns,
                labels=columns,
            )
            self._note(note)
            if columns == ["label"] and "labels" in table.column_names:
                self._note(f"{split.where}: takes 'label' for the labels, not 'labels'")
        texts = read_texts(table, self.columns, split.where)
        if columns:
            labels = cells.indices(classes, split.where)
        if name == "train" and labels is None:
            raise unlabelled(split.where)
        if self._labels_as is None and labels is not None:
            self._labels_as = written_as(cells.values, classes)
        num_labels = len(classes.names) if self.several and labels is not None else None
        return replace(texts, labels=labels, num_labels=num_labels)

    def read_train(self) -> tuple[TextSplit, TextSplit | None]:
        """The training texts, and those held out for validation if the options ask for it."""
        options, where = self.options, self.source.splits["train"].where
        whole = self.read("train")
        train, held_out = whole, None
        limits = (options.max_train_samples_per_class, options.validation_split_percentage)
        if self.several and options.max_train_samples_per_class is not None:
            raise ValueError(
                f"max_train_samples_per_class={options.max_train_samples_per_class}: a text with "
                "several labels belongs to no single class. Use max_train_samples."
            )
        if limits != (None, None):
            per_class, percentage = limits
            seed = 42 if options.subset_seed is None else options.subset_seed
            assert self._classes is not None
            train, held_out = draw_subsets(
                whole,
                self._classes.names,
                seed,
                samples_per_class=per_class,
                validation_percentage=percentage,
                where=where,
            )
            parts = [f"{len(train)} of {len(whole)} texts to train on"]
            parts += [] if held_out is None else [f"{len(held_out)} held out for validation"]
            self._note(f"{where}: {', '.join(parts)}, drawn with subset_seed={seed}")
        train = train.head(options.max_train_samples)
        _check_two_classes(train, where, options.max_train_samples)
        return train, held_out

    def read_evaluation_splits(self, only: str | None = None) -> dict[str, TextSplit]:
        """Read the labelled validation splits, or the labelled test split if there are none.

        only: the one split to read instead.
        """
        name = self.source.name
        available = self.source.splits
        if only is not None:
            return {only: self._named_split(only)}
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
                why = "no text of {} has a label" if self.several else "every label of {} is -1"
                self.notes.append(f"{name}: {why.format(split)}: not evaluated on")
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

    def read_tests(self, limit: int | None) -> dict[str, TextSplit]:
        """Read the first `limit` texts of each test split, labelled or not."""
        # MNLI has test_matched and test_mismatched.
        names = sorted(name for name in self.source.splits if name.startswith("test"))
        if not names:
            raise ValueError(
                f"do_predict: {self.source.name} has no test split. Add one (test_file beside "
                "train_file, or a file test.… in data_dir), or leave do_predict out."
            )
        return {name: self.read(name, labels_required=False).head(limit) for name in names}

    def _named_split(self, name: str) -> TextSplit:
        usual = name if name in self.source.splits else usual_split_name(name)
        if usual not in self.source.splits:
            raise ValueError(
                f"split={name!r}: {self.source.name} has no such split."
                f"{did_you_mean(name, self.source.splits)}"
            )
        split = self.read(usual)
        if split.labels is None:
            why = "no text has a label" if self.several else "every label is -1 (unlabelled)"
            raise ValueError(f"split={name!r}: {why}; name another split.")
        return split


def _check_two_classes(train: TextSplit, where: str, max_train_samples: int | None) -> None:
    labels = set(map(tuple, train.labels or ()) if train.num_labels else train.labels or ())
    if len(labels) < 2:
        limited = (
            ""
            if max_train_samples is None
            else f" in its first {max_train_samples} rows "
            "(max_train_samples; shuffle the file or raise the limit)"
        )
        if train.num_labels:
            raise ValueError(
                f"{where}: all texts have the same labels{limited}; training needs a difference."
            )
        raise ValueError(
            f"{where}: all texts have the same class{limited}; training needs at least two."
        )
