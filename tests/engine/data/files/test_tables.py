import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from fusedacl.engine.data.files.tables import read_table

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


PLAIN = ["a.jsonl", "a.json", "a.csv", "a.tsv"]


@pytest.mark.parametrize("name", ["a.parquet", *PLAIN, *(f"{name}.gz" for name in PLAIN), "A.CSV"])
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write_rows(tmp_path / name.lower().removesuffix(".gz"))
    (tmp_path / name.lower().removesuffix(".gz")).rename(path)
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(path.read_bytes()))
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
