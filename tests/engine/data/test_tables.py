import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from fusedacl.engine.data.tables import read_table

ROWS = {"text": ["one, two", 'he said "no"', "2020-01-01", "123"], "label": [0, 1, 1, 0]}


def write_rows(path: Path) -> None:
    """ROWS in the format of the path's extension."""
    rows = [dict(zip(ROWS, row, strict=True)) for row in zip(*ROWS.values(), strict=True)]
    if path.suffix == ".parquet":
        pa.parquet.write_table(pa.table(ROWS), path)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif path.suffix == ".csv":
        quoted = ['"' + text.replace('"', '""') + '"' for text in ROWS["text"]]
        lines = [f"{text},{label}" for text, label in zip(quoted, ROWS["label"], strict=True)]
        path.write_text("\n".join(["text,label", *lines]), encoding="utf-8")
    else:
        lines = [f"{text}\t{label}" for text, label in zip(*ROWS.values(), strict=True)]
        path.write_text("\n".join(["text\tlabel", *lines]), encoding="utf-8")


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.json", "a.csv", "a.tsv", "A.CSV"])
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write_rows(path.with_suffix(path.suffix.lower()))
    path.with_suffix(path.suffix.lower()).rename(path)
    table = read_table(path)
    assert table["text"].to_pylist() == ROWS["text"]
    assert list(map(int, table["label"].to_pylist())) == ROWS["label"]


def test_csv_values_stay_the_text_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\nNA,0\n007,1\nnull,\n1.50,2\n", encoding="utf-8")
    assert read_table(path)["text"].to_pylist() == ["NA", "007", "null", "1.50"]
    assert read_table(path)["label"].to_pylist() == ["0", "1", "", "2"]


