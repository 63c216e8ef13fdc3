"""Rows of csv and tsv files: separator, quotes and header, as the file itself shows them."""

import csv
import io
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ..tasks import GLUE_TASKS

_SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}
_EXTENSIONS = {",": ".csv", "\t": ".tsv"}
# Names that only a header has; without any of them, a first row that looks like data is refused.
_USUAL_NAMES = {
    *("label", "labels", "class", "category", "target", "intent", "sentiment", "is_duplicate"),
    *("text", "texts", "title", "content", "message", "tweet", "utterance", "review", "document"),
    *("id", "idx", "index", "quality", "gold_label"),
    *(name for task in GLUE_TASKS.values() for name in task.text_columns),
}
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_WORDS_OF_A_TEXT = 4
_IN_QUOTES = re.compile(r'"(?:[^"]|"")*"')
_WITH_BACKSLASHES = re.compile(r'"(?:[^"\\]|\\.|"")*"')
# One kind of evidence prevails if there is this many times more of it.
_PREVAILS = 10
_CSV_REMEDY = (
    "put a text that holds a comma, a quote or a line break between double quotes, and write "
    '"" for a quote in it'
)
_TSV_REMEDY = "take tabs and line breaks out of the texts, or write csv"


@dataclass
class _Reading:
    """The rows of a file in one reading; `problem` is the first row that breaks its rules."""

    names: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    problem: str | None = None
    named: int = 0


def read_delimited(
    text: str, separator: str, where: str, notes: list[str]
) -> tuple[list[str], list[list[str]]]:
    """Split a file into the names of its columns and its rows, in which every value is text.

    In csv, quotes follow RFC 4180. A tsv file is read that way too if a csv writer wrote it, else a
    quote is an ordinary character, as in GLUE's files; `_tsv_reading` states the rule. Trailing
    columns that have neither name nor content are left out. `notes` receives a sentence on each
    choice.

    Raises:
        ValueError: another separator, no header, two equal names, a row that breaks the rules, or a
            tsv file that fits neither or both of the readings.
    """
    if text.startswith("sep="):
        raise ValueError(f"{where}: the first line, {text[:5]!r}, is for Excel: take it out.")
    if separator == "\t":
        reading = _tsv_reading(text, where, notes)
    else:
        reading = _read(text, _CSV_REMEDY, strict=True)
    _refuse_header(reading, separator, where)
    if reading.problem is not None:
        raise ValueError(f"{where}: {reading.problem}.")
    names = _drop_unnamed(reading, where, notes)
    return names, reading.rows


def _read(text: str, remedy: str, **dialect: Any) -> _Reading:
    # Python's strict reader, because Arrow's reads all rows after a stray quote as one text. The
    # limit on the length of a field is global, so it is never lowered.
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    reader = csv.reader(io.StringIO(text, newline=""), **dialect)
    reading = _Reading()
    first_line = 1
    try:
        for row in reader:
            if row and not reading.names:
                reading.names = [*row]
                reading.named = max((i for i, name in enumerate(row, 1) if name.strip()), default=0)
            elif row and len(row) not in (len(reading.names), reading.named):
                num_named = reading.named or len(reading.names)
                superfluous = not any(row[num_named:]) and len(row) > num_named
                reading.problem = (
                    f"data row {len(reading.rows) + 1} (line {first_line}) has {len(row)} fields, "
                    f"the header has {len(reading.names)}: {','.join(row)[:80]!r}; "
                    f"{'take the separators at the end of the row out' if superfluous else remedy}"
                )
                break
            elif row:
                reading.rows.append(row)
            first_line = reader.line_num + 1
    except csv.Error as error:
        reading.problem = (
            f"data row {len(reading.rows) + 1}, which starts at line {first_line}, breaks the "
            f"rules of quoting ({error}); {remedy}"
        )
    return reading


