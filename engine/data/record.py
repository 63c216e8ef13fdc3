"""A model's record of its data: classes, how labels are written, text columns, content.

The record is made once, from the training split, and travels in the model's configuration. Every
rule that decides what a column or a label means is in this file.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute

from ..runtime.text import did_you_mean
from .columns import (
    all_unlabelled,
    holds_texts,
    is_integer_name,
    label_values,
    nearest_column,
    quoted,
    refuse_negative,
    refuse_rows,
    unlabelled,
)
from .doubtful_labels import doubtful_names

LABEL_COLUMNS = ("label", "labels")
_CONVENTIONAL_TEXTS = (("sentence1", "sentence2"), ("sentence",), ("text",))
# Largest share of the rows outside the most frequent class in which a column that repeats the label
# may differ from it.
_LABEL_NOISE = 0.02
STAGE1 = "stage1_"
# Fields of the record that the model's configuration holds in places of its own.
_OF_CONFIG = {"label_names", "several_labels"}


@dataclass(frozen=True)
class Classes:
    """The names of the classes, in the order of the logits, and the meaning of integer labels.

    origin: source of the names, for messages. by_index: True if an integer label is an index into
    `names`, False if it is itself a name, None if the training labels have to decide that.
    """

    names: list[str]
    origin: str
    by_index: bool | None

    def __post_init__(self) -> None:
        repeated = sorted({name for name in self.names if self.names.count(name) > 1})
        if repeated:
            raise ValueError(f"{self.origin}: the class {repeated[0]!r} is listed twice.")
        if len(self.names) < 2:
            raise ValueError(
                f"{self.origin}: a classifier needs at least two classes, got {self.names}."
            )

    def decided(self, column: pa.ChunkedArray, where: str) -> "Classes":
        """The same classes with `by_index` decided by a column of labels.

        Raises:
            ValueError: the names look like integers, and the labels may be names or indices.
        """
        if self.by_index is not None:
            return self
        values = label_values(column, where)
        if not pa.types.is_integer(values.type):
            # Names that do not look like integers leave indices possible in the other splits.
            return replace(self, by_index=not any(map(is_integer_name, self.names)))
        distinct = pa.compute.unique(values).to_pylist()
        as_indices = all(0 <= value < len(self.names) for value in distinct)
        as_names = all(str(value) in self.names for value in distinct)
        if as_indices and as_names and any(self.names[v] != str(v) for v in distinct):
            first = next(value for value in distinct if self.names[value] != str(value))
            raise ValueError(
                f"{where}: the label {first} is either the class {str(first)!r} or the index of "
                f"{self.names[first]!r} in {self.origin}. Give the classes names that are no "
                "numbers."
            )
        return replace(self, by_index=not as_names or as_indices)


@dataclass(frozen=True)
class DataRecord:
    """Record of the data that a model was trained on, with which later data must agree.

    label_names: classes in the order of the logits. labels_as: "names" or "indices", the way labels
    are written in files. text_columns: one column, or the two of pairs, in order. label_column: its
    name, or those of columns of zeros and ones, joined by commas. f1_class: the positive class of
    the metric f1, None for data without f1. splits: number of rows and SHA-256 of texts and labels,
    by split. token_types: whether the encoder was given token types. several_labels: whether a text
    may have several. label_separator: what joins them in a cell, None for other forms. chosen_on:
    the split whose scores chose the checkpoint or ended the training, None if none did. Fields are
    None in the record of a model that an earlier version saved. Splits with the prefix `STAGE1` are
    those of a first stage.
    """

    label_names: list[str]
    labels_as: str | None = None
    text_columns: list[str] | None = None
    label_column: str | None = None
    f1_class: str | None = None
    splits: dict[str, dict[str, Any]] = field(default_factory=dict)
    token_types: bool | None = None
    several_labels: bool = False
    label_separator: str | None = None
    chosen_on: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The record for the model's configuration, which holds the label names already.

        It also holds `several_labels`, as its problem_type.
        """
        return {name: value for name, value in asdict(self).items() if name not in _OF_CONFIG}

    @classmethod
    def from_dict(
        cls,
        values: Mapping[str, Any] | None,
        label_names: Sequence[str],
        several_labels: bool = False,
    ) -> "DataRecord":
        """Read what `to_dict` wrote; None gives a record of what the configuration holds.

        Raises:
            ValueError: the record is damaged.
        """
        known = {entry.name for entry in fields(cls)} - _OF_CONFIG
        if values is None:
            return cls(list(label_names), several_labels=several_labels)
        try:
            found = {name: value for name, value in values.items() if name in known}
            record = cls(list(label_names), several_labels=several_labels, **found)
            columns = record.text_columns
            valid = (
                record.labels_as in ("names", "indices")
                and isinstance(columns, list)
                and len(columns) in (1, 2)
                and all(isinstance(name, str) for name in columns)
                and (record.f1_class is None or record.f1_class in record.label_names)
            )
        except (AttributeError, TypeError):
            valid = False
        if not valid:
            raise ValueError("data_record in config.json is damaged: copy the model again.")
        return record

    def after(self, first: "DataRecord") -> "DataRecord":
        """This record, with the texts that a first stage was trained and chosen on."""
        found = dict(self.splits)
        pairs = {"train": ("train", "train"), "chosen": (self.chosen_on, first.chosen_on)}
        for name, (ours, theirs) in pairs.items():
            content = first.splits.get(theirs or "")
            if content is not None and content != self.splits.get(ours or ""):
                found[f"{STAGE1}{name}"] = content
        return replace(self, splits=found)

    @property
    def trained_on(self) -> list[dict[str, Any]]:
        """The contents of the splits that the weights were trained on."""
        return [self.splits[n] for n in ("train", f"{STAGE1}train") if n in self.splits]

    @property
    def selected_on(self) -> list[dict[str, Any]]:
        """The contents of the splits whose scores chose the weights."""
        names = (self.chosen_on, f"{STAGE1}chosen")
        return [self.splits[name] for name in names if name in self.splits]

    @property
    def is_complete(self) -> bool:
        """False for the model of an earlier version, which recorded its label names only."""
        return self.text_columns is not None

    @property
    def classes(self) -> Classes:
        """The classes, with the meaning that integer labels had in training."""
        names = self.label_names
        if self.labels_as is not None:
            return Classes(names, "the model", by_index=self.labels_as == "indices")
        # An earlier version took integers for indices unless all names were integers.
        return Classes(names, "the model", by_index=not any(map(is_integer_name, names)))

    @property
    def f1_index(self) -> int:
        """Index of the positive class of the metric f1."""
        return 1 if self.f1_class is None else self.label_names.index(self.f1_class)

    def differences(self, other: "DataRecord") -> list[str]:
        """Sentences on the differences of another record; fields without a value are left out."""
        found = []
        for name, what in (
            ("label_names", "the classes are"),
            ("labels_as", "labels are written as"),
            ("text_columns", "the text columns are"),
            ("label_column", "the label column is"),
            ("several_labels", "several labels per text:"),
            ("label_separator", "labels in a cell are joined by"),
            ("f1_class", "the positive class of f1 is"),
            ("token_types", "token types are given:"),
        ):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine is not None and theirs is not None and mine != theirs:
                found.append(f"{what} {theirs}, not {mine}")
        for split in self.splits.keys() & other.splits.keys():
            mine, theirs = self.splits[split], other.splits[split]
            if mine["rows"] != theirs["rows"]:
                found.append(f"{split} has {theirs['rows']} rows, not {mine['rows']}")
            else:
                differing = [key for key in ("texts", "labels") if mine[key] != theirs[key]]
                found += [f"the {key} of {split} are others" for key in differing]
        return found


