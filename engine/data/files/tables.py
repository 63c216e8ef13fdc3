"""Reader of local csv, tsv, json, jsonl and parquet files, with checks, into Arrow tables."""

import json
import logging
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.json
import pyarrow.parquet

from ...runtime.files import kind_of_file, unique_keys
from ...runtime.text import did_you_mean
from .delimited import read_delimited, refuse_repeated
from .text_files import other_content, read_utf8

logger = logging.getLogger("fusedacl")
EXTENSIONS = (".parquet", ".jsonl", ".json", ".csv", ".tsv")
COMPRESSED = ".gz"
# Arrow counts a block's bytes in 32 bits.
_MAX_BLOCK_SIZE = 2**31 - 1
_MIN_BLOCK_SIZE = 2**20


def read_table(
    path: str | Path, argument: str = "file", notes: list[str] | None = None
) -> pa.Table:
    """Read one file of rows in the format of its extension; text formats also with .gz behind.

    All csv and tsv columns are read as text, so that no text is taken for a number or a date.

    notes: receives a sentence on each choice that the file left open; it is logged as well.

    Raises:
        ValueError: naming `argument` and the file: no such file, another extension, empty, no rows,
            not UTF-8, truncated, no header, a row with too many or too few fields, two equal column
            names.
    """
    path = Path(path)
    where = f"{argument}={str(path)!r}"
    check_file_exists(path, argument)
    _, extension = split_extension(path)
    if extension is None:
        raise ValueError(
            f"{where}: the extension {path.suffix!r} is not supported; convert the file to one of "
            f"{', '.join(EXTENSIONS)}, or the text formats with {COMPRESSED} behind."
        )
    if path.stat().st_size == 0:
        raise ValueError(f"{where}: the file is empty (0 bytes); write it again.")
    found: list[str] = []
    if extension == ".parquet":
        table = _read_parquet(path, where)
    elif extension in (".csv", ".tsv"):
        separator = "\t" if extension == ".tsv" else ","
        text = read_utf8(path, where).decode("utf-8")
        names, rows = read_delimited(text, separator, where, found)
        columns = zip(*rows, strict=True) if rows else [()] * len(names)
        arrays = [pa.array(column, pa.string()) for column in columns]
        table = pa.table(dict(zip(names, arrays, strict=True)))
    else:
        table = _read_json(read_utf8(path, where), where)
    for note in found:
        if notes is None or note not in notes:
            logger.info(f"{where}: {note}")
    if notes is not None:
        notes[:] = found
    if table.num_rows == 0:
        raise ValueError(f"{where}: the file holds no rows; give it at least one.")
    try:
        table.validate(full=True)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{where}: a column is damaged ({error}); write it again.") from error
    return table


def split_extension(path: Path) -> tuple[str, str | None]:
    """The name of a file without its extension, and the extension in lower case, without .gz.

    The extension is None if no file of that kind can be read.
    """
    name = path.name
    compressed = name.lower().endswith(COMPRESSED)
    inner = Path(name[: -len(COMPRESSED)] if compressed else name)
    extension = inner.suffix.lower()
    known = extension in EXTENSIONS and not (compressed and extension == ".parquet")
    return inner.stem, extension if known else None


def check_file_exists(path: Path, argument: str) -> None:
    """Refuse a `path` that is not a file.

    Raises:
        ValueError: there is no such file (the nearest name is offered), or it is something else: a
            directory, a pipe, a link that leads nowhere.
    """
    if path.is_file():
        return
    where = f"{argument}={str(path)!r}"
    if path.is_dir():
        is_option = argument in ("train_file", "validation_file", "test_file")
        remedy = ", or use --data_dir / --dataset_name" if is_option else ""
        raise ValueError(f"{where} is a directory; name a file{remedy}.")
    kind = kind_of_file(path)
    if kind is not None:
        raise ValueError(f"{where} is {kind}; name a file that holds the rows.")
    if not path.parent.is_dir():
        raise ValueError(f"{where}: no such file; the directory {path.parent} does not exist.")
    names = [entry.name for entry in path.parent.iterdir() if split_extension(entry)[1]]
    hint = did_you_mean(path.name, names) if names else " It holds no data file."
    raise ValueError(f"{where}: no such file in {path.parent.resolve()}.{hint}")


def _read_parquet(path: Path, where: str) -> pa.Table:
    try:
        # Not pyarrow's read_table: it would read a folder named `label=1` in the path as a column.
        with pyarrow.parquet.ParquetFile(path) as file:
            refuse_repeated(file.schema_arrow.names, where)
            return file.read()
    except (pa.ArrowException, OSError) as error:
        with path.open("rb") as file:
            content = other_content(file.read(64))
        if content is not None and not content.startswith("Parquet"):
            raise ValueError(f"{where}: not Parquet but {content}.") from error
        raise ValueError(
            f"{where}: not a complete Parquet file ({error}); it may be truncated: copy or write "
            "it again."
        ) from error


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
        twice = re.search(r"Column\(/(.*)\) was specified twice in row (\d+)", reason)
        if twice is not None:
            raise ValueError(
                f"{where}: data row {twice[2]} has two values called {twice[1]!r}; rename one."
            ) from error
        raise ValueError(
            f"{where}: {reason}; expected one JSON object per line, or one array of objects, each "
            "column of one type."
        ) from error
    if table.num_rows == 1 and all(pa.types.is_nested(field.type) for field in table.schema):
        raise ValueError(
            f"{where}: one object holds all columns; write one object per row, as pandas does with "
            "`to_json(FILE, orient='records', lines=True)`."
        )
    return table


def _json_lines(data: bytes, where: str) -> bytes:
    try:
        rows = json.loads(data, object_pairs_hook=unique_keys)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}: line {error.lineno}, column {error.colno}: {error.msg}; the array of "
            "objects is damaged or truncated: write it again."
        ) from error
    except ValueError as error:
        raise ValueError(f"{where}: in one of the objects {error}; rename one.") from None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(
                f"{where}: data row {number} is not an object; write {{column: value}}."
            )
    return "\n".join(map(json.dumps, rows)).encode()