def _tsv_reading(text: str, where: str, notes: list[str]) -> _Reading:
    """Read a tsv file with quotes as csv has them, or as ordinary characters.

    Where no field begins with a quote there is no difference. Where one reading breaks at a row and
    the other does not, the other is right, unless the fields speak against it. Evidence of csv is a
    field in quotes with doubled quotes inside, evidence of characters a field with a quote that a
    csv writer would have written differently; one of them must be absent, or a tenth of the other.
    Where there is neither, quotes belong to csv if a writer's rule explains which fields stand in
    quotes: every text of a column, or those with commas, as Excel has it.

    Raises:
        ValueError: both readings fit or neither does; both are named.
    """
    plain = _read(text, _TSV_REMEDY, delimiter="\t", quoting=csv.QUOTE_NONE)
    if not re.search(r'(^|[\t\r\n])"', text):
        return plain
    quoted = _read(text, _CSV_REMEDY.replace("comma", "tab"), delimiter="\t", strict=True)
    fields = [cell for row in (plain.names, *plain.rows) for cell in row if '"' in cell]
    in_quotes = [cell for cell in fields if _IN_QUOTES.fullmatch(cell)]
    is_quoted = _is_quoted(plain, quoted, fields, in_quotes, text, where)
    if is_quoted:
        if quoted.problem and any('\\"' in cell for cell in fields):
            quoted.problem += " (in csv a backslash before a quote means nothing)"
        notes.append("fields in double quotes are read as in csv, without the quotes")
        return quoted
    if in_quotes:
        example = f"{in_quotes[0][:40]!r}"
        notes.append(f"{len(in_quotes)} fields such as {example} keep their quotes, as characters")
    return plain


def _is_quoted(
    plain: _Reading,
    quoted: _Reading,
    fields: list[str],
    in_quotes: list[str],
    text: str,
    where: str,
) -> bool:
    """Decide by the rule of `_tsv_reading`; `fields` hold a quote, `in_quotes` are well-formed."""
    num_doubled = sum(map(_is_doubled, in_quotes))
    num_plain = len(fields) - len(in_quotes)
    one_sided = max(num_doubled, num_plain) >= _PREVAILS * min(num_doubled, num_plain)
    header_in_quotes = all(_IN_QUOTES.fullmatch(name) for name in plain.names if name)
    in_doubt = None
    if plain.problem and quoted.problem:
        if not one_sided or num_doubled == num_plain:
            in_doubt = f"As in csv: {quoted.problem}. As characters: {plain.problem}."
    elif plain.problem or header_in_quotes:
        # Nobody writes a header in quotes that are part of the names.
        return True
    elif not quoted.problem and len(quoted.rows) < len(plain.rows):
        if len(plain.names) == 1 and _rewrites(quoted, text):
            return True
        in_doubt = (
            f"As in csv there are {len(quoted.rows)} rows, of which some hold line breaks; as "
            f"characters there are {len(plain.rows)} rows."
        )
    elif _is_glue_qqp(plain, quoted, in_quotes):
        return False
    elif not one_sided:
        example = next(cell for cell in fields if cell not in in_quotes)
        in_doubt = (
            f"{num_doubled} fields stand in quotes with doubled quotes inside, as in csv; "
            f"{num_plain} hold quotes as csv has none, such as {example[:60]!r}."
        )
    if in_doubt is not None:
        raise ValueError(
            f"{where}: are quotes those of csv or ordinary characters? {in_doubt} Write the file "
            "as csv or jsonl, which leave no doubt."
        )
    if num_doubled > num_plain:
        return True
    if num_plain:
        return all(_WITH_BACKSLASHES.fullmatch(cell) for cell in fields)
    return _writer_explains(plain)


def _rewrites(quoted: _Reading, text: str) -> bool:
    """True if a csv writer makes this text of the rows."""
    written = io.StringIO(newline="")
    csv.writer(written, delimiter="\t").writerows([quoted.names, *quoted.rows])
    return written.getvalue().splitlines() == text.splitlines()


def _is_doubled(cell: str) -> bool:
    """True for a field in quotes with doubled quotes inside."""
    return '""' in cell[1:-1] and _IN_QUOTES.fullmatch(cell) is not None


def _is_glue_qqp(plain: _Reading, quoted: _Reading, in_quotes: list[str]) -> bool:
    """True for GLUE's QQP, whose texts keep the quotes that a csv writer once put around them.

    If a csv writer wrote those texts again, they are in quotes still when its own are taken off.
    """
    if not set(GLUE_TASKS["qqp"].text_columns) <= set(plain.names):
        return False
    twice = sum(_is_doubled(cell) for row in quoted.rows for cell in row)
    return bool(quoted.problem) or twice < sum(map(_is_doubled, in_quotes)) / 2


