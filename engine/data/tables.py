"""Reader of local csv, tsv, json, jsonl and parquet files, with checks, into Arrow tables."""

import csv
import io
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.json
import pyarrow.parquet

from ..runtime.text import did_you_mean

EXTENSIONS = (".parquet", ".jsonl", ".json", ".csv", ".tsv")
# Arrow counts a block's bytes in 32 bits.
_MAX_BLOCK_SIZE = 2**31 - 1
_MIN_BLOCK_SIZE = 2**20


def read_table(path: str | Path, argument: str = "file") -> pa.Table:
    """Read one file of rows in the format of its extension.

    All csv and tsv columns are read as text, so that no text is taken for a number or a date. A csv
    field may be quoted (RFC 4180); in a tsv file a quote is an ordinary character, as in GLUE's.

    Raises:
        ValueError: naming `argument` and the file: no such file, another extension, empty, no rows,
            not UTF-8, truncated, a row with too many or too few fields, two equal column names.
    """
    path = Path(path)
    where = f"{argument}={str(path)!r}"
    check_file_exists(path, argument)
    extension = path.suffix.lower()
    if extension not in EXTENSIONS:
        raise ValueError(
            f"{where}: the extension {path.suffix!r} is not supported; convert the file to one of "
            f"{', '.join(EXTENSIONS)}."
        )
    if path.stat().st_size == 0:
        raise ValueError(f"{where}: the file is empty (0 bytes); write it again.")
    if extension == ".parquet":
        table = _read_parquet(path, where)
    elif extension in (".csv", ".tsv"):
        table = _read_delimited(read_utf8(path, where), extension == ".tsv", where)
    else:
        table = _read_json(read_utf8(path, where), where)
    if table.num_rows == 0:
        raise ValueError(f"{where}: the file holds no rows; give it at least one.")
    try:
        table.validate(full=True)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{where}: a column is damaged ({error}); write it again.") from error
    return table


def check_file_exists(path: Path, argument: str) -> None:
    """Refuse a `path` that is not a file.

    Raises:
        ValueError: there is no such file (the nearest name is offered), or it is a directory.
    """
    if path.is_file():
        return
    where = f"{argument}={str(path)!r}"
    if path.is_dir():
        raise ValueError(
            f"{where} is a directory; name a file, or use --data_dir / --dataset_name."
        )
    if not path.parent.is_dir():
        raise ValueError(f"{where}: no such file; the directory {path.parent} does not exist.")
    names = [entry.name for entry in path.parent.iterdir() if entry.suffix.lower() in EXTENSIONS]
    hint = did_you_mean(path.name, names) if names else " It holds no data file."
    raise ValueError(f"{where}: no such file in {path.parent.resolve()}.{hint}")


def read_utf8(path: Path, where: str) -> bytes:
    """Read the bytes of a UTF-8 text file, without its byte order mark.

    Raises:
        ValueError: the content is not UTF-8; the byte offset and the line are given.
    """
    data = path.read_bytes()
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{where}: byte 0x{data[error.start]:02x} at offset {error.start} (line {line}) is not "
            "UTF-8; save the file as UTF-8, e.g. `iconv -f latin1 -t utf-8`."
        ) from error
    offset = data.find(b"\0")
    if offset >= 0:
        raise ValueError(
            f"{where}: NUL byte at offset {offset}: this is not UTF-8 text (perhaps UTF-16, or a "
            "damaged file); save it as UTF-8."
        )
    return data.removeprefix(b"\xef\xbb\xbf")


def _read_parquet(path: Path, where: str) -> pa.Table:
    try:
        # Not pyarrow's read_table: it would read a folder named `label=1` in the path as a column.
        with pyarrow.parquet.ParquetFile(path) as file:
            return file.read()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{where}: not a complete Parquet file ({error}); it may be truncated: copy or write "
            "it again."
        ) from error


def _read_delimited(data: bytes, tab_separated: bool, where: str) -> pa.Table:
    # Python's strict reader, because Arrow's reads all rows after a stray quote as one text. The
    # limit on the length of a field is global, so it is never lowered.
    csv.field_size_limit(max(csv.field_size_limit(), len(data)))
    lines = io.StringIO(data.decode("utf-8"), newline="")
    if tab_separated:
        reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        remedy = "take tabs and line breaks out of the texts, or write csv"
    else:
        reader = csv.reader(lines, strict=True)
        remedy = (
            "put a text that holds a comma, a quote or a line break between double quotes, and "
            'write "" for a quote in it'
        )
    names: list[str] = []
    rows: list[list[str]] = []
    first_line = 1
    try:
        for row in reader:
            if row and not names:
                names = row
                _refuse_repeated(names, where)
            elif row and len(row) != len(names):
                raise ValueError(
                    f"{where}: data row {len(rows) + 1} (line {first_line}) has {len(row)} fields, "
                    f"the header has {len(names)}: {','.join(row)[:80]!r}; {remedy}."
                )
            elif row:
                rows.append(row)
            first_line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"{where}: data row {len(rows) + 1}, which starts at line {first_line}, breaks the "
            f"rules of quoting ({error}); {remedy}."
        ) from error
    if not names:
        raise ValueError(f"{where}: the file holds blank lines only; write it again.")
    columns = zip(*rows, strict=True) if rows else [()] * len(names)
    return pa.table(
        {name: pa.array(column, pa.string()) for name, column in zip(names, columns, strict=True)}
    )


def _refuse_repeated(names: list[str], where: str) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{where}: two columns are called {repeated[0]!r}; rename one.")


def _read_json(data: bytes, where: str) -> pa.Table:
    if data.lstrip()[:1] == b"[":
        data = _json_lines(data, where)
    try:
        # One block, so that rows of any length fit and row numbers count from the first row.
        block_size = min(max(len(data) + 1, _MIN_BLOCK_SIZE), _MAX_BLOCK_SIZE)
        read_options = pyarrow.json.ReadOptions(use_threads=False, block_size=block_size)
        table = pyarrow.json.read_json(pa.BufferReader(data), read_options)
        dates = [field.name for field in table.schema if pa.types.is_temporal(field.type)]
        if dates:
            # Arrow reads texts that all look like dates as dates: read them again as texts.
            schema = pa.schema([(name, pa.string()) for name in dates])
            parse_options = pyarrow.json.ParseOptions(explicit_schema=schema)
            table = pyarrow.json.read_json(pa.BufferReader(data), read_options, parse_options)
    except pa.ArrowException as error:
        # Arrow counts rows from 0; all other messages count from 1.
        reason = re.sub(r"in row (\d+)", lambda match: f"in row {int(match[1]) + 1}", str(error))
        raise ValueError(
            f"{where}: {reason}; expected one JSON object per line, or one array of objects, each "
            "column of one type."
        ) from error
    return table


def _json_lines(data: bytes, where: str) -> bytes:
    try:
        rows = json.loads(data)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}: line {error.lineno}, column {error.colno}: {error.msg}; the array of "
            "objects is damaged or truncated: write it again."
        ) from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(
                f"{where}: data row {number} is not an object; write {{column: value}}."
            )
    return "\n".join(map(json.dumps, rows)).encode()
