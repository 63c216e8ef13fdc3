"""What a csv or tsv file shows about its quotes, its columns and its header."""

import csv
import io
import logging
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet
import pytest
from fusedacl.engine.data import load_splits
from fusedacl.engine.data.files.tables import read_table

TEXTS = ["a plain one", 'He said "no" to me', "two\nlines", 'a\ttab, "quoted"', '"Yes."', 'x"', "7"]
READ_AS_CSV = ["fields in double quotes are read as in csv, without the quotes"]


def written(rows: Sequence[Sequence[str]], quoting: int = csv.QUOTE_MINIMAL) -> str:
    """The rows as a csv writer puts them into a tsv file."""
    file = io.StringIO(newline="")
    csv.writer(file, delimiter="\t", quoting=quoting).writerows(rows)
    return file.getvalue()


def read(path: Path, content: str) -> tuple[list[list[str]], list[str]]:
    """Columns and notes of a file with this content."""
    path.write_text(content, encoding="utf-8", newline="")
    notes: list[str] = []
    return list(read_table(path, "train_file", notes).to_pydict().values()), notes


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
@pytest.mark.parametrize("num_columns", [1, 2, 3])
def test_tsv_of_csv_writers(tmp_path: Path, quoting: int, num_columns: int) -> None:
    labels = [str(row % 2) for row in range(len(TEXTS))]
    columns = [TEXTS, labels, TEXTS[::-1]][:num_columns]
    rows = [("text", "label", "title")[:num_columns], *zip(*columns, strict=True)]
    assert read(tmp_path / "a.tsv", written(rows, quoting)) == (columns, READ_AS_CSV)


def test_one_text_with_a_line_break_and_nothing_else(tmp_path: Path) -> None:
    rows = [["text"], ["two\nlines"], ["one"]]
    assert read(tmp_path / "a.tsv", written(rows)) == ([["two\nlines", "one"]], READ_AS_CSV)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ('"a, b"\t"c, ""d"""', "e\tf"),
        ('"a, b"\t"c, d"', "e\t7"),
        ('"a"\tx', '"b"\ty'),
    ],
    ids=["doubled", "where Excel has commas", "a whole column"],
)
def test_quotes_that_a_writer_explains_are_taken_off(
    tmp_path: Path, first: str, second: str
) -> None:
    columns, notes = read(tmp_path / "a.tsv", f"text\ttitle\n{first}\n{second}\n")
    assert notes == READ_AS_CSV
    assert not any(cell.startswith('"') for column in columns for cell in column)


@pytest.mark.parametrize(
    ("first", "second", "noted"),
    [
        ('"Yes," he said.', '"No," she said.', False),
        ('"Yes."', 'She said "no".', True),
        ('"Yes."', "No, she said.", True),
        ('"A', "B", False),
        ('"', 'b" c', False),
        ('an 5" disk', "B", False),
    ],
)
def test_quotes_of_glue_are_characters(
    tmp_path: Path, first: str, second: str, noted: bool
) -> None:
    columns, notes = read(tmp_path / "a.tsv", f"sentence\tlabel\n{first}\t1\n{second}\t0\n")
    assert columns == [[first, second], ["1", "0"]]
    assert len(notes) == noted
    assert all("such as '\"Yes.\"' keep their quotes" in note for note in notes)


def test_few_fields_against_the_rest_do_not_count(tmp_path: Path) -> None:
    plain = [f'{number} said "a"' for number in range(20)]
    text = "\n".join(["text", *plain, '"so ""b"""'])
    assert read(tmp_path / "a.tsv", text)[0] == [[*plain, '"so ""b"""']]
    quoted = [f'"""{number}"" a"' for number in range(20)]
    columns, notes = read(tmp_path / "a.tsv", "\n".join(["text", *quoted, '5" disk']))
    assert columns == [[*(f'"{number}" a' for number in range(20)), '5" disk']]
    assert notes == READ_AS_CSV


QQP = ['"What is ""up""?"', "And now?", '"""Up"""']


def test_glue_keeps_the_quotes_of_qqp(tmp_path: Path) -> None:
    rows = [["question1", "question2", "label"], *([text, "Why?", "0"] for text in QQP)]
    plain = "\n".join(map("\t".join, rows))
    columns, notes = read(tmp_path / "a.tsv", plain)
    assert columns[0] == QQP and "keep their quotes" in notes[0]
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL):
        columns, notes = read(tmp_path / "a.tsv", written(rows, quoting))
        assert (columns[0], notes) == (QQP, READ_AS_CSV)


GLUE_FILES = ("cola", "mrpc", "qnli", "qqp", "rte", "sst2")


@pytest.mark.real_data
@pytest.mark.parametrize("task", GLUE_FILES)
def test_glue_in_both_ways_of_writing(real_data: Path, tmp_path: Path, task: str) -> None:
    table = pyarrow.parquet.read_table(real_data / task / "train.parquet")
    rows = [table.column_names, *(list(map(str, row.values())) for row in table.to_pylist())]
    expected = [list(column) for column in zip(*rows[1:], strict=True)]
    for content in ("\n".join(map("\t".join, rows)), written(rows)):
        assert read(tmp_path / "a.tsv", content)[0] == expected


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_empty_columns_without_a_name_are_left_out(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    lines = ["class,text,,,", "ham,see you at five,,,", "spam,,,,", "ham,bye"]
    content = "\n".join(lines).replace(",", "," if name == "a.csv" else "\t")
    caplog.set_level(logging.INFO, "fusedacl")
    columns, notes = read(tmp_path / name, content)
    assert columns == [["ham", "spam", "ham"], ["see you at five", "", "bye"]]
    assert notes == ["3 empty columns with no name are left out"]
    assert notes[0] in caplog.text
    # A message about the columns tells of those that are gone.
    with pytest.raises(ValueError, match=r"\(3 empty columns with no name .*no label column"):
        load_splits(train_file=str(tmp_path / name))


@pytest.mark.parametrize(
    "header",
    [
        "tweet body,mood",
        "How do you like our new shop?,answer",
        ",text,label",
        "0,1",
        "text,How much do you agree with it",
        "2019,text",
    ],
)
def test_headers_that_are_no_data(tmp_path: Path, header: str) -> None:
    cells = ",".join("abc"[: header.count(",") + 1])
    columns, notes = read(tmp_path / "a.csv", f"{header}\n{cells}\n")
    assert (len(columns), notes) == (header.count(",") + 1, [])


def test_a_repeated_row_is_no_second_header(tmp_path: Path) -> None:
    columns, _ = read(tmp_path / "a.csv", "text,label\ntext,0\ntext,0\n")
    assert columns == [["text", "text"], ["0", "0"]]
    assert read(tmp_path / "a.csv", "text\ntext\nword\n")[0] == [["text", "word"]]


def test_load_splits_takes_options_or_names(tmp_path: Path) -> None:
    from fusedacl.engine.config.sections import TrainingDataOptions

    path = tmp_path / "a.csv"
    path.write_text("text,label\na,0\nb,1\nc,1\n", encoding="utf-8")
    by_name = load_splits(train_file=str(path), max_train_samples=2)
    options = TrainingDataOptions(train_file=str(path), max_train_samples=2)
    assert by_name == load_splits(options) and by_name.splits["train"].first == ["a", "b"]
    known = load_splits(options, needs_train=False, label_names=["x", "y"])
    assert (known.splits, known.label_names) == ({}, ["x", "y"])
    with pytest.raises(TypeError, match="set train_file there"):
        load_splits(options, train_file="b.csv")
    with pytest.raises(TypeError, match="trian_file"):
        load_splits(trian_file="b.csv")
