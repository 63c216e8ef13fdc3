import pyarrow as pa
import pytest
from fusedacl.engine.data.columns import TextSplit, holds_texts, read_texts


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())]
)
def test_texts_of_every_string_type_and_of_several_chunks(kind: pa.DataType) -> None:
    column = pa.chunked_array([pa.array(["a", "b"]).cast(kind), pa.array(["c"]).cast(kind)])
    table = pa.table({"left": column, "right": column})
    assert read_texts(table, ["left", "right"], "here") == TextSplit(
        ["a", "b", "c"], ["a", "b", "c"]
    )


BAD_TEXTS = {
    "null": (
        {"text": ["a", None, None]},
        r"data row 2: the text in column 'text' is null \(2 such",
    ),
    "all null": ({"text": [None, None]}, "data row 1: .*is null"),
    "empty": ({"text": ["a", "b", "", "c"]}, r"data row 3: the text is empty \('text'\)"),
    "blank": ({"text": ["a", " \t", "  "]}, r"data row 2: the text is empty.*\(2 such rows\)"),
    "null of a pair": ({"text": ["a", "b"], "pair": ["c", None]}, "data row 2: .*'pair' is null"),
    "empty pair": ({"text": ["a", ""], "pair": ["", " "]}, "data row 2: the pair is empty on both"),
    "numbers": ({"text": [1, 2]}, "column 'text' holds int64, not text"),
    "absent": ({"text": ["a"], "pari": ["b"]}, "no column 'pair'.*Did you mean 'pari'"),
}


@pytest.mark.parametrize("name", BAD_TEXTS)
def test_bad_texts(name: str) -> None:
    columns, message = BAD_TEXTS[name]
    chosen = ["text", "pair"] if name == "absent" else list(columns)
    with pytest.raises(ValueError, match=f"here: {message}"):
        read_texts(pa.table(columns), chosen, "here")


@pytest.mark.parametrize(
    ("cells", "holds"),
    [
        (["1", "2.5"], False),
        (["1", "", " ", None], False),
        (["", " "], False),
        ([None], False),
        (["1", "one"], True),
        (["", "one"], True),
    ],
)
def test_blanks_make_no_text_of_numbers(cells: list[str | None], holds: bool) -> None:
    assert holds_texts(pa.chunked_array([pa.array(cells, pa.string())])) is holds


def test_one_empty_side_of_a_pair_is_allowed() -> None:
    split = read_texts(pa.table({"left": ["a", ""], "right": ["", "b"]}), ["left", "right"], "here")
    assert split == TextSplit(["a", ""], ["", "b"])


def test_split_of_unequal_columns_is_refused_and_its_head_is_consistent() -> None:
    with pytest.raises(ValueError, match="labels has 1 entries, first has 2"):
        TextSplit(["a", "b"], labels=[0])
    split = TextSplit(["a", "b"], ["c", "d"], [0, 1])
    assert split.head(1) == TextSplit(["a"], ["c"], [0])
    assert split.head(None) == split.head(9) == split
