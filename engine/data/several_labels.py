"""Labels of texts that may have several: lists, joined texts, or a column for each label.

All three become `LabelCells`, which hold the labels as the column of one label per text would have
them. So the rules on names and indices in `record.py` are the same for both.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute

from ..config.sections import MULTI_LABEL, SINGLE_LABEL
from .columns import UNLABELLED, plain_array, quoted, refuse_rows
from .record import Classes, class_indices

# Spellings of no and yes in a column of zeros and ones.
_NO, _YES = ("0", "0.0", "false"), ("1", "1.0", "true")


@dataclass(frozen=True)
class LabelCells:
    """The labels of a table, one after another.

    rows: the row of each label, ascending; None: each row has one label.
    columns: names of the columns of zeros and ones, which are the labels; empty for other forms.
    """

    values: pa.ChunkedArray
    num_rows: int
    rows: list[int] | None = None
    columns: list[str] = field(default_factory=list)

    @property
    def num_unlabelled(self) -> int:
        """Number of rows without a label."""
        return 0 if self.rows is None else self.num_rows - len(set(self.rows))

    @contextmanager
    def told_by_row(self, where: str) -> Iterator[None]:
        """Make errors that count labels name the rows instead; `where` begins the messages."""
        try:
            yield
        except ValueError as error:
            if self.rows is None:
                raise
            rows, words = self.rows, str(error).removeprefix(where)
            words = re.sub(r"(\d+) such rows", r"\1 such labels", words)
            words = words.replace("every label is -1 (unlabelled)", "no text has a label")
            words = re.sub(
                r"data row (\d+)", lambda found: f"data row {rows[int(found[1]) - 1] + 1}", words
            )
            raise ValueError(where + words) from None

    def indices(self, classes: Classes, where: str) -> list[int] | list[list[int]] | None:
        """The class index of each row, or a sorted list of label indices; None if unlabelled.

        Raises:
            ValueError: as `class_indices`.
        """
        with self.told_by_row(where):
            found = class_indices(self.values, classes, where)
        if found is None or self.rows is None:
            return found
        grouped: list[set[int]] = [set() for _ in range(self.num_rows)]
        for row, index in zip(self.rows, found, strict=True):
            grouped[row].add(index)
        return [sorted(labels) for labels in grouped]


def may_be_several(
    table: pa.Table,
    columns: Sequence[str],
    where: str,
    *,
    problem_type: str | None,
    separator: str | None,
) -> bool:
    """Decide whether the texts of a training table may have several labels each.

    Several columns, a separator, or lists say so; `problem_type` decides where lists are in doubt.

    Raises:
        ValueError: `problem_type` contradicts the data, or the data leave it open.
    """
    holds_lists = len(columns) == 1 and _is_list(table[columns[0]].type)
    if len(columns) == 1 and problem_type != SINGLE_LABEL:
        _refuse_printed_lists(plain_array(table[columns[0]]), columns[0], where)
    reason = None
    if len(columns) > 1:
        reason = f"label_column names the columns {quoted(columns)}"
    elif separator is not None:
        reason = f"label_separator={separator!r} divides a cell into labels"
    elif holds_lists:
        reason = f"column {columns[0]!r} holds lists"
    if problem_type == SINGLE_LABEL and reason is not None:
        raise ValueError(
            f"{where}: problem_type={SINGLE_LABEL} is one label per text, but {reason}. Write one "
            f"label per text, or use problem_type={MULTI_LABEL}."
        )
    if problem_type == MULTI_LABEL and reason is None:
        raise ValueError(_one_per_cell(table, columns[0], where, f"problem_type={MULTI_LABEL}"))
    if holds_lists and problem_type is None:
        lengths = pa.compute.list_value_length(plain_array(table[columns[0]]))
        if pa.compute.all(pa.compute.equal(lengths, 1)).as_py():
            raise ValueError(
                f"{where}: every list in column {columns[0]!r} holds one label. Set "
                f"problem_type={MULTI_LABEL} if other texts may have several, or write the label "
                "itself in place of the list."
            )
    return reason is not None


def check_separator(table: pa.Table, columns: Sequence[str], separator: str, where: str) -> None:
    """Refuse a `label_separator` beside labels that are not joined.

    Raises:
        ValueError: there are several label columns, or the cells are lists.
    """
    if not separator:
        raise ValueError("label_separator is empty: name the text between two labels, such as '|'.")
    if len(columns) > 1 or _is_list(table[columns[0]].type):
        raise ValueError(
            f"{where}: label_separator={separator!r} has no effect: the labels are "
            f"{'columns' if len(columns) > 1 else 'lists'} already. Leave it out."
        )


def check_divides(cells: LabelCells, separator: str | None, where: str) -> None:
    """Refuse a separator that divides no cell of the training data.

    Raises:
        ValueError: each text has one label at most.
    """
    is_joined = separator is not None and not cells.columns and cells.rows is not None
    if is_joined and len(set(cells.rows or ())) == len(cells.rows or ()):
        raise ValueError(
            f"{where}: label_separator={separator!r} occurs in no label: every text has one. "
            "Correct the separator, or leave it out for one label per text."
        )


def read_cells(
    table: pa.Table, columns: Sequence[str], where: str, *, several: bool, separator: str | None
) -> LabelCells:
    """The labels of a table, in whichever form it has them.

    several: whether a text may have several labels.

    Raises:
        ValueError: the form does not fit `several`; a cell is missing, or neither 0 nor 1.
    """
    column = table[columns[0]]
    if not several:
        if len(columns) > 1 or separator is not None or _is_list(column.type):
            raise ValueError(
                f"{where}: {quoted(columns)} holds several labels per text; the model was trained "
                "with one. Name a column with one label (label_column, without label_separator)."
            )
        return LabelCells(column, table.num_rows)
    if len(columns) > 1:
        return _cells_of_columns(table, columns, where)
    lists = plain_array(column)
    if separator is not None and not _is_list(lists.type):
        lists = _divided(lists, columns[0], separator, where)
    if not _is_list(lists.type):
        raise ValueError(_one_per_cell(table, columns[0], where, "several labels per text"))
    refuse_rows(pa.compute.is_null(lists), "list of labels is missing (write [] for none)", where)
    values = pa.compute.list_flatten(lists)
    rows = pa.compute.list_parent_indices(lists).to_pylist()
    _refuse_zeros_and_ones(lists, values, rows, f"{where}: the lists in column {columns[0]!r}")
    return _found(values, rows, table.num_rows, [])


def notes_on(cells: LabelCells, where: str) -> list[str]:
    """A sentence on the training texts that stand out: without a label, or with one twice."""
    if cells.rows is None:
        return []
    notes = []
    if cells.num_unlabelled:
        notes.append(
            f"{where}: {cells.num_unlabelled} of {cells.num_rows} texts have no label: they count "
            "as texts to which none applies"
        )
    pairs = set(zip(cells.rows, map(str, cells.values.to_pylist()), strict=True))
    if len(pairs) < len(cells.rows):
        repeated = len(cells.rows) - len(pairs)
        notes.append(f"{where}: labels that are repeated in their cell count once ({repeated})")
    never = sorted(set(cells.columns) - {name for _, name in pairs}, key=cells.columns.index)
    if never:
        notes.append(f"{where}: no text has the label {quoted(never[:5])}: it is never learned")
    return notes


def _is_list(kind: pa.DataType) -> bool:
    return (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def _one_per_cell(table: pa.Table, column: str, where: str, wanted: str) -> str:
    """Words for a column of single labels where several are meant."""
    remedy = (
        "write lists (jsonl, parquet), or name a column of zeros and ones for each label; all "
        "files of a training run in the same form"
    )
    if pa.types.is_string(plain_array(table[column]).type):
        remedy += ", or give the label_separator that joins them"
    return f"{where}: {wanted}, but column {column!r} holds one label per cell: {remedy}."


def _refuse_printed_lists(cells: pa.Array, column: str, where: str) -> None:
    """Refuse a column of texts such as "['joy', 'love']", as csv writers print lists."""
    if not pa.types.is_string(cells.type):
        return
    if pa.compute.all(pa.compute.match_substring_regex(cells, r"^\s*\[.*\]\s*$")).as_py():
        raise ValueError(
            f"{where}: column {column!r} holds lists that were printed as text, such as "
            f"{cells[0].as_py()!r:.60}. Write the file as jsonl or parquet, or join the labels by "
            f"a label_separator; problem_type={SINGLE_LABEL} takes each text for a class."
        )


def _divided(cells: pa.Array, column: str, separator: str, where: str) -> pa.Array:
    """Lists of the labels in cells of joined text; an empty cell has none."""
    if not pa.types.is_string(cells.type):
        raise ValueError(
            f"{where}: label_separator={separator!r}: column {column!r} holds {cells.type}, not "
            "text. Leave label_separator out, or write the labels as one text."
        )
    refuse_rows(pa.compute.is_null(cells), "label is missing (an empty text is no label)", where)
    trimmed = pa.compute.utf8_trim_whitespace(cells)
    parts = pa.compute.split_pattern(trimmed, separator)
    one_is_empty = pa.compute.match_substring_regex(
        trimmed, rf"^\s*{_escaped(separator)}|{_escaped(separator)}\s*({_escaped(separator)}|$)"
    )
    refuse_rows(
        one_is_empty,
        f"label is empty: the label_separator {separator!r} stands first, last, or twice in a row",
        where,
        cells,
    )
    is_empty = pa.compute.equal(trimmed, "")
    nothing = pa.array([[]] * len(cells), parts.type)
    return pa.compute.if_else(is_empty, nothing, parts)


def _escaped(separator: str) -> str:
    """The separator in a regular expression of RE2."""
    return "".join(rf"\x{{{ord(character):x}}}" for character in separator)


def _refuse_zeros_and_ones(lists: pa.Array, values: pa.Array, rows: list[int], what: str) -> None:
    """Refuse lists of a zero or a one for each label: they would be read as indices of labels."""
    is_truth = pa.types.is_boolean(values.type)
    if pa.types.is_integer(values.type) or pa.types.is_floating(values.type):
        lengths = pa.compute.unique(pa.compute.list_value_length(lists))
        found = values.to_pylist()
        # Indices of labels are not repeated in a list.
        repeats = len(set(zip(rows, found, strict=True))) < len(rows)
        is_truth = len(lengths) == 1 and repeats and set(found) <= {0, 1}
    elif pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        lengths = pa.compute.unique(pa.compute.list_value_length(lists))
        words = pa.compute.utf8_lower(pa.compute.utf8_trim_whitespace(values)).to_pylist()
        repeats = len(set(zip(rows, words, strict=True))) < len(rows)
        is_truth = len(lengths) == 1 and repeats and set(words) <= {*_NO, *_YES}
    if is_truth:
        raise ValueError(
            f"{what} are zeros and ones. Write the names or indices of the labels that apply, or a "
            "column of zeros and ones for each label (label_column=first,second,…)."
        )


def _cells_of_columns(table: pa.Table, columns: Sequence[str], where: str) -> LabelCells:
    """The names of the columns that hold a one, row by row."""
    is_set = []
    unlabelled: list[str] = []
    for name in columns:
        column = plain_array(table[name])
        refuse_rows(
            pa.compute.is_null(column, nan_is_null=True),
            f"label in column {name!r} is missing",
            where,
        )
        words = pa.compute.utf8_lower(pa.compute.utf8_trim_whitespace(column.cast(pa.string())))
        if set(pa.compute.unique(words).to_pylist()) <= {str(UNLABELLED), f"{UNLABELLED}.0"}:
            unlabelled.append(name)
            continue
        known = pa.compute.is_in(words, pa.array([*_NO, *_YES]))
        refuse_rows(
            pa.compute.invert(known), f"value in column {name!r} is neither 0 nor 1", where, column
        )
        is_set.append(pa.compute.is_in(words, pa.array(_YES)).to_pylist())
    if len(unlabelled) == len(columns):
        return _found(pa.array([]), [], table.num_rows, columns)
    if unlabelled:
        raise ValueError(
            f"{where}: {quoted(unlabelled[:5])} of the {len(columns)} label columns hold -1 "
            "(unlabelled) alone. Train without them (label_column), or label their texts here."
        )
    rows, names = [], []
    for row, here in enumerate(zip(*is_set, strict=True)):
        found = [name for name, value in zip(columns, here, strict=True) if value]
        names += found
        rows += [row] * len(found)
    return _found(pa.array(names, pa.string()), rows, table.num_rows, columns)


def _found(values: pa.Array, rows: list[int], num_rows: int, columns: Sequence[str]) -> LabelCells:
    """The labels of some rows; where no row has any, each is marked as unlabelled."""
    if not rows:
        values, rows = pa.array([UNLABELLED] * num_rows), list(range(num_rows))
    return LabelCells(pa.chunked_array([values]), num_rows, rows, list(columns))


def check_columns(columns: Sequence[str], classes: Classes, where: str) -> None:
    """Refuse columns of zeros and ones that are not the labels that are known.

    Raises:
        ValueError: naming those that lack, or are too many.
    """
    if not columns or set(columns) == set(classes.names):
        return
    missing = [name for name in classes.names if name not in columns]
    unknown = [name for name in columns if name not in classes.names]
    parts = [f"lacks {quoted(missing[:3])}"] if missing else []
    parts += [f"has {quoted(unknown[:3])}, which are no labels"] if unknown else []
    raise ValueError(
        f"{where}: label_column {' and '.join(parts)}: {classes.origin} has the labels "
        f"{quoted(classes.names[:20])}. Name a column for each of them."
    )
