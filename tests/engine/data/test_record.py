import dataclasses
import re

import pyarrow as pa
import pytest
from fusedacl.engine.data.columns import TextSplit, content, seen_among
from fusedacl.engine.data.record import (
    Classes,
    DataRecord,
    choose_text_columns,
    class_indices,
    learn_classes,
    required_label_columns,
    written_as,
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
    assert required_label_columns(pa.table({"text": ["a"], "labels": [1]}), "here") == ["labels"]
    with pytest.raises(ValueError, match=r"no label column.*Did you mean 'lable'"):
        required_label_columns(pa.table({"text": ["a"], "lable": [1]}), "here")


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


READINGS = {
    # labels of train; class names of a list beside the data; labels read as; class of each row
    "names": (["b", "a"], None, "names", [1, 0]),
    "integers are classes of their own": ([5, 3], None, "names", [1, 0]),
    "names of which some are numbers": (["1", "other"], None, "names", [0, 1]),
    "indices into a list": ([1, 0], ["no", "yes"], "indices", [1, 0]),
    "names of a list": (["yes", "no"], ["no", "yes"], "names", [1, 0]),
    "numbers of a list, by name": ([1, 2], ["2", "1"], "names", [1, 0]),
    "numbers of a list, by index": ([0, 1], ["1", "2"], "indices", [0, 1]),
    "a list of its own indices": ([0, 1], ["0", "1"], "indices", [0, 1]),
    "booleans": ([True, False], None, "names", [1, 0]),
}


@pytest.mark.parametrize("name", READINGS)
def test_the_training_labels_decide_how_labels_are_read(name: str) -> None:
    labels, listed, written, indices = READINGS[name]
    column = pa.chunked_array([labels])
    if listed is None:
        classes, _ = learn_classes(column, "train")
    else:
        classes = Classes(listed, "labels.json", by_index=None).decided(column, "train")
    assert class_indices(column, classes, "train") == indices
    assert written_as(column, classes) == written
    # A split that holds one of the classes only is read in the same way.
    again = DataRecord(classes.names, labels_as=written, text_columns=["text"]).classes
    assert class_indices(pa.chunked_array([labels[:1]]), again, "dev") == indices[:1]


REFUSED_LABELS = {
    "name or index": ([0, 1], ["1", "0"], "label 0 is either the class '0' or the index of '1'"),
    "names and indices": (["no", "1"], ["no", "yes"], "'1' in data row 2 is no class .* by name"),
    "missing, by pandas": (["a", "b", "nan"], None, "data row 3 = 'nan'.*word for a missing value"),
    "missing, by pandas 3": (["a", "<NA>", "b"], None, "= '<NA>': the label is a word for"),
    "missing, by Excel": (["a", "#N/A", "b"], None, "= '#N/A': the label is a word for"),
    "three moods": ([-1, 0, 1], None, "If -1, 0, 1 are the classes, write them as names.*0, 1, 2"),
    "two moods": ([1, -1], ["bad", "good"], "If -1, 1 are the classes.*as 0, 1; if -1 means"),
    "moods as text": (["1", "-1", "0"], None, "write them as names"),
}


@pytest.mark.parametrize("name", REFUSED_LABELS)
def test_labels_that_can_be_read_in_two_ways_are_refused(name: str) -> None:
    labels, listed, message = REFUSED_LABELS[name]
    column = pa.chunked_array([labels])
    with pytest.raises(ValueError, match=f"here: .*{message}"):
        if listed is None:
            learn_classes(column, "here")
        else:
            classes = Classes(listed, "labels.json", by_index=None).decided(column, "here")
            class_indices(column, classes, "here")


NOTED_LABELS = {
    "perhaps missing": (["a", "None", "b"], "'None' becomes a class; if it stands for a missing"),
    "numbers beside names": (["1", "2", "other"], "'1', '2' beside 'other'.*read as names"),
    "written in two ways": (["Spam", "ham", "spam"], "'Spam', 'spam' are different classes"),
    "several labels": (
        ["joy|pride", "joy", "pride"],
        r"33% of the labels look like several in one",
    ),
    "several numbers": (["2,5", "2", "5", "2,5"], r"50% .*'2,5'.*class of its own"),
}


@pytest.mark.parametrize("name", NOTED_LABELS)
def test_doubtful_labels_are_noted(name: str) -> None:
    labels, words = NOTED_LABELS[name]
    _, notes = learn_classes(pa.chunked_array([labels]), "here")
    assert any(re.search(f"here: .*{words}", note) for note in notes), notes


@pytest.mark.parametrize("labels", [["food, drink", "clothes"], ["a", "b", "c"]])
def test_ordinary_class_names_are_not_noted(labels: list[str]) -> None:
    assert learn_classes(pa.chunked_array([labels]), "here")[1] == []


REPEATED = ["yes", "no"] * 10
TABLE = pa.table(
    {
        "answer": REPEATED,
        "review": [f"words {row}" for row in range(20)],
        "topic": ["a", "a", "b", "b"] * 5,
        "class": [int(name == "yes") for name in REPEATED],
    }
)


def test_a_column_that_repeats_the_label_is_not_taken_for_the_text() -> None:
    columns, note = choose_text_columns(TABLE, "here", labels=["class"])
    assert columns == ["review", "topic"]
    assert note is not None and "not 'answer', whose values say the label" in note
    with pytest.raises(ValueError, match="no text column, not 'answer'.*--text_column"):
        choose_text_columns(TABLE.select(["answer", "class"]), "here", labels=["class"])
    assert choose_text_columns(TABLE, "here", options=("answer",), labels=["class"])[0] == [
        "answer"
    ]


PAIR = ["question", "sentence"]
CHOICES = {
    # options, columns of the model, chosen columns or words of the refusal
    "those of the model": ((), PAIR, PAIR),
    "option before the usual names": (("question",), None, ["question"]),
    "pair in the order of the options": (("sentence", "question"), None, PAIR[::-1]),
    "other names than the model's": (("idx", "sentence"), PAIR, ["idx", "sentence"]),
    "absent for the model": (
        (),
        ["text"],
        "the model reads 'text', the columns are .*--text_column",
    ),
    "pair absent": ((), ["left", "right"], "reads 'left', 'right'.*--text_pair_column"),
    "one text for pairs": (("question",), PAIR, "reads pairs .*name text_pair_column too"),
    "pair for one text": (PAIR, ["text"], "reads one text .*leave text_pair_column out"),
    "misspelt": (("questoin",), None, "no column 'questoin', which text_column.*mean 'question'"),
    "misspelt pair": (("question", "sent"), None, "'sent', which text_pair_column names"),
    "pair alone": ((None, "sentence"), None, "text_pair_column needs text_column"),
    "twice": (("sentence", "sentence"), None, "are both 'sentence': name two"),
}


@pytest.mark.parametrize("name", CHOICES)
def test_columns_by_options_and_by_the_model(name: str) -> None:
    options, model, expected = CHOICES[name]
    table = pa.table({column: ["words"] for column in ("idx", *PAIR, "label")})
    if isinstance(expected, list):
        assert choose_text_columns(table, "here", options=options, model=model)[0] == expected
    else:
        with pytest.raises(ValueError, match=expected):
            choose_text_columns(table, "here", options=options, model=model)


def test_a_pair_in_the_other_order_than_in_training_is_noted() -> None:
    table = pa.table({column: ["words"] for column in PAIR})
    _, note = choose_text_columns(table, "here", options=PAIR[::-1], model=PAIR)
    assert note is not None and "in the other order than in training" in note


def test_the_label_column_of_the_options() -> None:
    table = pa.table({"text": ["a"], "label": [0], "intent": ["x"]})
    assert required_label_columns(table, "here", "intent") == ["intent"]
    with pytest.raises(
        ValueError, match="here: no column 'intnet', which label_column names.*inte"
    ):
        required_label_columns(table, "here", "intnet")


def test_a_record_survives_the_configuration_and_names_what_differs() -> None:
    split = TextSplit(["a", "b"], ["c", "d"], [0, 1])
    record = DataRecord(
        ["no", "yes"], "names", PAIR, "label", None, {"train": content(split)}, True
    )
    assert DataRecord.from_dict(record.to_dict(), ["no", "yes"]) == record
    assert record.differences(DataRecord(["no", "yes"])) == []
    others = {
        "the classes are": {"label_names": ["yes", "no"]},
        "labels are written as indices": {"labels_as": "indices"},
        "the text columns are": {"text_columns": ["sentence", "question"]},
        "train has 1 rows, not 2": {"splits": {"train": content(split.head(1))}},
        "the texts of train": {
            "splits": {"train": content(TextSplit(["a", "b"], ["c", "e"], [0, 1]))}
        },
        "the labels of train": {
            "splits": {"train": content(TextSplit(["a", "b"], ["c", "d"], [1, 1]))}
        },
    }
    for words, change in others.items():
        (difference,) = record.differences(dataclasses.replace(record, **change))
        assert difference.startswith(words)


@pytest.mark.parametrize(
    "damage",
    [
        {"labels_as": "numbers"},
        {"text_columns": []},
        {"text_columns": "text"},
        {"f1_class": "maybe"},
        [],
    ],
)
def test_a_damaged_record_is_refused(damage: object) -> None:
    values = DataRecord(["no", "yes"], "names", ["text"], "label").to_dict()
    values = {**values, **damage} if isinstance(damage, dict) else damage
    with pytest.raises(ValueError, match=r"data_record in config.json is damaged"):
        DataRecord.from_dict(values, ["no", "yes"])


def test_texts_are_recognised_in_any_part_and_order() -> None:
    texts = [f"text {number}" for number in range(5000)]
    recorded = content(TextSplit(texts))
    part = TextSplit([*texts[:3999:-1], *["thanks"] * 40])
    # The record has 2,048 of the 5,000; repetitions count once.
    seen, compared = seen_among(part, recorded)
    assert 300 < compared < 520 and compared - seen <= 1
    assert seen_among(TextSplit([f"other {text}" for text in texts]), recorded)[0] == 0
    assert seen_among(TextSplit(texts), recorded) == (5000, 5000)
    assert seen_among(part, {"texts": recorded["texts"]}) == (0, 0)
