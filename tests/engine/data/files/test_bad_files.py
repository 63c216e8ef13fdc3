"""Files that cannot be read, and the words of the message: what is wrong, and the remedy."""

import gzip
import json
import os
import socket
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from fusedacl.engine.data.files.tables import read_table


def parquet(*names: str) -> bytes:
    """A parquet file with a row of texts in columns of these names."""
    sink = pa.BufferOutputStream()
    table = pa.Table.from_arrays([pa.array([name]) for name in names], names=names)
    pa.parquet.write_table(table, sink)
    return sink.getvalue().to_pybytes()


CSV = "text,label\na,0\nb,1\n"
TRUNCATED = ("not a complete Parquet file", "truncated: copy")
# Name of the case -> name of the file, its content, words of the message.
BAD_FILES: dict[str, tuple[str, bytes | str, tuple[str, ...]]] = {
    "empty csv": ("a.csv", "", ("the file is empty", "write it again")),
    "empty jsonl": ("a.jsonl", "", ("the file is empty", "write it again")),
    "empty parquet": ("a.parquet", "", ("the file is empty", "write it again")),
    "blank csv": ("a.csv", "\n\n", ("blank lines only", "write it again")),
    "blank jsonl": ("a.jsonl", "\n \n", ("holds no rows", "give it at least one")),
    "header only": ("a.csv", "text,label\n", ("holds no rows", "give it at least one")),
    "empty array": ("a.json", "[]", ("Empty JSON file", "one array of objects")),
    "extension": ("a.txt", "a\n", ("extension '.txt' is not supported", ".csv", ".gz")),
    "packed otherwise": ("a.csv.zip", "PK", ("extension '.zip' is not supported", "convert")),
    "packed parquet": ("a.parquet.gz", "x", ("extension '.gz' is not supported", "convert")),
    # Content of another kind
    "not parquet": ("a.parquet", "text,label\na,0\n", TRUNCATED),
    "gzip without gz": ("a.csv", gzip.compress(b"text\na\n"), ("gzip", "add .gz to the name")),
    "text with gz": ("a.csv.gz", CSV, ("not a complete gzip file", "pack it again")),
    "cut gzip": ("a.tsv.gz", gzip.compress(CSV.encode())[:-9], ("not a complete gzip", "again")),
    "empty gzip": ("a.jsonl.gz", gzip.compress(b""), ("empty when unpacked", "write it again")),
    "latin-1 in gzip": (
        "a.csv.gz",
        gzip.compress(b"text\n\xe9\n"),
        ("offset 5", "iconv -f latin1"),
    ),
    "workbook": ("a.csv", b"PK\x03\x04\x14\0\x06", ("workbook of Excel", "export it as csv")),
    "old workbook": ("a.tsv", b"\xd0\xcf\x11\xe0\xa1\xb1", ("Excel", "export it as csv")),
    "parquet as csv": ("a.csv", parquet("text"), ("Parquet", "the extension .parquet")),
    "arrow": ("a.jsonl", b"ARROW1\0\0", ("Arrow", "write it as Parquet")),
    "web page": ("a.csv", "\n<!DOCTYPE html>\n<html>", ("a web page", "download the file")),
    "lfs in csv": ("a.csv", "version https://git-lfs.github.com/spec/v1\n", ("git lfs pull",)),
    "lfs in parquet": (
        "a.parquet",
        "version https://git-lfs.github.com/spec/v1",
        ("git lfs pull",),
    ),
    # Encodings
    "latin-1 csv": (
        "a.csv",
        b"text,label\na,0\ncaf\xe9,1\n",
        ("0xe9 at offset 18 (line 3)", "not UTF-8", "iconv -f latin1 -t UTF-8"),
    ),
    "latin-1 tsv": ("a.tsv", b"text\tlabel\n\xe9\t1\n", ("0xe9 at offset 11 (line 2)", "iconv")),
    "latin-1 jsonl": ("a.jsonl", b'{"text":"caf\xe9"}', ("0xe9 at offset 12 (line 1)", "iconv")),
    "windows": ("a.csv", b"text\nit\x92s\n", ("0x92 at offset 7", "iconv -f windows-1252")),
    "cut in a character": ("a.csv", b"text\ncaf\xc3", ("ends inside", "0xc3 at offset 8", "copy")),
    "utf-16": ("a.csv", CSV.encode("utf-16"), ("in UTF-16", "iconv -f UTF-16 -t UTF-8")),
    "utf-16, big": ("a.json", b"\xfe\xff\0[", ("in UTF-16", "iconv -f UTF-16 -t UTF-8")),
    "utf-16, no mark": ("a.csv", CSV.encode("utf-16-le"), ("iconv -f UTF-16LE -t UTF-8",)),
    "utf-16, big, no mark": ("a.tsv", CSV.encode("utf-16-be"), ("iconv -f UTF-16BE -t UTF-8",)),
    "utf-32": ("a.csv", CSV.encode("utf-32"), ("in UTF-32", "iconv -f UTF-32 -t UTF-8")),
    "utf-32, no mark": ("a.jsonl", CSV.encode("utf-32-be"), ("iconv -f UTF-32BE -t UTF-8",)),
    "NUL": ("a.csv", b"text,label\na\0b,1\n", ("NUL byte at offset 12", "write it again")),
    # Headers and separators
    "no header, tsv": (
        "a.tsv",
        "play some jazz for me\tmusic\nwill it rain\tweather\n",
        ("no header", "'play some jazz for me'", r"sed -i '1i text\tlabel' FILE"),
    ),
    "no header, label first": ("a.csv", "1,fine\n0,bad\n", ("no header", "'1i label,text'")),
    "no header, one text": ("a.csv", "I like this one\nnot that\n", ("no header", "'1i text'")),
    "no header, a value again": ("a.csv", "good,pos\nfine,pos\nbad,neg\n", ("no header", "sed")),
    "no names": ("a.csv", ",,\na,b,c\n", ("names no column", "write the names there")),
    "two without names": ("a.csv", ",,text\na,b,c\n", ("two columns have no name", "name them")),
    "text without a name": (
        "a.csv",
        "class,message,,\nham,a,,\nspam,well, really,\n",
        ("data row 2 holds ' really' in column 3, which has no name", "double quotes"),
    ),
    "twice": ("a.csv", "text,text\na,0\n", ("two columns are called 'text'", "rename one")),
    "twice, tsv": ("a.tsv", "label\tlabel\na\t0\n", ("two columns are called 'label'", "rename")),
    "twice, parquet": (
        "a.parquet",
        parquet("text", "text"),
        ("columns are called 'text'", "rename"),
    ),
    "header again": ("a.csv", CSV + CSV, ("data row 3 repeats the header", "take that line out")),
    "header again, marks": ("a.csv", ("\ufeff" + CSV) * 2, ("data row 3 repeats the header",)),
    "semicolons": ("a.csv", "text;label\na;0\n", ("semicolons (';')", "read_csv(OLD, sep=';')")),
    "semicolons and commas": ("a.csv", "text;label\na, b, c;0\n", ("semicolons (';')", "to_csv")),
    "bars": ("a.tsv", "text|label\na|0\n", ("vertical bars ('|')", "read_csv(OLD, sep='|')")),
    "tabs in csv": ("a.csv", "text\tlabel\na\t0\n", ("tabs", "give the file the extension .tsv")),
    "commas in tsv": ("a.tsv", "text,label\na,0\n", ("commas", "the file the extension .csv")),
    "line for Excel": ("a.csv", "sep=;\ntext;label\n", ("'sep=;'", "take it out")),
    # Rows
    "long row": (
        "a.csv",
        "text,label\na,0\nb, c,1\n",
        ("data row 2 (line 3) has 3 fields, the header has 2: 'b, c,1'", "double quotes"),
    ),
    "short row": (
        "a.csv",
        'text,label\n"x\ny",1\n\na\nb,1\n',
        ("data row 2 (line 5) has 1 fields", "double quotes"),
    ),
    "separators at the end": ("a.csv", "text,label\na,0,\n", ("has 3 fields", "separators at the")),
    "ragged tsv": ("a.tsv", "text\tlabel\na\tb\t1\n", ("data row 1", "has 3 fields", "write csv")),
    "open quote": (
        "a.csv",
        'label,text\n0,a\n1,"b\n0,c\n',
        ("data row 2, which starts at line 3", "unexpected end of data", '""'),
    ),
    "stray quote": (
        "a.csv",
        'label,text\n0,"a\n1,"b"\n',
        ("data row 1, which starts at line 2", "rules of quoting", '""'),
    ),
    # Quotes in tsv
    "lines in quotes or rows": (
        "a.tsv",
        'label\ttext\tid\n0\t"a\t1\n1\tb"\t2\n',
        ("As in csv there are 1 rows", "as characters there are 2 rows", "csv or jsonl"),
    ),
    "quotes of both kinds": (
        "a.tsv",
        'text\tlabel\n"say ""no"""\t0\nsay "no"\t1\n',
        ("1 fields stand in quotes with doubled", "1 hold quotes as csv has none", "csv or jsonl"),
    ),
    "neither kind": (
        "a.tsv",
        'text\tlabel\n"a" b\t0\nc\td\te\n',
        ("data row 2 (line 3) has 3 fields", "take tabs"),
    ),
    "broken in both": (
        "a.tsv",
        'text\tlabel\n"a ""b"""\t0\n"c" d\t1\ne\tf\tg\n',
        ("As in csv: data row 2", "As characters: data row 3", "csv or jsonl"),
    ),
    "backslashes": (
        "a.tsv",
        '"text"\t"label"\n"say \\"no\\""\t0\n',
        ("rules of quoting", "backslash before a quote", 'write "" for a quote'),
    ),
    # JSON
    "bad json": ("a.jsonl", '{"text":"a"}\n{"text":"b"\n', ("row 2", "one JSON object per line")),
    "mixed types": ("a.jsonl", '{"label":1}\n{"label":"x"}\n', ("to string in row 2", "one type")),
    "not objects": ("a.jsonl", "1\n2\n", ("expected one JSON object per line",)),
    "cut array": ("a.json", '[{"text": "a"},\n{"text"', ("line 2, column 8", "truncated")),
    "array of texts": ("a.json", '[{"text": "a"}, "b"]', ("data row 2 is not an object", "write")),
    "by column": ("a.json", '{"text": ["a"], "label": [0]}', ("one object", "orient='records'")),
    "keys twice": (
        "a.jsonl",
        '{"text":"a"}\n{"text":"b","text":"c"}\n',
        ("data row 2 has two values called 'text'", "rename one"),
    ),
    "keys twice, array": ("a.json", '[{"text": "a", "text": "b"}]', ("'text' is given", "rename")),
    "keys twice, inside": ("a.json", '[{"x": {"y": 1, "y": 2}}]', ("'y' is given twice", "rename")),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_refused_with_the_remedy(tmp_path: Path, name: str) -> None:
    file_name, content, words = BAD_FILES[name]
    path = tmp_path / file_name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError) as caught:
        read_table(path, "train_file")
    message = str(caught.value)
    assert message.startswith(f"train_file={str(path)!r}")
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize("kept", [0.3, 0.9, 0.999])
def test_truncated_parquet(tmp_path: Path, kept: float) -> None:
    path = tmp_path / "a.parquet"
    data = parquet("text", "label")
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(ValueError, match=".*".join(TRUNCATED)):
        read_table(path)


