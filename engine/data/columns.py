"""Texts and labels in the columns of a table, with checks of every row.

Messages count rows from 1, without the header of a csv file.
"""

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute

from ..runtime.text import did_you_mean

# Label of every row of GLUE's test splits.
UNLABELLED = -1
# Eighteen digits always fit into 64 bits; codes such as 007 are names, not numbers.
_INTEGER = r"^-?(0|[1-9]\d{0,17})$"
# Texts of a split whose hashes are recorded: at most 14 kB in the model's configuration. Of 1,000
# texts five are among those of 400,000, so that a file that was seen as a whole is noticed.
_SAMPLE = 2048
_HASH_BYTES = 5
_NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"


@dataclass(frozen=True)
class TextSplit:
    """Texts, or pairs of texts, and their labels if they are known.

    labels: class indices; if `num_labels` is given, a text may have several of that many labels,
    and each entry is a sorted list of label indices.
    """

    first: list[str]
    second: list[str] | None = None
    labels: list[Any] | None = None
    num_labels: int | None = None

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
        return self.take(range(len(self))[:num_samples])

    def take(self, rows: Sequence[int]) -> "TextSplit":
        """The texts with these row indices, in the order given."""
        second, labels = self.second, self.labels
        return TextSplit(
            [self.first[row] for row in rows],
            None if second is None else [second[row] for row in rows],
            None if labels is None else [labels[row] for row in rows],
            self.num_labels,
        )