def _writer_explains(plain: _Reading) -> bool:
    """True if the fields in quotes are all texts of their columns, or those that hold a comma."""
    texts = [
        [cell for cell in column if cell and not _NUMBER.fullmatch(cell)]
        for column in itertools.zip_longest(*plain.rows, fillvalue="")
    ]
    some = [column for column in texts if any(cell[0] == '"' for cell in column)]
    if all(cell[0] == '"' for column in some for cell in column) and len(plain.rows) > 1:
        return True
    return all((cell[0] == '"') == ("," in cell) for column in texts for cell in column)


def _refuse_header(reading: _Reading, separator: str, where: str) -> None:
    """Refuse a file without a header, with an unusable one, or with another separator."""
    names = reading.names
    if not names:
        raise ValueError(f"{where}: the file holds blank lines only; write it again.")
    if not reading.named:
        raise ValueError(f"{where}: the first line names no column; write the names there.")
    usual = any(name.strip().lower() in _USUAL_NAMES for name in names)
    if not usual and _looks_like_data(reading):
        by_length = sorted(range(len(names)), key=lambda index: -len(names[index]))
        header = [f"column{index}" for index in range(1, len(names) + 1)]
        for index, name in zip(by_length, ("text", "label"), strict=False):
            header[index] = name
        line = repr(separator.join(header))[1:-1]
        raise ValueError(
            f"{where}: no header: the first row, {names!r:.120}, looks like data. Write a first "
            f"line that names the columns, e.g. `sed -i '1i {line}' FILE`; if it is the header, "
            "call a column 'text' or 'label'."
        )
    if len(names) == 1:
        _offer_separator(names[0], separator, where)
    refuse_repeated(names[: reading.named], where)
    # A single word may well be a text.
    if usual and len(names) > 1 and names in reading.rows:
        raise ValueError(
            f"{where}: data row {reading.rows.index(names) + 1} repeats the header, as in files "
            "that were joined: take that line out."
        )


def _looks_like_data(reading: _Reading) -> bool:
    cells = [name.strip() for name in reading.names]
    # pandas names columns without names 0, 1, 2, …
    numbered = cells == [str(index) for index in range(len(cells))]
    for index, cell in enumerate(cells):
        if not cell:
            continue
        if _NUMBER.fullmatch(cell) and not numbered:
            return True
        if len(cell.split()) >= _WORDS_OF_A_TEXT and cell[-1] not in "?:":
            return True
        if any(row[index].strip() == cell for row in reading.rows if index < len(row)):
            return True
    return False


def _offer_separator(name: str, separator: str, where: str) -> None:
    for other, words in _SEPARATORS.items():
        parts = name.split(other)
        if other == separator or len(parts) < 2 or not all(part.strip() for part in parts):
            continue
        if other in _EXTENSIONS:
            remedy = f"give the file the extension {_EXTENSIONS[other]}"
        else:
            remedy = (
                "write it with commas, e.g. "
                f"`pandas.read_csv(OLD, sep={other!r}).to_csv(NEW, index=False)`"
            )
        raise ValueError(
            f"{where}: the header {name!r:.80} is a single column; {words} ({other!r}) seem to "
            f"separate the columns: {remedy}."
        )


def refuse_repeated(names: Iterable[str], where: str) -> None:
    """Refuse column names of which two are equal.

    Raises:
        ValueError: with the name.
    """
    names = list(names)
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated and not repeated[0].strip():
        raise ValueError(f"{where}: two columns have no name; name them in the header.")
    if repeated:
        raise ValueError(f"{where}: two columns are called {repeated[0]!r}; rename one.")


def _drop_unnamed(reading: _Reading, where: str, notes: list[str]) -> list[str]:
    """Cut the columns at the end that have no name; return the names."""
    named = reading.named
    unnamed = len(reading.names) - named
    if not unnamed:
        return reading.names
    for number, column, cell in _cells(reading.rows, named):
        if cell.strip():
            raise ValueError(
                f"{where}: data row {number} holds {cell[:60]!r} in column {column}, which has no "
                "name: name it in the header, or put a text that holds the separator between "
                "double quotes."
            )
    reading.rows = [row[:named] for row in reading.rows]
    notes.append(f"{unnamed} empty columns with no name are left out")
    return reading.names[:named]


def _cells(rows: list[list[str]], start: int) -> Iterator[tuple[int, int, str]]:
    """Number of the row, number of the column and value of each cell from column `start` on."""
    for number, row in enumerate(rows, 1):
        yield from ((number, start + index, cell) for index, cell in enumerate(row[start:], 1))