def test_parquet_with_a_damaged_page(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"text": [f"text number {i} {i * i}" for i in range(1000)]})
    pa.parquet.write_table(table, path, compression="zstd")
    data = bytearray(path.read_bytes())
    data[len(data) // 4 : len(data) // 2] = bytes(len(data) // 2 - len(data) // 4)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=".*".join(TRUNCATED)):
        read_table(path)


def test_parquet_with_texts_that_are_not_utf8(tmp_path: Path) -> None:
    damaged = pa.array([b"caf\xe9", b"b"]).view(pa.string())
    pa.parquet.write_table(pa.table({"text": damaged}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a column is damaged.*UTF"):
        read_table(tmp_path / "a.parquet")


def test_a_missing_file_offers_the_nearest_one(tmp_path: Path) -> None:
    (tmp_path / "train.csv.gz").write_text("")
    with pytest.raises(ValueError, match=r"file=.*no such file.*Did you mean 'train.csv.gz'"):
        read_table(tmp_path / "trian.csv.gz", "train_file")
    with pytest.raises(ValueError, match=r"directory .*absent does not exist"):
        read_table(tmp_path / "absent" / "train.csv")
    with pytest.raises(ValueError, match=r"is a directory.*--data_dir"):
        read_table(tmp_path, "train_file")
    # `predict` has no such options.
    with pytest.raises(ValueError, match=r"is a directory; name a file\.$"):
        read_table(tmp_path, "input_file")


def make_special(path: Path, kind: str) -> None:
    """Puts something at `path` that is no file."""
    if kind == "circle":
        path.symlink_to(path.name)
    elif kind == "dangling":
        path.symlink_to("absent.csv")
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(path))


SPECIAL = {
    "circle": "a symbolic link that leads in a circle",
    "dangling": "a symbolic link to 'absent.csv', which does not exist",
    "fifo": "a named pipe",
    "socket": "a socket",
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_file_is_named(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The path of a socket may have some hundred characters only.
    monkeypatch.chdir(tmp_path)
    make_special(Path("a.csv"), kind)
    with pytest.raises(ValueError, match=rf"is {SPECIAL[kind]}.*; name a file"):
        read_table("a.csv", "train_file")
    with pytest.raises(ValueError, match="is a device.*name a file"):
        read_table("/dev/null", "train_file")


def test_json_of_one_row_is_no_mistake(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a", "spans": [1]}))
    assert read_table(tmp_path / "a.jsonl").num_rows == 1