def content(split: TextSplit) -> dict[str, Any]:
    """The number of rows of a split, the SHA-256 of its texts and of its labels, and a sample.

    The sample has the smallest hashes of the texts, so that it can be compared with that of any
    other order or part of them.
    """

    def digest(value: Any) -> str:
        text = json.dumps(value, ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    return {
        "rows": len(split),
        "texts": digest([split.first, split.second]),
        "labels": digest(split.labels),
        "sample": base64.b64encode(b"".join(_text_hashes(split)[:_SAMPLE])).decode(),
    }


def seen_among(split: TextSplit, recorded: Mapping[str, Any]) -> tuple[int, int]:
    """The number of a split's texts that are among recorded ones, and of those compared.

    recorded: a `content`. Those of the texts are compared whose hashes are as small as those of the
    recorded sample: a random part of them, without repetitions. A record of an earlier version has
    no sample: it tells only the same texts in the same order.
    """
    hashes = _text_hashes(split)
    if content(split)["texts"] == recorded.get("texts"):
        return len(hashes), len(hashes)
    sample = base64.b64decode(recorded.get("sample", ""))
    kept = [sample[start : start + _HASH_BYTES] for start in range(0, len(sample), _HASH_BYTES)]
    if not kept:
        return 0, 0
    compared = hashes if len(kept) < _SAMPLE else [key for key in hashes if key <= kept[-1]]
    return len(set(kept).intersection(compared)), len(compared)


def _text_hashes(split: TextSplit) -> list[bytes]:
    """Hashes of the texts or pairs, each once, the smallest first."""
    second = split.second if split.second is not None else [""] * len(split)
    return sorted(
        {
            hashlib.blake2b(
                f"{a}\0{b}".encode("utf-8", "surrogatepass"), digest_size=_HASH_BYTES
            ).digest()
            for a, b in zip(split.first, second, strict=True)
        }
    )


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
            raise ValueError(
                f"{where}: no column {name!r}.{nearest_column(name, table.column_names)}"
            )
        column = plain_array(table[name])
        refuse_rows(pa.compute.is_null(column), f"text in column {name!r} is null", where)
        if not pa.types.is_string(column.type):
            raise ValueError(
                f"{where}: column {name!r} holds {column.type}, not text; write the texts as "
                "strings."
            )
        blank = pa.compute.equal(pa.compute.utf8_trim_whitespace(column), "")
        empty = blank if empty is None else pa.compute.and_(empty, blank)
        values.append(column.to_pylist())
    wording = "text is empty" if len(values) == 1 else "pair is empty on both sides"
    refuse_rows(empty, f"{wording} ({quoted(columns)})", where)
    return TextSplit(values[0], values[1] if len(values) == 2 else None)


def label_values(column: pa.ChunkedArray, where: str) -> pa.Array:
    """Return labels as int64, or as trimmed strings if they are not all integers."""
    values = plain_array(column)
    missing = "label is missing"
    refuse_rows(pa.compute.is_null(values, nan_is_null=True), missing, where)
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
    refuse_rows(pa.compute.equal(values, ""), missing, where)
    integers = pa.compute.match_substring_regex(values, _INTEGER)
    if pa.compute.all(integers).as_py():
        return values.cast(pa.int64())
    numbers = pa.compute.match_substring_regex(values, _NUMBER)
    if pa.compute.all(numbers).as_py():
        fractions = pa.compute.match_substring_regex(values, "[.eE]")
        if pa.compute.any(fractions).as_py():
            _refuse_fractions(fractions, values, where)
    return values


def is_integer_name(name: str) -> bool:
    """True if a class name looks like an integer label."""
    return re.match(_INTEGER, name) is not None


def unlabelled(where: str) -> ValueError:
    """The error for training data without labels."""
    return ValueError(f"{where}: every label is -1 (unlabelled); training needs labels.")


def all_unlabelled(values: pa.Array) -> bool:
    return pa.compute.all(pa.compute.equal(values, UNLABELLED)).as_py()


def _refuse_fractions(broken: pa.Array, values: pa.Array, where: str) -> None:
    refuse_rows(
        broken,
        "label is not an integer: write classes as 0, 1, … or as names (regression is not "
        "supported)",
        where,
        values,
    )


def refuse_negative(values: pa.Array, where: str) -> None:
    distinct = sorted(pa.compute.unique(values).to_pylist())
    remedy = None
    if distinct[0] == UNLABELLED and len(distinct) <= 3:
        # Labels such as -1, 0, 1 are three classes; nobody should drop their rows.
        codes = ", ".join(map(str, distinct))
        remedy = (
            f"If {codes} are the classes, write them as names (such as 'negative') or as "
            f"{', '.join(map(str, range(len(distinct))))}; if -1 means unlabelled, take those rows "
            "out."
        )
    refuse_rows(
        pa.compute.less(values, 0),
        "label is negative: classes start at 0 (-1 means unlabelled, for a whole split only)",
        where,
        values,
        remedy,
    )


def refuse_rows(
    broken: pa.Array,
    problem: str,
    where: str,
    values: pa.Array | None = None,
    remedy: str | None = None,
) -> None:
    """Raise ValueError, with the first row and the count, if any entry of `broken` is true."""
    count = pa.compute.sum(broken).as_py()
    if not count:
        return
    row = pa.compute.index(broken, True).as_py()
    value = "" if values is None else f" = {values[row].as_py()!r}"
    others = f" ({count} such rows)" if count > 1 else ""
    if remedy is None:
        remedy = "Correct the row or take it out." if count == 1 else "Correct or drop the rows."
    raise ValueError(f"{where}: data row {row + 1}{value}: the {problem}{others}. {remedy}")


def plain_array(column: pa.ChunkedArray) -> pa.Array:
    """Return a column as one array, without dictionary encoding and with one type of string."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    if pa.types.is_dictionary(array.type):
        array = array.cast(array.type.value_type)
    if re.match("(large_)?string(_view)?$", str(array.type)):
        array = array.cast(pa.string())
    return array


def holds_texts(column: pa.ChunkedArray) -> bool:
    array = plain_array(column)
    if not pa.types.is_string(array.type):
        return False
    # csv columns are all read as strings; a column of numbers and blanks is no text.
    other = pa.compute.invert(pa.compute.match_substring_regex(array, rf"{_NUMBER}|^\s*$"))
    return bool(pa.compute.any(other).as_py())


def quoted(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))


def nearest_column(name: str, names: Sequence[str]) -> str:
    """Return ' Did you mean …?' for a column, '' for a table without columns."""
    return did_you_mean(name, names) if names else ""