def test_csv_with_byte_order_mark_windows_lines_and_line_breaks_in_quotes(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbftext,label\r\n"two\r\nlines",0\r\n"odd "" quotes "" """,1\r\n')
    table = read_table(path)
    assert table.column_names == ["text", "label"]
    assert table["text"].to_pylist() == ["two\r\nlines", 'odd " quotes " "']


def test_csv_keeps_a_quote_inside_an_unquoted_text(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text,label\n5" disk,0\n"a\nb",1\n', encoding="utf-8")
    assert read_table(path)["text"].to_pylist() == ['5" disk', "a\nb"]


def test_jsonl_with_byte_order_mark_dates_and_missing_values(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text":"2020-01-01","label":0}\n\n{"text":"2021-12-31"}\n')
    assert read_table(path).to_pydict() == {
        "text": ["2020-01-01", "2021-12-31"],
        "label": [0, None],
    }


def test_json_array_keeps_columns_missing_from_the_first_row(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"}, {"text": "\u00e9", "label": 1}]', encoding="utf-8")
    assert read_table(path).to_pydict() == {"text": ["a", "\u00e9"], "label": [None, 1]}


def test_rows_longer_than_a_block_are_read(tmp_path: Path) -> None:
    text = "word " * 500_000
    (tmp_path / "a.csv").write_text(f"text,label\n{text},0\n", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}), encoding="utf-8")
    for name in ("a.csv", "a.jsonl"):
        assert read_table(tmp_path / name)["text"].to_pylist() == [text]


def test_parquet_under_a_folder_that_looks_like_a_partition(tmp_path: Path) -> None:
    folder = tmp_path / "label=7"
    folder.mkdir()
    write_rows(folder / "a.parquet")
    assert read_table(folder / "a.parquet")["label"].to_pylist() == ROWS["label"]


TRUNCATED = "not a complete Parquet file.*truncated"
BAD_FILES = {
    "empty csv": ("a.csv", b"", "the file is empty"),
    "empty jsonl": ("a.jsonl", b"", "the file is empty"),
    "empty parquet": ("a.parquet", b"", "the file is empty"),
    "blank csv": ("a.csv", b"\n\n", "blank lines only"),
    "blank jsonl": ("a.jsonl", b"\n \n", "holds no rows"),
    "header only": ("a.csv", b"text,label\n", "holds no rows"),
    "empty array": ("a.json", b"[]", "Empty JSON file"),
    "not parquet": ("a.parquet", b"text,label\na,0\n", TRUNCATED),
    "latin-1 csv": (
        "a.csv",
        b"text,label\na,0\ncaf\xe9,1\n",
        r"0xe9 at offset 18 \(line 3\).*UTF-8",
    ),
    "latin-1 tsv": ("a.tsv", b"text\tlabel\n\xe9\t1\n", r"0xe9 at offset 11 \(line 2\)"),
    "latin-1 jsonl": ("a.jsonl", b'{"text":"caf\xe9"}', r"0xe9 at offset 12 \(line 1\)"),
    "utf-16 csv": ("a.csv", "text,label\na,0\n".encode("utf-16"), r"offset 0 \(line 1\)"),
    "utf-16 without mark": ("a.csv", "text\na\n".encode("utf-16-le"), "NUL byte at offset 1"),
    "long row": (
        "a.csv",
        b"text,label\na,0\nb, c,1\n",
        r"data row 2 \(line 3\) has 3 fields.*header has 2.*b, c,1",
    ),
    "short row": (
        "a.csv",
        b'text,label\n"x\ny",1\n\na\nb,1\n',
        r"data row 2 \(line 5\) has 1 fields.*double quotes",
    ),
    "ragged tsv": ("a.tsv", b"text\tlabel\na\tb\t1\n", "data row 1 .* has 3 fields.*write csv"),
    "open quote": (
        "a.csv",
        b'label,text\n0,a\n1,"b\n0,c\n',
        "data row 2, which starts at line 3, .*unexpected end of data",
    ),
    "stray quote": (
        "a.csv",
        b'label,text\n0,"a\n1,"b"\n',
        "data row 1, which starts at line 2, .*rules of quoting",
    ),
    "twice": ("a.csv", b"text,text\na,0\n", "two columns are called 'text'"),
    "bad json": ("a.jsonl", b'{"text":"a"}\n{"text":"b"\n', "row 2.*one JSON object per line"),
    "mixed types": ("a.jsonl", b'{"label":1}\n{"label":"x"}\n', "from number to string in row 2"),
    "not objects": ("a.jsonl", b"1\n2\n", "expected one JSON object per line"),
    "cut array": ("a.json", b'[{"text": "a"},\n{"text"', "line 2, column 8.*truncated"),
    "array of texts": ("a.json", b'[{"text": "a"}, "b"]', "data row 2 is not an object"),
    "extension": ("a.txt", b"a\n", "extension '.txt' is not supported.*csv"),
    "compressed": ("a.csv.gz", gzip.compress(b"text\na\n"), "extension '.gz' is not supported"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_refused_by_name(tmp_path: Path, name: str) -> None:
    file_name, content, message = BAD_FILES[name]
    path = tmp_path / file_name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_table(path, "train_file")
    assert str(caught.value).startswith(f"train_file={str(path)!r}")


@pytest.mark.parametrize("kept", [0.3, 0.9, 0.999])
def test_truncated_parquet(tmp_path: Path, kept: float) -> None:
    path = tmp_path / "a.parquet"
    write_rows(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(ValueError, match=TRUNCATED):
        read_table(path)


def test_parquet_with_a_damaged_page(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"text": [f"text number {i} {i * i}" for i in range(1000)]})
    pa.parquet.write_table(table, path, compression="zstd")
    data = bytearray(path.read_bytes())
    data[len(data) // 4 : len(data) // 2] = bytes(len(data) // 2 - len(data) // 4)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=TRUNCATED):
        read_table(path)


def test_parquet_with_texts_that_are_not_utf8(tmp_path: Path) -> None:
    damaged = pa.array([b"caf\xe9", b"b"]).view(pa.string())
    pa.parquet.write_table(pa.table({"text": damaged}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a column is damaged.*UTF"):
        read_table(tmp_path / "a.parquet")


def test_a_missing_file_offers_the_nearest_one(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.csv")
    with pytest.raises(ValueError, match=r"train_file=.*no such file.*Did you mean 'train.csv'"):
        read_table(tmp_path / "trian.csv", "train_file")
    with pytest.raises(ValueError, match=r"directory .*absent does not exist"):
        read_table(tmp_path / "absent" / "train.csv")
    with pytest.raises(ValueError, match=r"is a directory.*--data_dir"):
        read_table(tmp_path)