def label_columns(
    columns: Collection[str], chosen: str | None = None, recorded: str | None = None
) -> list[str]:
    """The label column among `columns`; [] if there is none.

    It is `chosen` if given, else that `recorded` in training, else 'label' or 'labels'. Where no
    column is called so, commas separate the names of several, all of which must be there.
    """
    if chosen is None and recorded is not None:
        return label_columns(columns, recorded) or label_columns(columns)
    names = LABEL_COLUMNS if chosen is None else (chosen,)
    found = [name for name in names if name in columns][:1]
    several = _divided(chosen)
    if not found and several and all(name in columns for name in several):
        return several
    return found


def required_label_columns(
    table: pa.Table, where: str, chosen: str | None = None, recorded: str | None = None
) -> list[str]:
    """`label_columns` of a table that needs one.

    Raises:
        ValueError: there is none (the most similar name is offered), or one is named twice.
    """
    found = label_columns(table.column_names, chosen, recorded)
    if len(set(found)) < len(found):
        raise ValueError(f"label_column={chosen!r} names a column twice: name each once.")
    if found:
        return found
    if chosen is not None:
        lacking = [name for name in _divided(chosen) if name not in table.column_names]
        name = lacking[0] if lacking else chosen
        raise ValueError(
            f"{where}: no column {name!r}, which label_column names."
            f"{nearest_column(name, table.column_names)}"
        )
    raise ValueError(
        f"{where}: no label column; call it 'label', or name it with --label_column."
        f"{nearest_column('label', table.column_names)}"
    )


