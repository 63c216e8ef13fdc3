"""Texts and class indices from the columns of a table, with checks of every row.

Messages count rows from 1, without the header of a csv file.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute

from ..runtime.text import did_you_mean

LABEL_COLUMNS = ("label", "labels")
# Label of every row of GLUE's test splits.
UNLABELLED = -1
_CONVENTIONAL_TEXTS = (("sentence1", "sentence2"), ("sentence",), ("text",))
# Eighteen digits always fit into 64 bits; codes such as 007 are names, not numbers.
_INTEGER = r"^-?(0|[1-9]\d{0,17})$"
_NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"


@dataclass(frozen=True)
class TextSplit:
    """Texts, or pairs of texts, and their class indices if they are known."""

    first: list[str]
    second: list[str] | None = None
    labels: list[int] | None = None

    def __post_init__(self) -> None:
        for name, values in (("second", self.second), ("labels", self.labels)):
            if values is not None and len(values) != len(self.first):
                raise ValueError(
                    f"{name} has {len(values)} entries, first has {len(self.first)}: give one each."
                )

    def __len__(self) -> int:
        return len(self.first)

    def head(self, num_samples: int | None) -> "TextSplit":
        """Return the first `num_samples` rows; all rows if it is None or larger."""
        return TextSplit(
            self.first[:num_samples],
            None if self.second is None else self.second[:num_samples],
            None if self.labels is None else self.labels[:num_samples],
        )


@dataclass(frozen=True)
class Classes:
    """The names of the classes in order, and the meaning of integer labels.

    origin: source of the names, for messages. by_index: True if an integer label is an index into
    `names` (the names came from a list beside the data), False if it is itself a name.
    """

    names: list[str]
    origin: str
    by_index: bool

    def __post_init__(self) -> None:
        repeated = sorted({name for name in self.names if self.names.count(name) > 1})
        if repeated:
            raise ValueError(f"{self.origin}: the class {repeated[0]!r} is listed twice.")
        if len(self.names) < 2:
            raise ValueError(
                f"{self.origin}: a classifier needs at least two classes, got {self.names}."
            )


def label_column(table: pa.Table) -> str | None:
    """Return the name of the label column, None if the table has none."""
    return next((name for name in LABEL_COLUMNS if name in table.column_names), None)


def required_label_column(table: pa.Table, where: str) -> str:
    """Return the name of the label column.

    Raises:
        ValueError: there is none (the most similar name is offered).
    """
    name = label_column(table)
    if name is None:
        raise ValueError(
            f"{where}: no label column; call it 'label'.{_nearest_column('label', table)}"
        )
    return name


def choose_text_columns(
    table: pa.Table, where: str, preferred: Sequence[str] = ()
) -> tuple[list[str], str | None]:
    """Choose the one or two text columns of a table; return them and a note on the choice.

    In this order: `preferred` (those of a GLUE task), `sentence1` and `sentence2`, `sentence`,
    `text`, the first one or two columns that hold text other than numbers. The note is None if the
    choice was by name and ignores no text column.
    """
    names = table.column_names
    if preferred and all(name in names for name in preferred):
        return list(preferred), None
    candidates = [name for name in names if name not in LABEL_COLUMNS and _holds_texts(table[name])]
    for convention in _CONVENTIONAL_TEXTS:
        if all(name in names for name in convention):
            ignored = [name for name in candidates if name not in convention]
            note = f"reads {_quoted(convention)}, not {_quoted(ignored)}" if ignored else None
            return list(convention), note and f"{where}: {note}"
    if not candidates:
        raise ValueError(
            f"{where}: no text column; call it 'sentence' (pairs: 'sentence1' and 'sentence2'). "
            f"The columns are {_quoted(names)}."
        )
    return candidates[:2], f"{where}: takes {_quoted(candidates[:2])} for the text"


def read_texts(table: pa.Table, columns: Sequence[str], where: str) -> TextSplit:
    """Read the texts of one or two columns, without labels.

    Raises:
        ValueError: a column is missing or holds no text; a text is null or empty (in a pair: both
            are empty), with the count and the first row.
    """
    values = []
    empty = None
    for name in columns:
        if name not in table.column_names:
            raise ValueError(f"{where}: no column {name!r}.{_nearest_column(name, table)}")
        column = _plain(table[name])
        _refuse(pa.compute.is_null(column), f"text in column {name!r} is null", where)
        if not pa.types.is_string(column.type):
            raise ValueError(
                f"{where}: column {name!r} holds {column.type}, not text; write the texts as "
                "strings."
            )
        blank = pa.compute.equal(pa.compute.utf8_trim_whitespace(column), "")
        empty = blank if empty is None else pa.compute.and_(empty, blank)
        values.append(column.to_pylist())
    wording = "text is empty" if len(values) == 1 else "pair is empty on both sides"
    _refuse(empty, f"{wording} ({_quoted(columns)})", where)
    return TextSplit(values[0], values[1] if len(values) == 2 else None)


def learn_classes(column: pa.ChunkedArray, where: str) -> tuple[Classes, str | None]:
    """Return the distinct labels of a training column, sorted, and a note if they are renumbered.

    Raises:
        ValueError: a label is missing, negative or not an integer; there is one class only.
    """
    values = _label_values(column, where)
    if pa.types.is_integer(values.type):
        if _all_unlabelled(values):
            raise unlabelled(where)
        _refuse_negative(values, where)
    distinct = sorted(pa.compute.unique(values).to_pylist())
    if len(distinct) < 2:
        raise ValueError(
            f"{where}: every label is {distinct[0]!r}; training needs at least two classes."
        )
    note = None
    if pa.types.is_integer(values.type) and distinct != list(range(len(distinct))):
        note = f"{where}: the integer labels {distinct} become the classes 0..{len(distinct) - 1}"
    return Classes([str(value) for value in distinct], where, by_index=False), note


def class_indices(column: pa.ChunkedArray, classes: Classes, where: str) -> list[int] | None:
    """Return the class index of each label; None if every label is -1 (unlabelled).

    Raises:
        ValueError: a label is missing, negative, not an integer, out of range, or not among the
            names; with the count and the first row.
    """
    values = _label_values(column, where)
    if pa.types.is_integer(values.type):
        if _all_unlabelled(values):
            return None
        _refuse_negative(values, where)
        if classes.by_index:
            _refuse(
                pa.compute.greater_equal(values, len(classes.names)),
                f"label is out of range: {classes.origin} lists {len(classes.names)} classes, so "
                f"labels go from 0 to {len(classes.names) - 1}",
                where,
                values,
            )
            return values.to_pylist()
    index_of = {name: index for index, name in enumerate(classes.names)}
    labels = values.to_pylist()
    try:
        return [index_of[str(label)] for label in labels]
    except KeyError as error:
        unknown = error.args[0]
        row = [str(label) for label in labels].index(unknown) + 1
        raise ValueError(
            f"{where}: data row {row} has the label {unknown!r}, which {classes.origin} does not "
            f"have.{did_you_mean(unknown, classes.names)}"
        ) from None


def _label_values(column: pa.ChunkedArray, where: str) -> pa.Array:
    """Return labels as int64, or as trimmed strings if they are not all integers."""
    values = _plain(column)
    missing = "label is missing"
    _refuse(pa.compute.is_null(values, nan_is_null=True), missing, where)
    if pa.types.is_integer(values.type):
        return values.cast(pa.int64())
    if pa.types.is_floating(values.type):
        broken = pa.compute.not_equal(values, pa.compute.floor(values))
        if not pa.compute.any(broken).as_py():
            broken = pa.compute.is_valid(values)
        _refuse_fractions(broken, values, where)
    if pa.types.is_boolean(values.type):
        values = values.cast(pa.string())
    if not pa.types.is_string(values.type):
        raise ValueError(
            f"{where}: labels of type {values.type} are neither integers nor names; write one of "
            "the two."
        )
    values = pa.compute.utf8_trim_whitespace(values)
    _refuse(pa.compute.equal(values, ""), missing, where)
    integers = pa.compute.match_substring_regex(values, _INTEGER)
    if pa.compute.all(integers).as_py():
        return values.cast(pa.int64())
    numbers = pa.compute.match_substring_regex(values, _NUMBER)
    if pa.compute.all(numbers).as_py():
        fractions = pa.compute.match_substring_regex(values, "[.eE]")
        if pa.compute.any(fractions).as_py():
            _refuse_fractions(fractions, values, where)
    return values


def unlabelled(where: str) -> ValueError:
    """The error for training data without labels."""
    return ValueError(f"{where}: every label is -1 (unlabelled); training needs labels.")


def _all_unlabelled(values: pa.Array) -> bool:
    return pa.compute.all(pa.compute.equal(values, UNLABELLED)).as_py()


def _refuse_fractions(broken: pa.Array, values: pa.Array, where: str) -> None:
    _refuse(
        broken,
        "label is not an integer: write classes as 0, 1, … or as names (regression is not "
        "supported)",
        where,
        values,
    )


def _refuse_negative(values: pa.Array, where: str) -> None:
    _refuse(
        pa.compute.less(values, 0),
        "label is negative: classes start at 0 (-1 means unlabelled, for a whole split only)",
        where,
        values,
    )


def _refuse(broken: pa.Array, problem: str, where: str, values: pa.Array | None = None) -> None:
    """Raise ValueError, with the first row and the count, if any entry of `broken` is true."""
    count = pa.compute.sum(broken).as_py()
    if not count:
        return
    row = pa.compute.index(broken, True).as_py()
    value = "" if values is None else f" = {values[row].as_py()!r}"
    others = f" ({count} such rows)" if count > 1 else ""
    remedy = "Correct the row or take it out." if count == 1 else "Correct the rows or drop them."
    raise ValueError(f"{where}: data row {row + 1}{value}: the {problem}{others}. {remedy}")


def _plain(column: pa.ChunkedArray) -> pa.Array:
    """Return a column as one array, without dictionary encoding and with one type of string."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    if pa.types.is_dictionary(array.type):
        array = array.cast(array.type.value_type)
    if re.match("(large_)?string(_view)?$", str(array.type)):
        array = array.cast(pa.string())
    return array


def _holds_texts(column: pa.ChunkedArray) -> bool:
    array = _plain(column)
    if not pa.types.is_string(array.type):
        return False
    # csv columns are all read as strings; a column of numbers is no text.
    return not pa.compute.all(pa.compute.match_substring_regex(array, _NUMBER)).as_py()


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))


def _nearest_column(name: str, table: pa.Table) -> str:
    return did_you_mean(name, table.column_names) if table.column_names else ""
