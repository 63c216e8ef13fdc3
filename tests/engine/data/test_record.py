import pyarrow as pa
import pytest
from fusedacl.engine.data.record import (
    Classes,
    choose_text_columns,
    class_indices,
    learn_classes,
    required_label_column,
)

LISTED = Classes(["no", "yes", "maybe"], "labels.json", by_index=True)


@pytest.mark.parametrize(
    ("columns", "preferred", "chosen"),
    [
        (["question", "sentence", "label"], ("question", "sentence"), ["question", "sentence"]),
        (["title", "sentence2", "sentence1", "label"], (), ["sentence1", "sentence2"]),
        (["text", "sentence", "label"], (), ["sentence"]),
        (["title", "text", "label"], (), ["text"]),
        (["premise", "hypothesis", "genre", "label"], (), ["premise", "hypothesis"]),
        (["query", "labels"], (), ["query"]),
        (["question1", "question2", "label"], ("question", "sentence"), ["question1", "question2"]),
    ],
)
def test_text_columns(columns: list[str], preferred: tuple[str, ...], chosen: list[str]) -> None:
    table = pa.table({name: ["words"] for name in columns})
    assert choose_text_columns(table, "here", preferred)[0] == chosen


def test_a_choice_that_is_not_plain_is_noted() -> None:
    texts = {"sentence": ["a"], "label": [0], "idx": ["17"], "weight": [0.5]}
    assert choose_text_columns(pa.table(texts), "here")[1] is None
    note = choose_text_columns(pa.table({**texts, "question": ["b"]}), "here")[1]
    assert note == "here: reads 'sentence', not 'question'"
    note = choose_text_columns(pa.table({"idx": ["1"], "left": ["a"], "right": ["b"]}), "here")[1]
    assert note == "here: takes 'left', 'right' for the text"


def test_no_text_column() -> None:
    with pytest.raises(
        ValueError, match=r"here: no text column; call it 'sentence'.*'idx', 'label'"
    ):
        choose_text_columns(pa.table({"idx": ["1", "2.5"], "label": ["a", "b"]}), "here")


def test_no_label_column_offers_the_nearest() -> None:
    assert required_label_column(pa.table({"text": ["a"], "labels": [1]}), "here") == "labels"
    with pytest.raises(ValueError, match=r"no label column.*Did you mean 'lable'"):
        required_label_column(pa.table({"text": ["a"], "lable": [1]}), "here")


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([1, 0, 1], ["0", "1"]),
        (["1", " 0", "1"], ["0", "1"]),
        (["b", "a ", "c"], ["a", "b", "c"]),
        ([10, 9, 2], ["2", "9", "10"]),
        (["01", "02"], ["01", "02"]),
        (["1", "x"], ["1", "x"]),
        ([True, False], ["false", "true"]),
    ],
)
def test_learned_classes_are_sorted_and_label_their_own_rows(
    labels: list, names: list[str]
) -> None:
    column = pa.chunked_array([pa.array(labels)])
    classes, notes = learn_classes(column, "train")
    assert classes.names == names
    assert bool(notes) == (names in (["2", "9", "10"], ["1", "x"]))
    indices = class_indices(column, classes, "train")
    assert indices is not None
    assert [names[index] for index in indices] == [str(label).strip().lower() for label in labels]


def test_integer_labels_are_indices_into_listed_names_and_values_of_learned_ones() -> None:
    stars = Classes(["1", "2", "3"], "labels.json", by_index=True)
    column = pa.chunked_array([[1, 2]])
    assert class_indices(column, stars, "here") == [1, 2]
    learned = Classes(["1", "2", "3"], "train", by_index=False)
    assert class_indices(column, learned, "here") == [0, 1]
    assert class_indices(pa.chunked_array([["maybe", "no"]]), LISTED, "here") == [2, 0]


def test_a_column_of_minus_one_is_unlabelled() -> None:
    assert class_indices(pa.chunked_array([[-1, -1]]), LISTED, "test") is None
    with pytest.raises(ValueError, match=r"train: every label is -1 \(unlabelled\)"):
        learn_classes(pa.chunked_array([[-1, -1]]), "train")


BAD_LABELS = {
    "out of range": ([0, 3, 1], "data row 2 = 3: .*labels.json lists 3 classes.*from 0 to 2"),
    "negative": ([0, 1, -1], "data row 3 = -1: the label is negative"),
    "fraction": (
        [0.0, 1.5, 2.5],
        r"data row 2 = 1.5: the label is not an integer.*\(2 such rows\)",
    ),
    "whole float": ([0.0, 1.0], "data row 1 = 0.0: the label is not an integer"),
    "infinite": ([0.0, float("inf")], "data row 1 = 0.0: the label is not an integer"),
    "fraction as text": (["0", "1.5"], "data row 2 = '1.5': the label is not an integer"),
    "null": ([0, None], "data row 2: the label is missing"),
    "not a number": ([0.0, float("nan")], "data row 2: the label is missing"),
    "empty": (["no", " "], "data row 2: the label is missing"),
    "unknown name": (["no", "yse"], "data row 2 has the label 'yse'.*Did you mean 'yes'"),
    "list": ([[0], [1]], "labels of type list.*neither integers nor names"),
}


@pytest.mark.parametrize("name", BAD_LABELS)
def test_bad_labels(name: str) -> None:
    labels, message = BAD_LABELS[name]
    with pytest.raises(ValueError, match=f"here: {message}"):
        class_indices(pa.chunked_array([labels]), LISTED, "here")


@pytest.mark.parametrize("labels", [[1, 1], ["a", "a"]])
def test_a_single_class_cannot_be_learned(labels: list) -> None:
    with pytest.raises(ValueError, match=r"here: every label is .*at least two classes"):
        learn_classes(pa.chunked_array([labels]), "here")


def test_learned_names_do_not_take_integers_for_indices() -> None:
    classes, _ = learn_classes(pa.chunked_array([["no", "yes"]]), "train.csv")
    with pytest.raises(ValueError, match=r"data row 1 has the label '0', which train.csv does not"):
        class_indices(pa.chunked_array([[0, 1]]), classes, "dev.csv")


def test_class_lists_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"labels.json: the class 'a' is listed twice"):
        Classes(["a", "b", "a"], "labels.json", by_index=True)
    with pytest.raises(ValueError, match="at least two classes"):
        Classes(["a"], "labels.json", by_index=True)