def _divided(chosen: str | None) -> list[str]:
    """The names in an option, if commas separate several."""
    names = [name.strip() for name in (chosen or "").split(",")]
    return names if len(names) > 1 else []


def choose_text_columns(
    table: pa.Table,
    where: str,
    preferred: Sequence[str] = (),
    *,
    options: Sequence[str | None] = (),
    model: Sequence[str] | None = None,
    labels: Sequence[str] = (),
) -> tuple[list[str], str | None]:
    """Choose the one or two text columns of a table; return them and a note on the choice.

    In this order: `options` (--text_column, --text_pair_column), those that the `model` was trained
    on, `preferred` (those of a GLUE task), `sentence1` and `sentence2`, `sentence`, `text`, the
    first one or two columns that hold text other than numbers and do not repeat the label column.
    The note is None if the choice was by name and ignores no text column.

    Raises:
        ValueError: there is no such column, or another number of columns than the model reads.
    """
    names = [name for name in table.column_names if name not in labels]
    given = [name for name in options if name is not None]
    if given:
        return _columns_of_options(given, options, model, names, where)
    if model is not None:
        lacking = [name for name in model if name not in names]
        if lacking:
            raise ValueError(
                f"{where}: no column {lacking[0]!r}: the model reads {quoted(model)}, the columns "
                f"are {quoted(names)}. Name the text with --text_column"
                f"{' and --text_pair_column' if len(model) == 2 else ''}."
            )
        return list(model), None
    if preferred and all(name in names for name in preferred):
        return list(preferred), None
    candidates = [name for name in names if name not in LABEL_COLUMNS and holds_texts(table[name])]
    for convention in _CONVENTIONAL_TEXTS:
        if all(name in names for name in convention):
            ignored = [name for name in candidates if name not in convention]
            note = f"reads {quoted(convention)}, not {quoted(ignored)}" if ignored else None
            return list(convention), note and f"{where}: {note}"
    repeating = []
    # Lists cannot be grouped, and of several columns none is the label.
    if len(labels) == 1 and not pa.types.is_nested(table[labels[0]].type):
        repeating = [name for name in candidates if _repeats_label(table, name, labels[0])]
    texts = [name for name in candidates if name not in repeating][:2]
    because = f", not {quoted(repeating)}, whose values say the label" if repeating else ""
    if not texts:
        raise ValueError(
            f"{where}: no text column{because}; call it 'sentence' (pairs: 'sentence1' and "
            f"'sentence2'), or name it with --text_column. The columns are {quoted(names)}."
        )
    return texts, f"{where}: takes {quoted(texts)} for the text{because}"


def _columns_of_options(
    given: list[str],
    options: Sequence[str | None],
    model: Sequence[str] | None,
    names: list[str],
    where: str,
) -> tuple[list[str], str | None]:
    if options[0] is None:
        raise ValueError("text_pair_column needs text_column: name both columns.")
    if len(set(given)) < len(given):
        raise ValueError(f"text_column and text_pair_column are both {given[0]!r}: name two.")
    for option, name in zip(("text_column", "text_pair_column"), given, strict=False):
        if name not in names:
            raise ValueError(
                f"{where}: no column {name!r}, which {option} names.{nearest_column(name, names)}"
            )
    if model is None:
        return given, None
    if len(given) != len(model):
        kind = "pairs" if len(model) == 2 else "one text"
        remedy = "name text_pair_column too" if len(model) == 2 else "leave text_pair_column out"
        raise ValueError(f"{where}: the model reads {kind} ({quoted(model)}): {remedy}.")
    if set(given) == set(model) and given != list(model):
        return given, (
            f"{where}: reads {quoted(given)}, in the other order than in training ({quoted(model)})"
        )
    return given, None


def _repeats_label(table: pa.Table, name: str, label: str) -> bool:
    """True if a column has few values and each of them stands beside one label only."""
    rows = table.num_rows
    pairs = pa.table(
        {"value": table[name].combine_chunks(), "label": table[label].combine_chunks()}
    )
    counts = pairs.group_by(["value", "label"]).aggregate([([], "count_all")])
    largest = counts.group_by("value").aggregate([("count_all", "max")])
    differing = rows - pa.compute.sum(largest["count_all_max"]).as_py()
    commonest = counts.group_by("label").aggregate([("count_all", "sum")])["count_all_sum"]
    # A column that says nothing would differ in all rows but those of the commonest label.
    by_chance = rows - pa.compute.max(commonest).as_py()
    return 2 * largest.num_rows <= rows and differing <= _LABEL_NOISE * by_chance and by_chance > 0


def learn_classes(column: pa.ChunkedArray, where: str) -> tuple[Classes, list[str]]:
    """Return the distinct labels of a training column, sorted, and notes on what looks doubtful.

    Raises:
        ValueError: a label is missing, negative or not an integer; there is one class only.
    """
    values = label_values(column, where)
    is_integer = pa.types.is_integer(values.type)
    if is_integer:
        if all_unlabelled(values):
            raise unlabelled(where)
        refuse_negative(values, where)
    distinct = sorted(pa.compute.unique(values).to_pylist())
    if len(distinct) < 2:
        raise ValueError(
            f"{where}: every label is {distinct[0]!r}; training needs at least two classes."
        )
    notes = [] if is_integer else doubtful_names(values, distinct, where)
    if is_integer and distinct != list(range(len(distinct))):
        notes = [
            f"{where}: the integer labels {distinct} become the classes 0..{len(distinct) - 1}"
        ]
    return Classes([str(value) for value in distinct], where, by_index=False), notes


def class_indices(column: pa.ChunkedArray, classes: Classes, where: str) -> list[int] | None:
    """Return the class index of each label; None if every label is -1 (unlabelled).

    Raises:
        ValueError: a label is missing, negative, not an integer, out of range, or not among the
            names, or names and indices are mixed; with the count and the first row.
    """
    values = label_values(column, where)
    if pa.types.is_integer(values.type):
        if all_unlabelled(values) and "-1" not in classes.names:
            return None
        refuse_negative(values, where)
        if classes.by_index:
            refuse_rows(
                pa.compute.greater_equal(values, len(classes.names)),
                f"label is out of range: {classes.origin} lists {len(classes.names)} classes, so "
                f"labels go from 0 to {len(classes.names) - 1}",
                where,
                values,
            )
            return values.to_pylist()
    labels = [str(label) for label in values.to_pylist()]
    if classes.by_index:
        _refuse_mixture(labels, classes, where)
    index_of = {name: index for index, name in enumerate(classes.names)}
    try:
        return [index_of[label] for label in labels]
    except KeyError as error:
        unknown = error.args[0]
        reading = " (labels are read as names, as in training)" if is_integer_name(unknown) else ""
        raise ValueError(
            f"{where}: data row {labels.index(unknown) + 1} has the label {unknown!r}, which "
            f"{classes.origin} does not have{reading}.{did_you_mean(unknown, classes.names)}"
        ) from None


def written_as(column: pa.ChunkedArray, classes: Classes) -> str:
    """Return "names" or "indices" (into the classes), the way a column writes its labels."""
    is_integer = pa.types.is_integer(label_values(column, "").type)
    return "indices" if is_integer and classes.by_index else "names"


def _refuse_mixture(labels: list[str], classes: Classes, where: str) -> None:
    row = next((row for row, label in enumerate(labels) if is_integer_name(label)), None)
    if row is None:
        return
    named = next(label for label in labels if not is_integer_name(label))
    index, names = int(labels[row]), classes.names
    meaning = f"the index of {names[index]!r}" if 0 <= index < len(names) else "no index"
    is_name = "a class" if labels[row] in names else "no class"
    raise ValueError(
        f"{where}: labels are written as names ({named!r}) and as indices: {labels[row]!r} in data "
        f"row {row + 1} is {is_name} of {classes.origin} by name, and {meaning}. Write all labels "
        "the same way."
    )
